"""rollout_batch_size * n_samples_per_prompt = global_batch_size * num_steps_per_rollout."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.config.batch_sizes import BatchSizes, solve_batch_sizes
from miles.config.problem import Problem

sizes = st.integers(1, 64)


@given(r=sizes, n=sizes, s=sizes, missing=st.integers(0, 3))
def test_three_give_the_fourth(r: int, n: int, s: int, missing: int) -> None:
    whole = [r * s, n, r * n, s]
    given_sizes = [None if i == missing else value for i, value in enumerate(whole)]
    assert solve_batch_sizes(BatchSizes(*given_sizes)) == BatchSizes(*whole)


@given(st.lists(st.none() | sizes, min_size=4, max_size=4))
def test_a_solution_keeps_what_was_given_and_obeys_the_law(values: list[int | None]) -> None:
    solved = solve_batch_sizes(BatchSizes(*values))
    if isinstance(solved, BatchSizes):
        found = list(vars(solved).values())
        assert all(was is None or was == now for was, now in zip(values, found, strict=True))
        assert found[0] * found[1] == found[2] * found[3]


@pytest.mark.parametrize(
    ("values", "solved"),
    [
        ((32, 8, None, None), (32, 8, 256, 1)),
        ((32, None, None, None), (32, 1, 32, 1)),
        ((32, None, None, 4), (32, 1, 8, 4)),
        ((256, None, 64, None), (256, 1, 64, 4)),
        ((None, 8, 64, None), (8, 8, 64, 1)),
    ],
)
def test_defaults(values: tuple[int | None, ...], solved: tuple[int, ...]) -> None:
    assert solve_batch_sizes(BatchSizes(*values)) == BatchSizes(*solved)


def problem(*values: int | None) -> str:
    found = solve_batch_sizes(BatchSizes(*values))
    assert isinstance(found, Problem)
    return str(found)


def test_four_that_disagree_are_printed_with_both_products() -> None:
    text = problem(32, 8, 100, 3)
    for part in (
        *(
            "--rollout-batch-size 32",
            "--n-samples-per-prompt 8",
            "--global-batch-size 100",
            "--num-steps-per-rollout 3",
        ),
        *("32 * 8 = 256", "100 * 3 = 300"),
    ):
        assert part in text


def test_what_does_not_divide() -> None:
    assert "--num-steps-per-rollout would be 256 / 100, not a whole number" in problem(32, 8, 100, None)
    assert "--rollout-batch-size would be 100 / 8" in problem(None, 8, 100, 1)


def test_too_few_and_too_small() -> None:
    assert problem(None, 8, None, None).startswith("batch sizes, got --n-samples-per-prompt 8: too few")
    assert problem(0, 8, None, None).startswith("--rollout-batch-size, got 0: it must be at least 1")
