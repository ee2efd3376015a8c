"""The math reward: REWARDS.md's definition, and each mistake that it lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import DataError
from miles.rollout.rewards import last_box
from miles.rollout.rewards.math_equality import canonical, compare, number, verify_symbolically
from miles.rollout.rewards.rules import exact, math, math_quick
from miles.types import Sample


def score(answer: str, label: object) -> float:
    return math(None, Sample(response=answer, label=label))


def boxed(answer: str, label: object) -> float:
    return score(rf"so \boxed{{{answer}}}", label)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{1} and \boxed{2", None),
        ("no box", None),
        (r"\boxed{}", ""),
    ],
)
def test_last_box(text: str, content: str | None) -> None:
    assert last_box(text) == content


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("4", "4"),
        (r"\dfrac12", "1/2"),
        (r"\tfrac{1}{2}", "0.5"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"-\frac{3}{4}", "-0.75"),
        (r"1\frac12", "1.5"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"90^\circ", "90"),
        (r"\$5", "5"),
        (r"50\%", "50"),
        ("x=5", "5"),
        ("5", "x = 5"),
        ("1,000,000", "1000000"),
        ("1{,}000", "1000"),
        (r"\text{Evelyn}", "evelyn"),
        (r"\text{(C)}", "C"),
        (r"5\text{ cm}", "5"),
        (r"5\text{ cm}", "5 cm"),
        (r"\sqrt{8}", r"2\sqrt2"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"\{2, 1\}", r"\{1,2\}"),
        (r"\{1,1,2\}", r"\{1,2\}"),
        ("2, 1", "1,2"),
        (r"1 \text{ or } 2", "1,2"),
        (r"(-\infty, 3]", r"(-\infty,3]"),
        (r"[1,2]\cup[3,4]", r"[3,4]\cup[1,2]"),
        (r"(\sqrt{8}, 0.5)", r"(2\sqrt{2}, \frac12)"),
        (r"\pi", "3.141592653589793"),
        (r"3\times10^{-8}", "0.00000003"),
        ("10^{2}", "100"),
        ("5.", "5"),
        (".5", "0.50"),
        ("−3", "-3"),
        ("4", 4),
        ("0", 0),
        ("0.5", 0.5),
        ("12", r"so the answer is \boxed{12}"),
    ],
)
def test_equal(answer: str, label: object) -> None:
    assert boxed(answer, label) == 1.0


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("All of them", "A"),  # a letter is not searched inside the answer
        ("B", "A"),
        (r"\frac{12}{3}", r"\frac{1}{23}"),  # braces are not flattened away
        (r"\frac{1}{23}", r"\frac{12}{3}"),
        (r"5\text{ cm}", r"5\text{ m}"),  # units are compared
        (r"5\text{ m}^2", r"5\text{ m}"),
        ("0.0000001", "0"),  # small numbers stay what they are
        (r"\sqrt{2}\cdot10^{-9}", "0"),
        ("0.333333", r"\frac{1}{3}"),
        ("1.41421356", r"\sqrt{2}"),
        ("9007199254740993", "9007199254740992"),  # above 2**53
        ("1", 0),
        ("", 0),
        ("(1,2)", "[1,2]"),
        ("(1,2)", "(2,1)"),
        ("(1,2,3)", "(1,2)"),
        ("1,2", "(1,2)"),
        (r"\{1,2\}", "1"),
        ("1,2", "1"),
        ("1", "1,2"),
        ("x=5", "y=5"),
        ("no solution", "one solution"),
        ("-3", "3"),
        ("(", "1"),
        (r"\frac{1}{0}", "1"),
    ],
)
def test_different(answer: str, label: object) -> None:
    assert boxed(answer, label) == 0.0


def test_needs_a_closed_box() -> None:
    assert score("4", "4") == 0.0
    assert score(r"\boxed{4", "4") == 0.0
    assert score(r"\boxed{4} no, \boxed{5", "4") == 0.0


@pytest.mark.parametrize("label", [None, "", "  ", [], True])
def test_an_empty_label_is_a_data_error(label: object) -> None:
    with pytest.raises(DataError, match="label of sample"):
        boxed("1", label)


@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_integers_are_compared_exactly(a: int, b: int) -> None:
    assert compare(str(a), str(b)) is (a == b)
    assert compare(f"{a:,}", str(a)) is True


@given(st.fractions(max_denominator=10**6))
def test_number_reads_what_a_fraction_prints(value: object) -> None:
    assert number(canonical(str(value))) == value


@given(st.text(alphabet=r"\{}()[],=^/.$%x1 aF", max_size=40), st.text(alphabet=r"\{}()[],1x", max_size=20))
def test_no_answer_breaks_the_inline_verdict(answer: str, label: str) -> None:
    assert compare(answer, label) in (True, False, None)
    assert compare(label, label) is (canonical(label) != "")


def test_the_inline_verdict_agrees_with_the_full_one() -> None:
    for answer, label in [("4", "4"), ("4", "5"), ("(1,2)", "(1,2)"), ("cat", "dog"), ("0.5", r"\frac12")]:
        sample = Sample(response=rf"\boxed{{{answer}}}", label=label)
        assert math_quick(sample) == math(None, sample)
    assert math_quick(Sample(response=r"\boxed{\sqrt{8}}", label=r"2\sqrt2")) is None


def test_code_in_an_answer_is_not_run(tmp_path) -> None:
    target = tmp_path / "pwned"
    assert boxed(f"__import__('os').system('touch {target}')", "1") == 0.0
    assert verify_symbolically(f"__import__('os').system('touch {target}')", "1") is False
    assert not target.exists()


def test_exact_strips_and_prints_numbers() -> None:
    assert exact(None, Sample(label=0), response=" 0\n") == 1.0
    assert exact(None, Sample(label="10"), response="1") == 0.0
