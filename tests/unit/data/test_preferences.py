"""Preference files: pairs and judged answers, as text and as messages, and what is refused of them."""

import dataclasses
import json

import pytest

from miles.data import ConversationFormat, RolloutDataSource, load_judged, load_pairs
from miles.errors import DataError
from miles.types import MARGIN, Status


@pytest.fixture
def form(tokenizer_dir):
    """The tokenizer has one token a character; `~` ends a text, and a turn."""
    from miles.data import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.eos_token = "~"
    tokenizer.chat_template = (
        "{%- for m in messages -%}<{{ m['role'] }}>{{ m['content'] }}"
        "{%- if m['role'] == 'assistant' -%}~{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
    )
    return ConversationFormat(tokenizer, max_tokens=None)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def user(content):
    return {"role": "user", "content": content}


def answer(content):
    return {"role": "assistant", "content": content}


def seen(data, form):
    """(prompt, response, reward) of every answer, as text."""
    decode = form.tokenizer.decode
    return [
        (decode(a.tokens[: len(a.tokens) - len(a.loss_mask)]), decode(a.tokens[-len(a.loss_mask) :]), a.reward)
        for prompt in data.prompts
        for a in prompt.answers
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2=", "chosen": "4", "rejected": "22"},
        {"chosen": "2+2=4", "rejected": "2+2=22"},
    ],
)
def test_text_ends_with_the_end_token(tmp_path, form, row):
    assert seen(load_pairs(write(tmp_path / "a.jsonl", row), form), form) == [("2+2=", "4~", 1.0), ("2+2=", "22~", 0.0)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("2+2=")], "chosen": [answer("4")], "rejected": [answer("22")]},
        {"prompt": [user("2+2=")], "chosen": "4", "rejected": "22"},
        {"chosen": [user("2+2="), answer("4")], "rejected": [user("2+2="), answer("22")]},
    ],
)
def test_messages_go_through_the_template(tmp_path, form, row):
    expected = [("<user>2+2=<assistant>", "4~", 1.0), ("<user>2+2=<assistant>", "22~", 0.0)]
    assert seen(load_pairs(write(tmp_path / "a.jsonl", row), form), form) == expected


@pytest.mark.parametrize("prompt", ["2+2=", [user("2+2=")]])
def test_an_answer_that_repeats_the_prompt_is_asked_once(tmp_path, form, prompt):
    row = {"prompt": prompt, "chosen": [user("2+2="), answer("4")], "rejected": [user("2+2="), answer("22")]}
    expected = [("<user>2+2=<assistant>", "4~", 1.0), ("<user>2+2=<assistant>", "22~", 0.0)]
    assert seen(load_pairs(write(tmp_path / "a.jsonl", row), form), form) == expected
    judged = {"prompt": prompt, "completion": row["chosen"], "label": True}
    assert seen(load_judged(write(tmp_path / "b.jsonl", judged), form), form) == expected[:1]


def test_the_column_of_prompts(tmp_path, form):
    """Named, it has to be there; else it is `prompt` or `input`."""
    answers = {"chosen": "xb", "rejected": "xc"}
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "input": "i", **answers}, {"input": "i", **answers}, answers)

    def prompts(**flags):
        return [prompt for prompt, _, _ in seen(load_pairs(path, dataclasses.replace(form, **flags)), form)[::2]]

    assert prompts() == ["p", "i", "x"]
    with pytest.raises(DataError, match=r"a\.jsonl:3, got columns .*: no 'input' among them"):
        prompts(input_key="input")
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "input": "i", **answers})
    assert prompts(input_key="input") == ["i"]


def test_metadata_named_as_our_columns_is_free(tmp_path, form):
    free = {"margin": "wide", "channel": ["web"]}
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "?", "metadata": free | {MARGIN: 1}}
    assert load_pairs(write(tmp_path / "a.jsonl", row), form).prompts[0].metadata == free


def test_text_is_rendered_on_request_and_turns_in_common_are_asked(tmp_path, form):
    templated = dataclasses.replace(form, apply_chat_template=True)
    row = {"prompt": "2+2=", "chosen": "4", "rejected": "22"}
    assert seen(load_pairs(write(tmp_path / "a.jsonl", row), templated), form)[0] == (
        "<user>2+2=<assistant>",
        "4~",
        1.0,
    )
    talk = [user("a"), answer("b"), user("c")]
    row = {"chosen": [*talk, answer("d")], "rejected": [*talk, answer("e"), user("f"), answer("g")]}
    found = seen(load_pairs(write(tmp_path / "b.jsonl", row), form), form)
    assert [response for _, response, _ in found] == ["d~", "e~<user>f<assistant>g~"]
    assert {prompt for prompt, _, _ in found} == {"<user>a<assistant>b~<user>c<assistant>"}


def test_parquet_and_other_columns(tmp_path, form):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"ask": "x", "chosen": [answer("y")], "rejected": [answer("z")], "margin": 0.5}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    data = load_pairs(str(tmp_path / "a.parquet"), dataclasses.replace(form, input_key="ask"), with_margins=True)
    assert [response for _, response, _ in seen(data, form)] == ["y~", "z~"]
    assert data.prompts[0].metadata == {MARGIN: 0.5}


@pytest.mark.parametrize(("label", "reward"), [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0)])
def test_judged_answers(tmp_path, form, label, reward):
    path = write(tmp_path / "a.jsonl", {"prompt": "2+2=", "completion": "4", "label": label, "good": not label})
    assert seen(load_judged(path, form), form) == [("2+2=", "4~", reward)]
    assert seen(load_judged(path, form, "good"), form) == [("2+2=", "4~", 1 - reward)]


def test_rows_that_are_too_long(tmp_path, form):
    short, long = (
        {"prompt": "12", "chosen": "3", "rejected": "4"},
        {"prompt": "12", "chosen": "3", "rejected": "45678"},
    )
    path = write(tmp_path / "a.jsonl", short, long)
    with pytest.raises(DataError, match=r"a\.jsonl:2, got 8 tokens: --seq-length is 5"):
        load_pairs(path, dataclasses.replace(form, max_tokens=5))
    dropped = load_pairs(path, dataclasses.replace(form, max_tokens=5, overlong="drop"))
    assert (len(dropped.prompts), dropped.skipped) == (1, 1)
    cut = load_pairs(path, dataclasses.replace(form, max_tokens=5, overlong="truncate"))
    assert seen(cut, form)[2:] == [("12", "3~", 1.0), ("12", "456", 0.0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"got None in 'rejected': there is no answer"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, r"got '' in 'chosen': there is no answer"),
        ({"chosen": "b", "rejected": "c"}, "begin differently"),
        ({"chosen": [user("a"), answer("b")], "rejected": [user("c"), answer("d")]}, "answer different prompts"),
        ({"chosen": [user("a"), answer("b")], "rejected": "c"}, "in one form"),
        ({"chosen": ["a"], "rejected": [user("c"), answer("d")]}, r"got \['a'\] in 'chosen': a conversation"),
        (
            {"prompt": "a", "chosen": [user("A"), answer("b")], "rejected": "c"},
            "a turn of the user in 'chosen' that is not",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": [user("a")]}, "got the prompt alone in 'rejected'"),
        ({"prompt": 7, "chosen": "b", "rejected": "c"}, "got 7 in 'prompt': a conversation is"),
        ({"prompt": "a", "chosen": 7, "rejected": "c"}, "got 7 in 'chosen': a conversation is"),
        ({"chosen": "a\ud800b", "rejected": "a\ud800c"}, "half of a surrogate pair"),
        ({"prompt": "a", "chosen": [answer("b") | {"loss_scale": 0.5}], "rejected": "c"}, "loss_scale in 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "got 'x' in 'margin': a margin is a finite"),
    ],
)
def test_rows_that_are_no_pairs(tmp_path, form, row, message):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}, row)
    with pytest.raises(DataError, match=r"a\.jsonl:2, .*" + message):
        load_pairs(path, form, with_margins=True)


def test_texts_without_a_prompt_cannot_be_rendered(tmp_path, form):
    path = write(tmp_path / "a.jsonl", {"chosen": "ab", "rejected": "ac"})
    with pytest.raises(DataError, match="nothing to ask with"):
        load_pairs(path, dataclasses.replace(form, apply_chat_template=True))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "got None in 'label': an answer is good"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "got 'yes' in 'label'"),
        ({"prompt": "a", "completion": "b", "label": 2}, "got 2 in 'label'"),
        ({"completion": "b", "label": 1}, "no 'prompt' among them"),
        ({"prompt": "a", "label": 1}, "got None in 'completion'"),
    ],
)
def test_rows_that_are_not_judged(tmp_path, form, row, message):
    with pytest.raises(DataError, match=r"a\.jsonl:1, .*" + message):
        load_judged(write(tmp_path / "a.jsonl", row), form)


def test_a_pair_is_a_group_of_two_finished_samples(tmp_path, form):
    rows = [{"prompt": str(i), "chosen": "b", "rejected": "c"} for i in range(3)]
    data = load_pairs(write(tmp_path / "a.jsonl", *rows), form)
    source = RolloutDataSource(data, n_samples_per_prompt=1, shuffle=False, seed=0)
    groups = source.get_samples(2)
    assert [[s.reward for s in group] for group in groups] == [[1.0, 0.0]] * 2
    assert [s.index for group in groups for s in group] == [0, 1, 2, 3]
    assert all(s.status is Status.COMPLETED and s.trajectory_id is None for group in groups for s in group)
    assert [s.response for s in groups[1]] == ["b~", "c~"]


def test_the_fingerprint_knows_labels(tmp_path, form):
    rows = ({"prompt": "a", "completion": "b", "label": label} for label in (True, False))
    assert len({load_judged(write(tmp_path / "a.jsonl", row), form).fingerprint for row in rows}) == 2


def test_the_fingerprint_knows_both_answers(tmp_path, form):
    def fingerprint(**change):
        row = {"prompt": "a", "chosen": "b", "rejected": "c", **change}
        return load_pairs(write(tmp_path / "a.jsonl", row), form).fingerprint

    assert fingerprint() == fingerprint()
    swapped = fingerprint(chosen="c", rejected="b")
    assert len({fingerprint(), fingerprint(chosen="d"), fingerprint(rejected="d"), swapped}) == 4
