"""The instructions one by one, what a row may say, and texts made to hang a grader."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from miles.config import args_view, make_config
from miles.errors import ConfigError
from miles.rollout import label_required
from miles.rollout.rewards import find, registry
from miles.rollout.rewards.instructions import bound_checks
from miles.rollout.rewards.instructions.catalogue import checks
from miles.rollout.rewards.instructions.language import speaks
from miles.rollout.rewards.instructions.text import count_sentences
from miles.types import Sample

from .instruction_cases import IFBENCH, IFTRAIN, Case


def follows(response: str, *instructions: tuple[str, dict[str, Any]], rm_type: str = "ifeval") -> float:
    metadata = {"instruction_id_list": [i for i, _ in instructions], "kwargs": [k for _, k in instructions]}
    sample = Sample(response=response, metadata=metadata)
    return float(
        find(rm_type).function(args_view(make_config()), sample, response=registry.graded_text(rm_type, sample))
    )


def row(name: str, **arguments: Any) -> dict[str, Any]:
    return {"instruction_id_list": [name], "kwargs": [arguments]}


RELATION = {"relation": "at least"}
IFEVAL: list[Case] = [
    ("keywords:existence", {"keywords": ["Cat", "c++"]}, ["a CAT in C++"], ["a cat", "a c in c++"]),
    ("keywords:frequency", {"keyword": "ab", "frequency": 2, **RELATION}, ["ab AB", "ab.ab.ab"], ["ab", "a b a b"]),
    ("keywords:frequency", {"keyword": "ab", "frequency": 2, "relation": "less than"}, ["ab"], ["ab ab"]),
    ("keywords:forbidden_words", {"forbidden_words": ["can", "a.c"]}, ["candid abc"], ["you CAN", "x a.c"]),
    (
        "keywords:letter_frequency",
        {"letter": "o", "let_frequency": 2, "let_relation": "at least"},
        ["Oo", "foo"],
        ["o", "x"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, **RELATION},
        ["One. Two", "One! Two?"],
        ["One", "Mr. Li", "..."],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one two"], ["one-two three"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a***b", "***\na\n***\nb"], ["a", "a******b"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Yes"},
        ["a\n\nyes, b", 'a\n\n\n\n"Yes" b'],
        ["a\n\nyesterday", "yes\n\na", "a\n\nyes\n\nb"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b]"], ["[a]", "[a [b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["x\nP. S. y", "p.s. y"], ["ps y", "x"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S y", "p. p. s. y"], ["P.S. y"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n - b"],
        ["* a", "* a\n- b\n- c", "**a**\n* b"],
    ),
    ("detectable_format:constrained_response", {}, ["So: My answer is no."], ["My answer is No", "no"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* **b**"], ["**a**", "** ** *b*"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1 a Section 2 b"],
        ["Section 1", "Section a Section b"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n{"a": 1}\n```', "9" * 9999], ["{a: 1}", "[" * 9999]),
    ("detectable_format:title", {}, ["<<a>>\nb"], ["<< >>", "<<a\n>>", "<a>"]),
    ("combination:two_responses", {}, ["a******b"], ["a", "a******a", "a******b******c", "a************b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say a"}, ["say A\nb"], ["a. say a"]),
    ("startend:end_checker", {"end_phrase": "The End."}, ["so, the end.", 'so, "the end."'], ["the end"]),
    ("startend:quotation", {}, ['"a"'], ['"a', '"', "'a'"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["A TOP-NOTCH one", "AB CD"],
        ["AB cd", "Ab Cd"],
    ),
    ("change_case:english_capital", {}, ["ALL UP, 1."], ["Not", "ПРИВЕТ", "123", "GUTEN TAG UND AUF WIEDERSEHEN"]),
    ("change_case:english_lowercase", {}, ["all low, 1."], ["Not", "привет", "123", "bonjour tout le monde"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
    (
        "language:response_language",
        {"language": "uk"},
        ["Кішка сиділа на килимку і дивилася на місяць.", "ДУЖЕ ДЯКУЮ ЗА ДОПОМОГУ"],
        [
            "The cat sat on the mat and looked at the moon.",
            "Die Katze saß auf der Matte.",
            "猫坐在垫子上看着月亮。",
            "123 😀",
        ],
    ),
    (
        "language:response_language",
        {"language": "zh-cn"},
        ["猫坐在垫子上看着月亮。"],
        ["猫はマットの上に座って月を見た。"],
    ),
]
CASES = IFEVAL + IFBENCH + IFTRAIN


@pytest.mark.parametrize(("name", "kwargs", "hold", "fail"), CASES, ids=[case[0] for case in CASES])
def test_each_instruction(name: str, kwargs: dict[str, Any], hold: list[str], fail: list[str]) -> None:
    for response in hold:
        assert follows(response, (name, kwargs)) == 1.0, response
    for response in fail:
        assert follows(response, (name, kwargs)) == 0.0, response
        assert follows(f"<think>{hold[0]}</think>{response}", (name, kwargs)) == 0.0


def test_every_instruction_is_tried() -> None:
    assert {case[0] for case in CASES} == set(checks)


def test_the_docs_list_every_instruction() -> None:
    section = (
        (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8").partition("## Instructions")[2]
    )
    listed = {
        f"{group}:{name}"
        for group, names in re.findall(r"`([\w-]+):` ([\w, -]+)", section)
        for name in names.split(", ")
    }
    assert {name.strip() for name in listed} == set(checks)


def test_all_must_hold_and_an_empty_response_follows_nothing() -> None:
    comma, quote = ("punctuation:no_comma", {}), ("startend:quotation", {})
    assert follows('"a"', comma, quote) == 1.0
    assert follows('"a, b"', comma, quote) == 0.0
    assert follows("a", comma, quote, rm_type="ifbench") == 0.0
    assert follows(" ", comma) == 0.0
    assert follows("<think>a", comma) == 0.0


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("a", 1), ("A b. C d!", 2), ("Dr. J. Li came (late). Why?", 2), ("Wait... what?!", 2), ("你好。再见！", 2), ("他说「你好」 了。", 1), ("Steps\n1. Go.\n2. Stop.", 2), ("It is 1. Then 2.", 2), (". . .", 0), ("3.5 is it.", 1), ('"Go." He went.', 2)],
)  # fmt: skip
def test_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "instruction_id_list, got None: it must be a list of ids"),
        ({"instruction_id_list": ["punctuation:no_coma"]}, "has this id; did you mean punctuation:no_comma?"),
        ({"instruction_id_list": [7]}, "got 7: none of the 112 instructions has this id; leave the row out"),
        (row("language:response_language", language="xx"), "language 'xx' is not among the ISO 639 codes ar, bg"),
        (row("count:numbers", N=2.5), "N must be a whole number"),
        (row("count:numbers", N=-1), "N must be a whole number"),
        (row("count:words_japanese", N=0), "N must be at least 1"),
        (row("sentence:keyword", N=0, word="a"), "positions are counted from 1"),
        (row("keywords:word_once", keyword=" "), "a keyword is empty"),
        (row("format:options", options=","), "options name nothing"),
        (row("format:list", sep=" "), "sep is empty"),
        (row("copy:repeat_phrase", phrase="a b", small_n=2), "phrase has no word between"),
        (row("first_word:first_word_sent", first_word=["a", "b"]), "first_word must be a word"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}, {}]}, "a dict for each instruction"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": ["x"]}, "they must be a dict"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"n": 1}]}, "unexpected keyword argument 'n'"),
        ({"instruction_id_list": ["keywords:existence"]}, "missing a required argument: 'keywords'"),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "ab"}]},
            "keywords must be a list of words",
        ),
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 1, "relation": "<"}]},
            "relation '<' is neither",
        ),
    ],
)
def test_a_row_that_cannot_be_checked_is_found_at_launch(metadata: dict[str, Any], message: str) -> None:
    required = label_required(make_config(rm_type="ifeval"))
    with pytest.raises(ConfigError) as caught:
        required(metadata)
    assert message in str(caught.value)


def test_arguments_that_are_null_are_those_of_other_instructions() -> None:
    metadata = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None, "keywords": None}]}
    assert [check("a") for _, check in bound_checks(metadata)] == [True]
    assert label_required(make_config(rm_type="ifeval"))(metadata) is False
    assert bound_checks({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]})[0][1]("a")


@pytest.mark.parametrize(
    "text", ["", "\n", "\ud800", "\x00", "\ufeff", "²", "İ", "\u2028", "'", "***", "١٢٣", "😀\u200d", "。"]
)
def test_every_instruction_judges_every_text(text: str) -> None:
    for name, kwargs, hold, _ in CASES:
        [(_, check)] = bound_checks(row(name, **kwargs))
        assert {type(check(odd)) for odd in (text, text + hold[0], hold[0] + text)} == {bool}, name


#: The cat sat on the mat and looked at the moon, in the languages that IFEval asks for.
CAT = {
    "en": "The cat sat on the mat and looked at the moon.",
    "es": "El gato se sentó en la alfombra y miró la luna.",
    "pt": "O gato sentou-se no tapete e olhou para a lua.",
    "ar": "جلست القطة على السجادة ونظرت إلى القمر.",
    "hi": "बिल्ली चटाई पर बैठी और चाँद को देखा।",
    "fr": "Le chat est assis sur le tapis et regarde la lune.",
    "ru": "Кошка сидела на коврике и смотрела на луну.",
    "de": "Die Katze saß auf der Matte und sah den Mond an.",
    "ja": "猫はマットの上に座って月を見た。",
    "it": "Il gatto si sedette sul tappeto e guardò la luna.",
    "bn": "বিড়ালটি মাদুরের উপর বসে চাঁদের দিকে তাকাল।",
    "uk": "Кішка сиділа на килимку і дивилася на місяць.",
    "th": "แมวนั่งบนเสื่อและมองดูดวงจันทร์",
    "ur": "بلی چٹائی پر بیٹھی اور چاند کو دیکھا۔",
    "ta": "பூனை பாயில் அமர்ந்து நிலவைப் பார்த்தது.",
    "te": "పిల్లి చాప మీద కూర్చుని చంద్రుడిని చూసింది.",
    "bg": "Котката седеше на килима и гледаше луната.",
    "ko": "고양이가 매트 위에 앉아 달을 바라보았다.",
    "pl": "Kot usiadł na macie i spojrzał na księżyc.",
    "he": "החתול ישב על השטיח והביט בירח.",
    "fa": "گربه روی فرش نشست و به ماه نگاه کرد.",
    "vi": "Con mèo ngồi trên thảm và nhìn lên mặt trăng.",
    "ne": "बिरालो चटाईमा बस्यो र चन्द्रमालाई हेर्यो।",
    "sw": "Paka alikaa kwenye mkeka na kuangalia mwezi.",
    "kn": "ಬೆಕ್ಕು ಚಾಪೆಯ ಮೇಲೆ ಕುಳಿತು ಚಂದ್ರನನ್ನು ನೋಡಿತು.",
    "mr": "मांजर चटईवर बसली आणि चंद्राकडे पाहिले.",
    "gu": "બિલાડી સાદડી પર બેઠી અને ચંદ્ર તરફ જોયું.",
    "pa": "ਬਿੱਲੀ ਚਟਾਈ ਤੇ ਬੈਠੀ ਅਤੇ ਚੰਦ ਵੱਲ ਦੇਖਿਆ।",
    "ml": "പൂച്ച പായയിൽ ഇരുന്നു ചന്ദ്രനെ നോക്കി.",
    "fi": "Kissa istui matolla ja katsoi kuuta.",
    "zh": "猫坐在垫子上看着月亮。",
}


@pytest.mark.parametrize("code", CAT)
def test_a_sentence_is_in_its_language_and_in_none_that_is_not_near(code: str) -> None:
    near = {"ru": {"bg"}}.get(code, set())
    assert {other for other in CAT if speaks(CAT[code], other)} == {code} | near
    assert speaks(CAT[code].upper(), code)


def test_short_english_is_english() -> None:
    assert all(speaks(text, "en-US") for text in ("Yes", "HELLO WORLD", "An example.", "my answer is yes."))


@pytest.mark.parametrize("piece", ['."', "[", "*", "<", "P.", "A-", "。", "1,", "<<a ", "\n* a\u0301"])
def test_long_texts_are_read_in_linear_time(piece: str) -> None:
    """A quadratic reader would take minutes, beyond the limit of a test."""
    text = piece * (100_000 // len(piece)) + "p"
    for name, kwargs, _, _ in CASES:
        follows(text, (name, kwargs))
