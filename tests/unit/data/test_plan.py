"""The batch plan: what must hold for any lengths, and the splits worked by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.data import Plan, plan_batch
from miles.data.plan import balanced_parts


def lists(plan: Plan):
    return [[[micro.tolist() for micro in rank] for rank in step] for step in plan.steps]


@st.composite
def unit_numbers(draw, step_of_row):
    """None, or units of rows that need not be neighbours, numbered in no order."""
    if draw(st.booleans()):
        return None
    name = draw(st.permutations(range(64)))
    return [name[4 * draw(st.integers(0, 9)) + step] for step in step_of_row]


def units_of(batch):
    """Unit -> its rows."""
    names = batch["unit_of_row"] or range(len(batch["lengths"]))
    found = {}
    for row, name in enumerate(names):
        found.setdefault(name, []).append(row)
    return found


@st.composite
def batches(draw):
    rows = draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3)), max_size=40))
    limit = draw(st.integers(1, 400))
    dynamic = draw(st.booleans())
    return {
        "lengths": [length for length, _ in rows],
        "step_of_row": [step for _, step in rows],
        "dp_size": draw(st.integers(1, 5)),
        "balance": draw(st.booleans()),
        "unit_of_row": draw(unit_numbers([step for _, step in rows])),
        "group_of_row": draw(st.none() | st.lists(st.integers(0, 5), min_size=len(rows), max_size=len(rows))),
        "multiple_of": draw(st.integers(1, 3)),
        "at_least": draw(st.integers(1, 4)),
        "max_tokens" if dynamic else "micro_batch_size": limit if dynamic else draw(st.integers(1, 8)),
    }


@given(batches())
def test_every_row_once_in_its_step_with_equal_counts_under_the_limit(batch):
    plan = plan_batch(**batch)
    assert sorted(int(i) for step in plan.steps for rank in step for m in rank for i in m) == list(
        range(len(batch["lengths"]))
    )
    for number, step in enumerate(plan.steps):
        assert len(step) == batch["dp_size"]
        assert len({len(rank) for rank in step}) == 1
        assert len(step[0]) >= 1
        assert len(step[0]) % batch["multiple_of"] == 0
        assert len(step[0]) >= batch["at_least"]
        for micro in itertools.chain(*step):
            assert all(batch["step_of_row"][i] == number for i in micro)
            assert sorted(micro) == micro.tolist()
            tokens = sum(batch["lengths"][i] for i in micro)
            is_over = tokens > batch["max_tokens"] if "max_tokens" in batch else len(micro) > batch["micro_batch_size"]
            assert not is_over or micro.tolist() in units_of(batch).values()


@given(batches())
def test_units_are_whole(batch):
    micro_batches = [set(m.tolist()) for step in plan_batch(**batch).steps for rank in step for m in rank]
    for rows in units_of(batch).values():
        assert sum(bool(m & set(rows)) for m in micro_batches) == 1


@given(batches())
def test_keeping_groups_together_needs_no_more_micro_batches(batch):
    counts = [
        [len(step[0]) for step in plan_batch(**batch | {"group_of_row": groups}).steps]
        for groups in (None, [i % 5 for i in range(len(batch["lengths"]))])
    ]
    assert counts[1] <= counts[0]


def test_rows_of_a_group_share_a_micro_batch_where_they_fit():
    def plan(lengths, groups, max_tokens):
        steps = plan_batch(lengths, [0] * len(lengths), 1, group_of_row=groups, max_tokens=max_tokens).steps
        return [micro.tolist() for micro in steps[0][0]]

    groups = [7, 3, 7, 3, 7, 3]
    assert sorted(plan([5, 4, 5, 4, 5, 4], groups, 15)) == [[0, 2, 4], [1, 3, 5]]
    # 27 tokens need two micro-batches of 14; the first group alone is larger, so rows go where they fit.
    assert len(plan([5, 4, 5, 4, 5, 4], groups, 14)) == 2
    # Three groups of 12 tokens need three micro-batches of 18, their rows two.
    assert len(plan([6, 6, 6, 6, 6, 6], [0, 0, 1, 1, 2, 2], 18)) == 2


@given(batches())
def test_a_unit_of_one_row_is_a_row(batch):
    numbers = [7 * (len(batch["lengths"]) - i) for i in range(len(batch["lengths"]))]
    assert lists(plan_batch(**batch | {"unit_of_row": numbers})) == lists(plan_batch(**batch | {"unit_of_row": None}))


@given(batches())
def test_no_micro_batch_is_empty_on_every_rank(batch):
    for step in plan_batch(**batch).steps:
        filled = sum(any(map(len, micro_of_ranks)) for micro_of_ranks in zip(*step, strict=True))
        # One that is empty everywhere fills a step without rows, or the count up to the multiple.
        assert len(step[0]) - max(filled, batch["at_least"]) < batch["multiple_of"]


@given(batches())
def test_it_is_a_function(batch):
    assert lists(plan_batch(**batch)) == lists(plan_batch(**batch))


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 9))
def test_balance_bound(lengths, num_parts):
    parts = balanced_parts(np.array(lengths, dtype=np.int64), num_parts)
    assert len(parts) == num_parts
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in part) for part in parts]
    assert max(sums) - min(sums) <= max(lengths, default=0)


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 9))
def test_balanced_ranks_differ_by_at_most_the_longest_row(lengths, dp_size):
    (step,) = plan_batch(lengths, [0] * len(lengths), dp_size, micro_batch_size=4, balance=True, num_steps=1).steps
    tokens = [sum(lengths[i] for micro in rank for i in micro) for rank in step]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 20)), max_size=60), st.integers(1, 9))
def test_balanced_ranks_differ_by_at_most_the_longest_unit(rows, dp_size):
    lengths, units = [length for length, _ in rows], [unit for _, unit in rows]
    (step,) = plan_batch(
        lengths, [0] * len(rows), dp_size, unit_of_row=units, max_tokens=1500, balance=True, num_steps=1
    ).steps
    tokens = [sum(lengths[i] for micro in rank for i in micro) for rank in step]
    longest = max((sum(lengths[i] for i in range(len(rows)) if units[i] == u) for u in units), default=0)
    assert max(tokens) - min(tokens) <= longest


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 10**6)), max_size=60), st.integers(1, 9))
def test_ranks_balanced_by_cost_differ_by_at_most_the_dearest_row(rows, dp_size):
    lengths, costs = [length for length, _ in rows], [cost for _, cost in rows]
    limits = {"balance": True, "micro_batch_size": 4, "num_steps": 1}
    (step,) = plan_batch(lengths, [0] * len(rows), dp_size, costs=costs, **limits).steps
    of_rank = [sum(costs[i] for micro in rank for i in micro) for rank in step]
    assert max(of_rank) - min(of_rank) <= max(costs, default=0)


def test_pairs_worked_by_hand():
    # Pairs (0, 3), (1, 4) and (2, 5): dealt in order, two rows to a micro-batch; a limit of one row cannot cut a pair.
    pairs = {"lengths": [1] * 6, "step_of_row": [0] * 6, "dp_size": 2, "unit_of_row": [5, 3, 4, 5, 3, 4]}
    assert lists(plan_batch(**pairs, micro_batch_size=2)) == [[[[0, 3], [1, 4]], [[2, 5], []]]]
    assert lists(plan_batch(**pairs, micro_batch_size=1)) == lists(plan_batch(**pairs, micro_batch_size=3))
    assert lists(plan_batch(**pairs, micro_batch_size=4)) == [[[[0, 1, 3, 4]], [[2, 5]]]]


def test_differencing_beats_dealing_in_order():
    """8 7 6 5 4 in two parts: 16 and 14 by differencing, the textbook example."""
    parts = balanced_parts(np.array([8, 7, 6, 5, 4]), 2)
    assert sorted(sum([8, 7, 6, 5, 4][i] for i in part) for part in parts) == [14, 16]
    lengths = np.random.default_rng(0).integers(100, 4000, 256)
    sums = [lengths[part].sum() for part in balanced_parts(lengths, 8)]
    in_order = [part.sum() for part in np.split(lengths, 8)]
    assert max(sums) - min(sums) < 0.01 * (max(in_order) - min(in_order))


def test_dealt_in_order_without_balance():
    plan = plan_batch([1] * 5, [0] * 5, 2, micro_batch_size=2)
    assert lists(plan) == [[[[0, 1], [2]], [[3, 4], []]]]


def test_steps_are_kept_apart():
    plan = plan_batch([1] * 4, [1, 0, 1, 0], 1, micro_batch_size=4)
    assert lists(plan) == [[[[1, 3]]], [[[0, 2]]]]


def test_a_step_or_rank_without_rows_still_has_a_micro_batch():
    assert lists(plan_batch([], [], 2, micro_batch_size=1, num_steps=2)) == [[[[]], [[]]]] * 2
    assert lists(plan_batch([9], [0], 3, max_tokens=10)) == [[[[0]], [[]], [[]]]]


def test_budget_is_filled_evenly_in_the_fewest_micro_batches():
    # 20 tokens need two micro-batches of 12: 10 and 10, not 12 and 8
    (((first, second),),) = plan_batch([6, 6, 4, 4], [0] * 4, 1, max_tokens=12).steps
    lengths = np.array([6, 6, 4, 4])
    assert lengths[first].sum() == lengths[second].sum() == 10


def test_a_row_above_the_budget_stands_alone():
    (((*micro,),),) = plan_batch([50, 3, 3], [0] * 3, 1, max_tokens=10).steps
    assert sorted(m.tolist() for m in micro) == [[0], [1, 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch_size": None}, "give exactly one"),
        ({"max_tokens": 5}, "give exactly one"),
        ({"micro_batch_size": 0}, "at least 1"),
        ({"dp_size": 0}, "there must be a rank"),
        ({"step_of_row": [0]}, "both must be"),
        ({"lengths": [-1, 2]}, "negative"),
        ({"unit_of_row": [0]}, "for 2 rows"),
        ({"unit_of_row": [3, 3], "step_of_row": [0, 1]}, "two steps"),
        ({"num_steps": 1, "step_of_row": [0, 1]}, "belongs to step 1"),
    ],
)
def test_inputs_are_checked(change, message):
    arguments = {"lengths": [1, 2], "step_of_row": [0, 0], "dp_size": 1, "micro_batch_size": 1} | change
    with pytest.raises(ValueError, match=message):
        plan_batch(**arguments)
