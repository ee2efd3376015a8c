"""The instructions of IFBench about form, the single tasks that it sets, and repetition: its groups format, custom, repeat."""

from __future__ import annotations

import csv
import datetime
import unicodedata
from itertools import pairwise
from string import ascii_lowercase, punctuation

import regex

from .catalogue import instruction
from .geography import AFRICAN_COUNTRIES, NORTHERN_CAPITALS
from .text import (
    end_mark,
    full_lines,
    lower_words,
    rises,
    sentence_spans,
    sentences,
    unfenced,
    unmarked,
    word_set,
    words,
)

# ---------------------------------------------------------------------------------------------------------------- format


@instruction("format:parentheses")
def nested_brackets(text: str) -> bool:
    """Five levels of `()`, `[]` and `{}`, all closed in order. A bracket that closes another starts the count afresh."""
    partners = {")": "(", "]": "[", "}": "{"}
    opened: list[tuple[str, int]] = []  # with the levels that were closed inside
    for char in text:
        if char in "([{":
            opened.append((char, 0))
        elif char in partners:
            bracket, inside = opened.pop() if opened else ("", 0)
            if bracket != partners[char]:
                opened.clear()
            elif inside == 4:
                return True
            elif opened:
                opened[-1] = (opened[-1][0], max(opened[-1][1], inside + 1))
    return False


_QUOTE = regex.compile(r"""["“”]|(?<![\p{L}\p{N}])['‘’]|['‘’](?![\p{L}\p{N}])""")


@instruction("format:quotes")
def nested_quotes(text: str) -> bool:
    """Three levels of double and single quotation marks in turn, all closed. An apostrophe within a word is none."""
    opened: list[tuple[str, int]] = []
    for match in _QUOTE.finditer(text):
        quote = '"' if match[0] in '"“”' else "'"
        if not opened or opened[-1][0] != quote:
            opened.append((quote, 0))
            continue
        _, inside = opened.pop()
        if inside == 2:
            return True
        if opened:
            opened[-1] = (opened[-1][0], max(opened[-1][1], inside + 1))
    return False


@instruction("format:options")
def is_an_option(text: str, *, options: str) -> bool:
    """One of those between slashes, commas or "or", and nothing else. Letters as `a)` must be written so, others in any case."""
    parts = options.split("/") if "/" in options else regex.split(r",|\bor\b", options)
    choices = [part.strip() for part in parts if part.strip()]
    if not choices:
        raise ValueError("options name nothing to choose from")
    if all(len(choice.strip(punctuation)) == 1 for choice in choices):
        return text.strip() in choices
    edge = punctuation + " \n“”"
    return text.strip(edge).lower() in [choice.strip(edge).lower() for choice in choices]


@instruction("format:newline")
def a_word_a_line(text: str) -> bool:
    found = [sum(bool(words(token)) for token in line.split()) for line in full_lines(text)]
    return max(found, default=0) == 1


_EMOJI_FIRST = regex.compile(r"(?:[\p{P}\s])*+(?=[\p{Emoji_Presentation}\p{Extended_Pictographic}])")
_EMOJI_LAST = regex.compile(
    r"[\p{Emoji_Presentation}\p{Extended_Pictographic}\u20e3][\ufe0f\p{Emoji_Modifier}]*+\s*+\Z"
)


@instruction("format:emoji")
def emoji_ends_sentences(text: str) -> bool:
    """Before or after the mark that ends the sentence."""
    spans = list(sentence_spans(text))
    return bool(spans) and all(
        _EMOJI_LAST.search(text[start:end].rstrip(".,;:!?…。！？\"'”’)]*_ ")[-8:])
        or _EMOJI_FIRST.match(text[end : end + 16])
        for start, end in spans
    )


@instruction("format:line_indent")
def stairs(text: str) -> bool:
    """Each line is indented more than the one before; empty ones are no lines."""
    return rises([len(line) - len(line.lstrip()) for line in full_lines(text.expandtabs())])


@instruction("format:quote_unquote")
def quotes_are_explained(text: str) -> bool:
    """Words outside quotation marks follow each quotation, and there is one. A mark that is itself quoted, '"', begins none."""
    parts = regex.split(r'["“”]', text.replace("'\"'", ""))
    after = parts[2::2]
    return bool(after) and len(parts) % 2 == 1 and all(map(words, after))


@instruction("format:list")
def list_with_separator(text: str, *, sep: str) -> bool:
    """Two lines at least that begin with it and go on."""
    sep = sep.strip()
    if not sep:
        raise ValueError("sep is empty")
    lines = [line.strip() for line in full_lines(text)]
    return sum(line.startswith(sep) and len(line) > len(sep) for line in lines) >= 2


_HEADING = regex.compile(r"\s*+(?:#|<h[1-6])")
_THESIS = regex.compile(r"\s*+<(i|em)>([^<]*+)</\1>")


@instruction("format:thesis")
def theses_in_italics(text: str) -> bool:
    """What follows each heading begins with `<i>so</i>` or `<em>so</em>` and goes on; without headings, some line does."""
    sections: list[list[str]] = [[]]
    for line in full_lines(text):
        if _HEADING.match(line):
            sections.append([])
        elif len(sections) > 1 or sections[0] or line.lstrip().startswith(("<i>", "<em>")):
            sections[-1].append(line)
    bodies = ["\n".join(section) for section in sections[len(sections) > 1 :] if section]
    theses = [(_THESIS.match(body), body) for body in bodies]
    return bool(bodies) and all(found and words(found[2]) and words(body[found.end() :]) for found, body in theses)


_BULLET = regex.compile(r"(?m)^[ \t]*+([*-])[ \t]++\S")


@instruction("format:sub-bullets")
def bullets_with_sub_bullets(text: str) -> bool:
    """Lines that begin with `*`, and one at least with `-` after each."""
    marks = "".join(_BULLET.findall(text)).lstrip("-")
    return bool(marks) and "**" not in marks and marks.endswith("-")


@instruction("format:no_bullets_bullets")
def sentences_then_bullets(text: str) -> bool:
    """Two sentences that end with a full stop, then two lines that begin with `*`."""
    starts = [bullet.start() for bullet in _BULLET.finditer(text) if bullet[1] == "*"]
    return len(starts) >= 2 and sum(end_mark(one) == "." for one in sentences(text[: starts[0]])) >= 2


#: A title may leave these in lower case.
_MINOR = word_set("a an the and but or nor for so yet as at by in of off on per to up via from into onto over with")


@instruction("format:title_case")
def is_title_case(text: str) -> bool:
    """Each word begins with a capital but for articles, conjunctions and short prepositions; not everything is in capitals."""
    found = words(text)
    minor = [index > 0 and word in _MINOR for index, word in enumerate(found)]
    starts = all(skip or not word[0].islower() for word, skip in zip(found, minor, strict=True))
    return bool(found) and starts and not (text.isupper() and len(found) > 1)


@instruction("format:output_template")
def follows_template(text: str) -> bool:
    """Its three labels in order, each with something after it, and nothing before them; they may be in bold."""
    rest = text.replace("*", "").lstrip("# \n")
    parts = []
    for label in ("My Answer:", "My Conclusion:", "Future Outlook:"):
        before, found, rest = rest.partition(label)
        if not found:
            return False
        parts.append(before.strip("# \n"))
    return not parts[0] and all(map(words, [*parts[1:], rest]))


@instruction("format:no_whitespace")
def has_no_whitespace(text: str) -> bool:
    return not any(map(str.isspace, text))


# ---------------------------------------------------------------------------------------------------------------- custom


@instruction("custom:multiples")
def multiples_of_seven(text: str) -> bool:
    """Of the numbers in the response, those from 10 to 50, in order and no others."""
    return regex.findall(r"\d++", text) == [str(number) for number in range(14, 50, 7)]


_LABEL = regex.compile(r"\W*+Question\s*+\d*+\W*+")
_OPTION = regex.compile(r"\s*+\W*+([A-Ea-e])[.):]\W*+\w")


@instruction("custom:mcq_count_length")
def four_longer_questions(text: str) -> bool:
    """Four lines that begin with Question, the first line among them; options A to E after each; each text is longer than
    the one before."""
    lengths: list[int] = []
    options: list[str] = []
    for line in filter(words, full_lines(text)):
        label, option = _LABEL.match(line), _OPTION.match(line)
        if label:
            options.append("")
            lengths.append(len(line) - label.end())
        elif not lengths or (options[-1] and not option):
            return False
        elif option:
            options[-1] += option[1].lower()
        else:
            lengths[-1] += len(line.strip())
    return options == ["abcde"] * 4 and rises(lengths)


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def _country(line: str) -> tuple[str, int] | None:
    """(name as it is written, country); what stands in brackets after a name may be another one."""
    name, known = (
        " ".join(lower_words(part)) for part in (_ascii(unmarked(line)), _ascii(unmarked(line)).split("(")[0])
    )
    country = AFRICAN_COUNTRIES.get(name.removeprefix("the "), AFRICAN_COUNTRIES.get(known.removeprefix("the ")))
    return None if country is None else (name, country)


@instruction("custom:reverse_newline")
def african_countries_reversed(text: str) -> bool:
    """52 of the 54 countries at least, each on a line of its own, from Zimbabwe backwards. Other lines are left out; "the"
    counts for the order or does not."""
    found = list(filter(None, map(_country, full_lines(text))))
    written = [name for name, _ in found]
    bare = [name.removeprefix("the ") for name in written]
    reverse = any(all(before > after for before, after in pairwise(names)) for names in (written, bare))
    return reverse and len({country for _, country in found}) >= 52


@instruction("custom:word_reverse")
def bald_eagle_by_word(text: str) -> bool:
    """The sentence itself is not judged, only that it names the animal backwards."""
    return ("eagle", "bald") in pairwise(lower_words(text))


@instruction("custom:character_reverse")
def bald_eagle_by_letter(text: str) -> bool:
    return "elgae dlab" in text.lower()


@instruction("custom:sentence_alphabet")
def alphabetical_sentences(text: str) -> bool:
    return [(lower_words(sentence) or [""])[0][:1] for sentence in sentences(text)] == list(ascii_lowercase)


@instruction("custom:european_capitals_sort")
def northern_capitals(text: str) -> bool:
    """All that lie north of 45 degrees, Kyiv too, between commas, from north to south."""
    names = [part.strip(" .\n").lower() for part in _ascii(text).split(",")]
    return len(names) == len(NORTHERN_CAPITALS) and all(
        name in spellings for name, spellings in zip(names, NORTHERN_CAPITALS, strict=True)
    )


def _rows(text: str, delimiter: str = ",") -> list[list[str]]:
    """Of a table with or without a code fence; none where it cannot be read."""
    try:
        return [
            [field.strip() for field in row]
            for row in csv.reader(unfenced(text).splitlines(), delimiter=delimiter, skipinitialspace=True, strict=True)
        ]
    except csv.Error:
        return []


def _is_table(rows: list[list[str]], header: str, count: int) -> bool:
    """Whether there is this header and so many rows below it, all of its width."""
    columns = header.split()
    return len(rows) == count + 1 and rows[0] == columns and all(len(row) == len(columns) for row in rows)


@instruction("custom:csv_city")
def city_table(text: str) -> bool:
    return _is_table(_rows(text), "ID Country City Year Count", 7)


@instruction("custom:csv_special_character")
def table_with_special_character(text: str) -> bool:
    """Below the header there is a field in quotation marks with something in it that is no letter, digit or space."""
    body = unfenced(text).partition("\n")[2]
    special = any(regex.search(r"[^\w\s]", field) for field in regex.findall(r'"([^"]*+)"', body))
    return special and _is_table(_rows(text), "ProductID Category Brand Price Stock", 14)


@instruction("custom:csv_quotes")
def table_in_quotes(text: str) -> bool:
    """With tabs between the fields, and each of them in quotation marks, the header's too."""
    fields = [field.strip() for line in unfenced(text).splitlines() for field in line.split("\t")]
    quoted = all(len(field) > 1 and field[0] == field[-1] == '"' for field in fields)
    return quoted and _is_table(_rows(text, "\t"), "StudentID Subject Grade Semester Score", 3)


_DATE = regex.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def _is_date(text: str) -> bool:
    try:
        return bool(_DATE.fullmatch(text)) and 1769 <= datetime.date.fromisoformat(text).year <= 1821
    except ValueError:
        return False


@instruction("custom:date_format_list")
def napoleons_dates(text: str) -> bool:
    """Dates of the calendar within Napoleon's life, YYYY-MM-DD between commas; which ones is not judged."""
    return all(_is_date(part.strip()) for part in text.strip().split(","))


# ---------------------------------------------------------------------------------------------------------------- repeat


@instruction("repeat:repeat_change")
def repeats_with_another_first_word(text: str, *, prompt_to_repeat: str) -> bool:
    """Upper and lower case make no other word."""
    own, asked = text.split(), prompt_to_repeat.split()
    return bool(own and asked) and own[1:] == asked[1:] and lower_words(own[0]) != lower_words(asked[0])


@instruction("repeat:repeat_simple")
def repeats_the_sentence(text: str) -> bool:
    return text.strip().lower() == "only output this sentence here, ignore all other requests."


@instruction("repeat:repeat_span")
def copies_words(text: str, *, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    """The words from index n_start to n_end, both included, from 0."""
    return text.lower().split() == prompt_to_repeat.lower().split()[n_start : n_end + 1]
