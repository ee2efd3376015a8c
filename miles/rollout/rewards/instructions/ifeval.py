"""The instructions of IFEval."""

from __future__ import annotations

import json
import re

from .catalogue import compare, instruction
from .language import speaks
from .text import count_keyword, count_runs, count_sentences, paragraphs, words

# -------------------------------------------------------------------------------------------------------------- keywords


@instruction("keywords:existence")
def has_keywords(text: str, *, keywords: list[str]) -> bool:
    return all(keyword.lower() in text.lower() for keyword in keywords)


@instruction("keywords:frequency")
def keyword_frequency(text: str, *, keyword: str, frequency: float, relation: str) -> bool:
    return compare(text.lower().count(keyword.strip().lower()), relation, frequency)


@instruction("keywords:forbidden_words")
def has_no_forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
    return not any(count_keyword(text, word) for word in forbidden_words)


@instruction("keywords:letter_frequency")
def letter_frequency(text: str, *, letter: str, let_frequency: float, let_relation: str) -> bool:
    return compare(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


# ---------------------------------------------------------------------------------------------------------------- length


@instruction("length_constraints:number_sentences")
def number_of_sentences(text: str, *, num_sentences: float, relation: str) -> bool:
    return compare(count_sentences(text), relation, num_sentences)


@instruction("length_constraints:number_words")
def number_of_words(text: str, *, num_words: float, relation: str) -> bool:
    return compare(count_runs(text), relation, num_words)


@instruction("length_constraints:number_paragraphs")
def number_of_paragraphs(text: str, *, num_paragraphs: float) -> bool:
    """Paragraphs are parted by `***`; one that is empty breaks the rule, unless it is the first or the last."""
    parts = paragraphs(text, "***")
    return parts is not None and len(parts) == num_paragraphs


@instruction("length_constraints:nth_paragraph_first_word")
def nth_paragraph_first_word(text: str, *, num_paragraphs: float, nth_paragraph: float, first_word: str) -> bool:
    """Paragraphs are parted by an empty line."""
    parts = [part.strip() for part in text.split("\n\n")]
    full = [part for part in parts if part]
    if len(full) != num_paragraphs or not 1 <= nth_paragraph <= len(full):
        return False
    word = full[int(nth_paragraph) - 1].split()[0].lstrip("'\"").lower()
    return re.split(r"[.,?!'\"]", word)[0] == first_word.lower()


# ------------------------------------------------------------------------------------------------------ content and format


@instruction("detectable_content:number_placeholders")
def number_of_placeholders(text: str, *, num_placeholders: float) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


@instruction("detectable_content:postscript")
def has_postscript(text: str, *, postscript_marker: str) -> bool:
    known = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    pattern = known.get(postscript_marker.strip(), re.escape(postscript_marker.strip().lower()))
    return re.search(pattern, text.lower()) is not None


@instruction("detectable_format:number_bullet_lists")
def number_of_bullets(text: str, *, num_bullets: float) -> bool:
    """Lines that begin with `-`, or with one `*`."""
    lines = [line.strip() for line in text.split("\n")]
    return sum(re.match(r"-|\*[^*]", line) is not None for line in lines) == num_bullets


@instruction("detectable_format:constrained_response")
def is_constrained(text: str) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


@instruction("detectable_format:number_highlighted_sections")
def number_of_highlights(text: str, *, num_highlights: float) -> bool:
    """`*so*` or `**so**`, within a line and not empty."""
    found = re.findall(r"\*\*([^\n*]*)\*\*|\*([^\n*]*)\*", text)
    return sum(bool((double or single).strip()) for double, single in found) >= num_highlights


@instruction("detectable_format:multiple_sections")
def number_of_sections(text: str, *, section_spliter: str, num_sections: float) -> bool:
    """`Section 1`, `Section 2`, ... with the data set's own word."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


@instruction("detectable_format:json_format")
def is_json(text: str) -> bool:
    """The whole response, with or without a code fence."""
    text = re.sub(r"^```(?:json)?", "", text.strip(), flags=re.IGNORECASE).removesuffix("```")
    try:
        json.loads(text, parse_int=lambda digits: None)
    except (ValueError, RecursionError):
        return False
    return True


@instruction("detectable_format:title")
def has_title(text: str) -> bool:
    """`<<so>>`, within a line and not empty."""
    for line in text.split("\n"):
        start = line.find("<<")
        end = line.rfind(">>")
        if 0 <= start < end and line[start:end].strip("<> "):
            return True
    return False


# ----------------------------------------------------------------------------------------- combination, start, end, case


@instruction("combination:two_responses")
def has_two_responses(text: str) -> bool:
    """Two different ones, parted by six asterisks."""
    parts = paragraphs(text, "******") or []
    return len(parts) == len(set(parts)) == 2


@instruction("combination:repeat_prompt")
def repeats_the_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@instruction("startend:end_checker")
def ends_with(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@instruction("startend:quotation")
def is_quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@instruction("change_case:capital_word_frequency")
def capital_words(text: str, *, capital_frequency: float, capital_relation: str) -> bool:
    return compare(sum(word.isupper() for word in words(text)), capital_relation, capital_frequency)


@instruction("change_case:english_capital")
def is_upper_case(text: str) -> bool:
    return text.isupper() and speaks(text, "en")


@instruction("change_case:english_lowercase")
def is_lower_case(text: str) -> bool:
    return text.islower() and speaks(text, "en")


@instruction("punctuation:no_comma")
def has_no_comma(text: str) -> bool:
    return "," not in text


@instruction("language:response_language")
def is_in_language(text: str, *, language: str) -> bool:
    return speaks(text, language)
