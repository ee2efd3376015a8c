"""Which row goes to which optimizer step, data-parallel rank and micro-batch: one pure, deterministic function.

    rows of a step --> units --(contiguous | balanced by tokens)--> ranks --(--micro-batch-size | token budget)--> micro-batches

A *unit* is what a loss must see at once, such as the two rows of a pair: it stays in one micro-batch. As a rule a row is one.
Every rank of a step gets the same number of micro-batches, since each of them is a round of collectives; what is missing is
filled with empty ones.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """`steps[s][rank][m]`: row numbers [i64, ascending] of micro-batch `m`; `len(steps[s][rank])` is the same for all ranks."""

    steps: tuple[tuple[tuple[np.ndarray, ...], ...], ...]


def plan_batch(
    lengths: Sequence[int] | np.ndarray,
    step_of_row: Sequence[int] | np.ndarray,
    dp_size: int,
    *,
    unit_of_row: Sequence[int] | np.ndarray | None = None,
    group_of_row: Sequence[int] | np.ndarray | None = None,
    micro_batch_size: int | None = None,
    max_tokens: int | None = None,
    balance: bool = False,
    costs: Sequence[int] | np.ndarray | None = None,
    multiple_of: int = 1,
    at_least: int = 1,
    num_steps: int | None = None,
) -> Plan:
    """Places every row exactly once.

    lengths: [B] tokens of each row. step_of_row: [B] optimizer step, from 0; num_steps defaults to the largest plus one, and
    a step without rows still has one empty micro-batch a rank. unit_of_row: [B] any number that rows of one unit, which are of
    one step, share; None: every row is one. Exactly one of micro_batch_size (rows) and max_tokens (tokens of a micro-batch) is
    given; only a unit that alone exceeds it does, and then stands alone. group_of_row: [B] rows that gain from one micro-batch,
    as those of one prompt do, whose tokens are then computed once: with max_tokens those of a rank stay together where that
    needs no more micro-batches.
    balance=False deals a step's units to the ranks in order, as evenly as counts allow; balance=True evens out `costs` [B], or
    tokens where it is None: ranks of a step differ by at most the dearest unit. The number of micro-batches of a step is a
    multiple of `multiple_of` from `at_least` up, as an interleaved pipeline needs it. Raises ValueError on inputs that break these rules.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    step_of_row = np.asarray(step_of_row, dtype=np.int64)
    if lengths.ndim != 1 or step_of_row.shape != lengths.shape:
        raise ValueError(
            f"lengths and step_of_row, got shapes {lengths.shape} and {step_of_row.shape}: both must be [B]"
        )
    if (lengths < 0).any() or (step_of_row < 0).any():
        raise ValueError("lengths and step_of_row, got a negative entry: both count from 0")
    if dp_size < 1:
        raise ValueError(f"dp_size, got {dp_size}: there must be a rank")
    if (micro_batch_size is None) == (max_tokens is None):
        raise ValueError(f"micro_batch_size and max_tokens, got {micro_batch_size} and {max_tokens}: give exactly one")
    if (limit := micro_batch_size if max_tokens is None else max_tokens) is not None and limit < 1:
        raise ValueError(f"limit of a micro-batch, got {limit}: it must hold something; give at least 1")
    used = int(step_of_row.max()) + 1 if step_of_row.size else 0
    if num_steps is None:
        num_steps = used
    elif num_steps < used:
        raise ValueError(f"num_steps, got {num_steps}: a row belongs to step {used - 1}")

    if multiple_of < 1:
        raise ValueError(f"multiple_of, got {multiple_of}: numbers of micro-batches are counted in it; give at least 1")
    units = _Units.of(lengths, unit_of_row)
    cost_of_unit = units.tokens if costs is None else units.sums(np.asarray(costs, dtype=np.int64))
    step_of_unit = step_of_row[units.first]
    if unit_of_row is not None and (step_of_unit[units.of_row] != step_of_row).any():
        raise ValueError(
            "unit_of_row, got a unit with rows of two steps: it is trained on at once; keep it in one step"
        )
    group_of_unit = None if group_of_row is None else np.asarray(group_of_row, dtype=np.int64)[units.first]
    steps = []
    for step in range(num_steps):
        mine = np.flatnonzero(step_of_unit == step)
        parts = (
            balanced_parts(cost_of_unit[mine], dp_size) if balance else np.array_split(np.arange(len(mine)), dp_size)
        )
        units_of_rank = [mine[part] for part in parts]
        if max_tokens is None:
            assert micro_batch_size is not None
            micro = [_by_count(own, units.rows, micro_batch_size) for own in units_of_rank]
        else:
            micro = _by_tokens(units_of_rank, units.tokens, max_tokens, group_of_unit)
        # A step without rows is still a step: the optimizer's momentum moves the weights.
        count = -(-max(1, at_least, *map(len, micro)) // multiple_of) * multiple_of
        empty = np.empty(0, dtype=np.int64)
        steps.append(tuple((*map(units.members, own), *[empty] * (count - len(own))) for own in micro))
    return Plan(tuple(steps))


@dataclass(frozen=True)
class _Units:
    """The units `U` of rows `B`, in order of their first rows."""

    of_row: np.ndarray
    """[B]"""
    first: np.ndarray
    """[U] first row."""
    tokens: np.ndarray
    """[U]"""
    rows: np.ndarray
    """[U] number of rows."""

    @classmethod
    def of(cls, lengths: np.ndarray, unit_of_row: Sequence[int] | np.ndarray | None) -> _Units:
        if unit_of_row is None:
            all_rows = np.arange(len(lengths))
            return cls(all_rows, all_rows, lengths, np.ones_like(lengths))
        given = np.asarray(unit_of_row, dtype=np.int64)
        if given.shape != lengths.shape:
            raise ValueError(f"unit_of_row, got shape {given.shape} for {len(lengths)} rows: it must be [B]")
        _, first, inverse, rows = np.unique(given, return_index=True, return_inverse=True, return_counts=True)
        order = np.argsort(first)
        of_row = np.argsort(order)[inverse]
        tokens = np.zeros(len(first), dtype=np.int64)
        np.add.at(tokens, of_row, lengths)
        return cls(of_row, first[order], tokens, rows[order])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[U] of `values` [B]."""
        sums = np.zeros(len(self.first), dtype=np.int64)
        np.add.at(sums, self.of_row, values)
        return sums

    def members(self, units: np.ndarray) -> np.ndarray:
        """Their rows, ascending."""
        if len(self.first) == len(self.of_row):
            return units
        return np.flatnonzero(np.isin(self.of_row, units))


def balanced_parts(lengths: np.ndarray, num_parts: int) -> list[np.ndarray]:
    """Splits items into `num_parts` of nearly equal total length; sums differ by at most the largest item.

    Largest differencing (Karmarkar and Karp, 1982), for k parts: every item starts as a partition with one filled part;
    the two partitions of the widest spread are merged, the largest part of one with the smallest of the other, until one is
    left. A merge is at most as wide as the wider of the two, hence the bound. O(B k log k).
    """
    if num_parts == 1 or not len(lengths):
        return [np.arange(len(lengths))] + [np.empty(0, dtype=np.int64) for _ in range(num_parts - 1)]
    heap: list[tuple[int, int, np.ndarray, list[list[int]]]] = []
    for item, length in enumerate(lengths.tolist()):
        sums = np.zeros(num_parts, dtype=np.int64)
        sums[0] = length
        heap.append((-length, item, sums, [[item], *([] for _ in range(num_parts - 1))]))
    heapq.heapify(heap)  # widest spread first; the lowest item breaks ties, so the result is a function of the lengths
    while len(heap) > 1:
        _, tie, left_sums, left = heapq.heappop(heap)  # sums descend
        _, other_tie, right_sums, right = heapq.heappop(heap)
        sums = left_sums + right_sums[::-1]
        order = np.argsort(-sums, kind="stable")
        sums = sums[order]
        parts = [left[i] + right[num_parts - 1 - i] for i in order]
        heapq.heappush(heap, (int(sums[-1] - sums[0]), min(tie, other_tie), sums, parts))
    return [np.array(sorted(part), dtype=np.int64) for part in heap[0][3]]


def _by_count(units: np.ndarray, rows: np.ndarray, size: int) -> list[np.ndarray]:
    """In order, as many units into each micro-batch as hold `size` rows, and at least one."""
    ends = np.cumsum(rows[units])
    cuts = [0]
    while cuts[-1] < len(units):
        before = ends[cuts[-1] - 1] if cuts[-1] else 0
        cuts.append(max(int(np.searchsorted(ends, before + size, side="right")), cuts[-1] + 1))
    return [units[start:stop] for start, stop in itertools.pairwise(cuts)]


def _by_tokens(
    units_of_rank: Sequence[np.ndarray], tokens: np.ndarray, max_tokens: int, group_of_unit: np.ndarray | None
) -> list[list[np.ndarray]]:
    """Micro-batches under the token budget for each rank of a step: as few as the fullest rank needs, evenly filled."""
    packed = [_first_fit_decreasing(units, tokens[units], max_tokens) for units in units_of_rank]
    count = max(map(len, packed))
    return [
        (group_of_unit is not None and _whole_groups(units, tokens[units], count, max_tokens, group_of_unit[units]))
        or _evenly_filled(units, tokens[units], count, max_tokens)
        or bins
        for units, bins in zip(units_of_rank, packed, strict=True)
    ]


def _whole_groups(
    units: np.ndarray, lengths: np.ndarray, count: int, max_tokens: int, groups: np.ndarray
) -> list[np.ndarray] | None:
    """The units in at most `count` bins, those of a group in one; None where the budget does not allow it."""
    names, group = np.unique(groups, return_inverse=True)
    sums = np.bincount(group, weights=lengths, minlength=len(names)).astype(np.int64)
    if not len(sums) or sums.max() > max_tokens:
        return None
    parts = _evenly_filled(np.arange(len(names)), sums, count, max_tokens)
    parts = parts or _first_fit_decreasing(np.arange(len(names)), sums, max_tokens)
    return [units[np.isin(group, part)] for part in parts] if len(parts) <= count else None


def _first_fit_decreasing(units: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Each unit, longest first, into the first bin with room: at most 11/9 of the fewest bins, plus one."""
    room: list[int] = []
    bins: list[list[int]] = []
    for i in np.argsort(-lengths, kind="stable"):
        length = int(lengths[i])
        fitting = next((b for b, free in enumerate(room) if free >= length), None)
        if fitting is None:
            room.append(max_tokens - length)  # negative for a unit that alone exceeds the budget: nothing joins it
            bins.append([int(units[i])])
        else:
            room[fitting] -= length
            bins[fitting].append(int(units[i]))
    return [np.array(sorted(b), dtype=np.int64) for b in bins]


def _evenly_filled(units: np.ndarray, lengths: np.ndarray, count: int, max_tokens: int) -> list[np.ndarray] | None:
    """The units in `count` bins of nearly equal tokens, or None where that breaks the budget or leaves bins empty."""
    parts = balanced_parts(lengths, count) if 0 < count <= len(units) else []
    if not parts or any(lengths[part].sum() > max_tokens or not len(part) for part in parts):
        return None
    return [units[part] for part in parts]
