r"""Are two mathematical answers the same?

    answer, label --canonical--> equal strings? --> numbers? words? lists, tuples, sets? --> math-verify (symbolic)

Everything left of math-verify is exact and takes microseconds: numbers are compared as `Fraction`s, so neither large
integers nor small values are lost to floating point, and a verdict reached there is final. What remains undecided needs
computer algebra, which can hang on model output and therefore runs in a worker that can be killed (`symbolic`).

Model text reaches a LaTeX grammar only, never `eval`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

#: True, False, or None where only computer algebra can tell.
Verdict = bool | None
Symbolic = Callable[[str, str], bool]

#: Longer answers are no numbers that anyone checks; also keeps below Python's limit of digits in an int.
_MAX_NUMBER_CHARS = 1000
_MAX_DEPTH = 8
_MAX_ELEMENTS = 64

_DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
_NUMBER = re.compile(rf"([+-]?)({_DECIMAL})")
_FRACTION = re.compile(rf"([+-]?)(\d*)\\frac\{{([+-]?{_DECIMAL})\}}\{{([+-]?{_DECIMAL})\}}")
_SLASH = re.compile(rf"([+-]?{_DECIMAL})/({_DECIMAL})")
_SCIENTIFIC = re.compile(
    rf"([+-]?)(?:({_DECIMAL})(?:\\times|\\cdot|\*))?10\^(?:\{{([+-]?\d{{1,3}})\}}|(\d))|([+-]?)({_DECIMAL})[eE]([+-]?\d{{1,3}})"
)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_WRAPPER = r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathit|mathsf|mbox|operatorname)"
_WHOLE_TEXT = re.compile(rf"{_WRAPPER}\s*\{{([^{{}}]*)\}}")
_JOINER = re.compile(rf"{_WRAPPER}\s*\{{\s*,?\s*(?:or|and)\s*\}}|\s(?:or|and)\s")
_UNIT_TEXT = re.compile(
    rf"^(.*[^\s{{(,])\s*{_WRAPPER}\s*\{{\s*([^{{}}]*?)\s*\}}\s*(\^\s*\{{?\s*\d\s*\}}?)?$", re.DOTALL
)
_UNIT_WORD = re.compile(rf"^([+-]?{_DECIMAL})\s+((?!pi\b)[A-Za-z]{{2,}})\s*(\^\s*\{{?\s*\d\s*\}}?)?$")
_PREFIX = re.compile(r"^\s*(\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?(?:\([a-z]\))?)\s*(?:=(?!=)|\\in\b)\s*")
_SPACES = re.compile(r"\\[ ,;:!>]|\\q?quad\b|\\space\b|~|\s+")


def canonical(text: str) -> str:
    r"""One spelling for answers that differ in typography alone.

    Removes spaces, `\left \right`, degree, dollar and percent signs and text wrappers; writes `\dfrac \tfrac` as
    `\frac`, `\frac12` as `\frac{1}{2}`, `\sqrt2` as `\sqrt{2}` and a plain `a/b` as a fraction. Keeps all braces, so
    that `\frac{12}{3}` and `\frac{1}{23}` stay apart.
    """
    text = _bare(text)
    if whole := _WHOLE_TEXT.fullmatch(text):
        text = whole.group(1)
    text = _SPACES.sub("", text)
    text = re.sub(rf"{_WRAPPER}\{{([^{{}}]*)\}}", r"\1", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", text)
    text = text.replace("{,}", ",")
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if slash := re.fullmatch(r"([+-]?)(\d+)/(\d+)", text):
        text = rf"{slash[1]}\frac{{{slash[2]}}}{{{slash[3]}}}"
    return text.removesuffix(".") if not text.endswith("..") else text


def _bare(text: str) -> str:
    """Without delimiters, sizing commands and signs that carry no meaning; spaces are kept."""
    text = text.strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right) and len(text) >= len(left) + len(right):
            text = text[len(left) : len(text) - len(right)].strip()
    text = text.replace("−", "-").replace("–", "-")
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])", "", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])|°", "", text)
    text = re.sub(r"\\?[$%]", "", text)
    return text.replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}").strip()


def number(text: str) -> Fraction | None:
    """The exact value of a canonical plain number, fraction, mixed number or power of ten; None for anything else."""
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    if match := _NUMBER.fullmatch(text):
        return _signed(match[1], Fraction(match[2]))
    if match := _FRACTION.fullmatch(text):
        top, bottom = Fraction(match[3]), Fraction(match[4])
        if bottom == 0 or (match[2] and top < 0):
            return None
        return _signed(match[1], (Fraction(match[2]) if match[2] else 0) + top / bottom)
    if match := _SLASH.fullmatch(text):
        bottom = Fraction(match[2])
        return Fraction(match[1]) / bottom if bottom else None
    if match := _SCIENTIFIC.fullmatch(text):
        sign, mantissa, exponent = (
            match[1] or match[5] or "",
            match[2] or match[6] or "1",
            match[3] or match[4] or match[7],
        )
        return _signed(sign, Fraction(mantissa) * Fraction(10) ** int(exponent))
    return None


def _signed(sign: str, value: Fraction | int) -> Fraction:
    return -Fraction(value) if sign == "-" else Fraction(value)


def compare(answer: str, label: str, symbolic: Symbolic | None = None, *, depth: int = 0) -> Verdict:
    """Whether `answer` is `label`; without `symbolic`, None where computer algebra would be needed."""
    a, b = canonical(answer), canonical(label)
    if not a or not b:
        return False
    if a == b:
        return True
    value_a, value_b = number(a), number(b)
    if value_a is not None and value_b is not None:
        return value_a == value_b
    if _is_choice(b):
        return a.strip("().") == b.strip("().")
    if (word := _word(label)) is not None:
        return (_word(answer) or a).casefold() == word.casefold()
    if depth < _MAX_DEPTH and (verdict := _compare_containers(answer, label, symbolic, depth)) is not _NO_CONTAINER:
        return verdict  # type: ignore[return-value]

    (answer, name_a), (label, name_b) = _without_prefix(answer), _without_prefix(label)
    if name_a and name_b and name_a.casefold() != name_b.casefold():
        return False
    (answer, unit_a), (label, unit_b) = _without_unit(answer), _without_unit(label)
    if unit_a and unit_b and unit_a != unit_b:
        return False
    if (name_a or name_b or unit_a or unit_b) and depth < _MAX_DEPTH:
        return compare(answer, label, symbolic, depth=depth + 1)
    return symbolic(a, b) if symbolic is not None else None


def _is_choice(text: str) -> bool:
    """A letter that names an option, as `C` or `(C)`."""
    return re.fullmatch(r"[A-Z]|\([A-Z]\)", text) is not None


def _word(text: str) -> str | None:
    """A text answer ("Evelyn", "no solution") with its spaces made single; None for anything with mathematics in it."""
    text = _bare(text)
    if whole := _WHOLE_TEXT.fullmatch(text):
        text = whole.group(1)
    text = " ".join(text.split()).removesuffix(".")
    return text if re.fullmatch(r"[A-Za-z][A-Za-z' -]+", text) else None


def _without_prefix(text: str) -> tuple[str, str | None]:
    r"""`x = 5` and `x \in [1, 2]` -> what is right of it, and the name."""
    match = _PREFIX.match(_bare(text))
    return (_bare(text)[match.end() :], match[1]) if match else (text, None)


def _without_unit(text: str) -> tuple[str, str | None]:
    r"""`5\text{ cm}` or `5 cm` -> the value, and the unit in lower case without a plural s."""
    match = _UNIT_TEXT.match(_bare(text)) or _UNIT_WORD.match(_bare(text))
    if match is None:
        return text, None
    unit = re.sub(r"[\s.]", "", match[2]).lower()
    power = re.sub(r"\D", "", match[3] or "")
    return match[1], (unit.removesuffix("s") if len(unit) > 2 else unit) + power


# ------------------------------------------------------------------------------------------- lists, tuples, sets

_NO_CONTAINER = object()
_OPENING = {"(": "tuple", "[": "tuple", r"\{": "set"}
_CLOSING = (")", "]", r"\}")


def _compare_containers(answer: str, label: str, symbolic: Symbolic | None, depth: int) -> object:
    a, b = split_container(answer), split_container(label)
    if a is None and b is None:
        return _NO_CONTAINER
    if a is None or b is None or a[0] != b[0]:
        # A set or an interval may be written in other ways (a union, an inequality); a list or tuple may not.
        brackets = (a or b)[0]  # type: ignore[index]
        return _NO_CONTAINER if a is None or (b is None and brackets) else False
    brackets, left, right = a[0], list(a[1]), list(b[1])

    def same(x: str, y: str) -> Verdict:
        return compare(x, y, symbolic, depth=depth + 1)

    if brackets == r"\{\}":
        left, right = _distinct(left, same), _distinct(right, same)
    if len(left) != len(right) or len(left) > _MAX_ELEMENTS:
        return False
    if brackets in ("", r"\{\}"):
        return _same_in_any_order(left, right, same)
    return _all([same(x, y) for x, y in zip(left, right, strict=True)])


def split_container(text: str) -> tuple[str, list[str]] | None:
    r"""(brackets, elements) of a tuple, interval, set or bare list at the top level of `text`; None for a scalar.

    >>> split_container("(1, 2]"), split_container(r"\{a\}"), split_container("3, 4"), split_container("(x+1)(x+2)")
    (('(]', ['1', '2']), ('\\{\\}', ['a']), ('', ['3', '4']), None)
    """
    text = _JOINER.sub(",", _bare(text)).replace("{,}", "")
    if _THOUSANDS.fullmatch(text):
        return None
    tokens = re.findall(r"\\[A-Za-z]+|\\.|.", text, re.DOTALL)
    if len(tokens) >= 2 and tokens[0] in _OPENING and tokens[-1] in _CLOSING and _encloses(tokens):
        elements = _split(tokens[1:-1])
        if len(elements) >= 2 or _OPENING[tokens[0]] == "set":
            return tokens[0] + tokens[-1], elements
        return None
    elements = _split(tokens)
    return ("", elements) if len(elements) >= 2 else None


def _depths(tokens: Sequence[str]) -> list[int]:
    """Nesting depth after each token."""
    depths, depth = [], 0
    for token in tokens:
        depth += (token in ("(", "[", "{", r"\{")) - (token in (")", "]", "}", r"\}"))
        depths.append(depth)
    return depths


def _encloses(tokens: Sequence[str]) -> bool:
    """Whether the first bracket is closed by the last token."""
    depths = _depths(tokens)
    return depths[-1] == 0 and all(d > 0 for d in depths[:-1])


def _split(tokens: Sequence[str]) -> list[str]:
    parts: list[str] = [""]
    for token, depth in zip(tokens, _depths(tokens), strict=True):
        if token == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts if part.strip()]


def _all(verdicts: Sequence[Verdict]) -> Verdict:
    if any(v is False for v in verdicts):
        return False
    return None if any(v is None for v in verdicts) else True


def _distinct(elements: list[str], same: Callable[[str, str], Verdict]) -> list[str]:
    kept: list[str] = []
    for element in elements[: _MAX_ELEMENTS + 1]:
        if not any(same(element, other) for other in kept):
            kept.append(element)
    return kept


def _same_in_any_order(left: list[str], right: list[str], same: Callable[[str, str], Verdict]) -> Verdict:
    rest, undecided = list(right), False
    for x in left:
        verdicts = [same(x, y) for y in rest]
        if True in verdicts:
            del rest[verdicts.index(True)]
        elif None in verdicts:
            undecided = True
        else:
            return False
    return None if undecided else True


# ------------------------------------------------------------------------------------------------ computer algebra


def verify_symbolically(answer: str, label: str) -> bool:
    """Mathematical equality by math-verify. May hang or need any amount of memory: call it in a reward worker only."""
    # It warns at each start that its time limits are off; they are meant to be, see below.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig

    # math-verify's own time limits are signals, which do not interrupt big-integer arithmetic; the worker's is the one.
    # Its expression parser is left out: it hands text to sympy's, which evaluates it.
    latex = [LatexExtractionConfig(boxed_match_priority=0)]
    gold, target = (
        parse(rf"\boxed{{{text}}}", latex, fallback_mode="no_fallback", parsing_timeout=None)
        for text in (label, answer)
    )
    if not gold or not target:
        return False
    # The default of 6 decimals would make 0.333333 a third and tiny numbers zero.
    return bool(verify(gold, target, float_rounding=15, numeric_precision=30, timeout_seconds=None))
