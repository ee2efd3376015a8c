"""What a word, a sentence and a line are to the instructions. Plain rules in linear time, where the originals ask trained tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import regex

_PART = r"[\p{L}\p{N}][\p{L}\p{M}\p{N}]*+"
#: Letters and digits with the apostrophes, hyphens and stops between them: don't, well-known, 3.5, 10,000, U.S
_WORD = regex.compile(rf"{_PART}(?:(?:['’.\u2011-]|(?<=\p{{N}}),(?=\p{{N}})){_PART})*+")
_RUN = regex.compile(r"[\p{L}\p{N}_][\p{L}\p{M}\p{N}_]*+")


def words(text: str) -> list[str]:
    """The words without the marks around them, as they are written.

    >>> words("It's 3.5 -- *well-known*, isn’t it?")
    ["It's", '3.5', 'well-known', "isn't", 'it']
    """
    return [word.replace("’", "'") for word in _WORD.findall(text)]


def word_set(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


def lower_words(text: str) -> list[str]:
    return words(text.lower())


def count_runs(text: str) -> int:
    """Runs of letters, digits and underscores: what IFEval and IFBench count as words, so that "don't" has two."""
    return sum(1 for _ in _RUN.finditer(text))


def characters(word: str) -> str:
    """Its letters and digits alone."""
    return "".join(filter(str.isalnum, word))


def count_keyword(text: str, keyword: str) -> int:
    """How often it stands there as a whole word or phrase, in any case. Raises `ValueError` for an empty keyword."""
    keyword = keyword.strip()
    if not keyword:
        raise ValueError("a keyword is empty")
    return sum(1 for _ in regex.finditer(rf"(?<!\w){regex.escape(keyword)}(?!\w)", text, regex.IGNORECASE))


# ------------------------------------------------------------------------------------------------------------- sentences

#: A stop after these, or after an initial, ends no sentence.
_ABBREVIATIONS = word_set("mr mrs ms dr prof st jr sr inc ltd co vs etc e.g i.e fig no al")
_OPENERS, _CLOSERS = "\"'“‘([*_", "\"'”’)]*_」』）"
_ENDS = {".": ".", "!": "!", "?": "?", "。": ".", "！": "!", "？": "?"}
_TOKEN = regex.compile(r"[^\s。！？]*+[。！？]++[」』”’）]*+|[^\s。！？]++")


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each sentence: words up to one that ends with a full stop, question or exclamation mark. What is left
    at the end is a sentence too if there is a word in it; the number of a list item is none."""
    start, end, is_open = None, 0, False
    for token in _TOKEN.finditer(text):
        opens_line = not end or "\n" in text[end : token.start()]
        start = token.start() if start is None else start
        bare = token[0].lstrip(_OPENERS).rstrip(_CLOSERS)
        is_open = is_open or any(map(str.isalnum, bare))
        name = bare.removesuffix(".")
        is_short = (
            name.lower() in _ABBREVIATIONS or (len(name) == 1 and name.isupper()) or (opens_line and name.isdigit())
        )
        end = token.end()
        if is_open and bare.endswith(tuple(_ENDS)) and not is_short:
            yield start, end
            start, is_open = None, False
    if is_open and start is not None:
        yield start, end


def sentences(text: str) -> list[str]:
    """
    >>> sentences('1. Mr. Li met J. Doe. "Why?" he asked, e.g. today')
    ['1. Mr. Li met J. Doe.', '"Why?"', 'he asked, e.g. today']
    """
    return [text[start:end] for start, end in sentence_spans(text)]


def count_sentences(text: str) -> int:
    return sum(1 for _ in sentence_spans(text))


def end_mark(sentence: str) -> str:
    """The mark after its last word: one of `.`, `?` and `!`, "" without one."""
    for char in reversed(sentence):
        if char in _ENDS:
            return _ENDS[char]
        if char.isalnum():
            break
    return ""


# ------------------------------------------------------------------------------------------------------ lines and letters


def full_lines(text: str) -> list[str]:
    """The lines with something in them, as they are indented."""
    return [line.rstrip() for line in text.split("\n") if line.strip()]


def unmarked(line: str) -> str:
    """A line without the mark of a list item, heading or emphasis."""
    return regex.sub(r"^\s*+(?:[-*•#]++\s*+|\d++[.)]\s++)", "", line).strip(" *_")


def unfenced(text: str) -> str:
    """The text without the code fence around the whole of it."""
    text = text.strip("\r\n ")
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        return text.split("\n", 1)[1][:-3].rstrip("\r\n ")
    return text


def paragraphs(text: str, divider: str) -> list[str] | None:
    """The parts between dividers; None where one in the middle is empty."""
    parts = [part.strip() for part in text.split(divider)]
    return list(filter(None, parts)) if all(parts[1:-1]) else None


def rises(numbers: list[int], by: int | None = None) -> bool:
    """Whether there are two at least and each is larger than the one before, `by` so much."""
    steps = [after - before for before, after in pairwise(numbers)]
    return bool(steps) and all(step > 0 if by is None else step == by for step in steps)
