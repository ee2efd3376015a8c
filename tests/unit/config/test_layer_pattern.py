"""Patterns of layers as Megatron's flags write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.config.layer_pattern import expanded, linear_layers, listed, repeated


@given(st.lists(st.integers(0, 1), min_size=1, max_size=80))
def test_what_is_written_is_read(pattern: list[int]) -> None:
    assert listed(repeated(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", 2), ("[0]*2+[1]*3", [0, 0, 1, 1, 1]), ("([0,1]*2)", [0, 1, 0, 1]), (" 3 * [1] ", [1, 1, 1])],
)
def test_what_launch_scripts_write(text: str, value: object) -> None:
    assert listed(text) == value


def test_a_number_counts_layers_from_the_first() -> None:
    assert expanded("2", 5) == [1, 0, 1, 0, 1]
    assert expanded("[0]*1+[1]*2", 3) == [0, 1, 1]
    assert linear_layers("4", 5) == [1, 1, 1, 0, 1]
    assert linear_layers("[0]*1+[1]*2", 3) == [0, 1, 1]


@pytest.mark.parametrize(
    "text", ["", "[", "x", "f()", "[2]", "[1]*[1]", "1+1", "[1]*10001", "[1]-[0]", "True", "[" * 5000]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\bit\b|layer"):
        listed(text)
