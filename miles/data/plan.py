"""Which row goes to which optimizer step, data-parallel rank and micro-batch: one pure, deterministic function.

    rows of a step --(contiguous | balanced by tokens)--> ranks --(--micro-batch-size | token budget)--> micro-batches

Every rank of a step gets the same number of micro-batches, since each of them is a round of collectives; what is missing is
filled with empty ones.
"""

from __future__ import annotations

import heapq
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
    micro_batch_size: int | None = None,
    max_tokens: int | None = None,
    balance: bool = False,
    num_steps: int | None = None,
) -> Plan:
    """Places every row exactly once.

    lengths: [B] tokens of each row. step_of_row: [B] optimizer step, from 0; num_steps defaults to the largest plus one, and
    a step without rows still has one empty micro-batch a rank. Exactly one of micro_batch_size (rows) and max_tokens
    (tokens of a micro-batch; exceeded only by a row that alone exceeds it, which then stands alone) is given.
    balance=False deals a step's rows to the ranks in order, as evenly as counts allow; balance=True evens out tokens: ranks
    of a step differ by at most the longest row. Raises ValueError on inputs that break these rules.
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

    steps = []
    for step in range(num_steps):
        rows = np.flatnonzero(step_of_row == step)
        ranks = balanced_parts(lengths[rows], dp_size) if balance else np.array_split(np.arange(len(rows)), dp_size)
        rows_of_rank = [rows[part] for part in ranks]
        if max_tokens is None:
            assert micro_batch_size is not None
            micro = [_by_count(mine, micro_batch_size) for mine in rows_of_rank]
        else:
            micro = _by_tokens(rows_of_rank, lengths, max_tokens)
        # A step without rows is still a step: the optimizer's momentum moves the weights.
        count = max(1, *map(len, micro))
        empty = np.empty(0, dtype=np.int64)
        steps.append(tuple(tuple(mine + [empty] * (count - len(mine))) for mine in micro))
    return Plan(tuple(steps))


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


def _by_count(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _by_tokens(rows_of_rank: Sequence[np.ndarray], lengths: np.ndarray, max_tokens: int) -> list[list[np.ndarray]]:
    """Micro-batches under the token budget for each rank of a step: as few as the fullest rank needs, evenly filled."""
    packed = [_first_fit_decreasing(rows, lengths[rows], max_tokens) for rows in rows_of_rank]
    count = max(map(len, packed))
    return [
        _evenly_filled(rows, lengths[rows], count, max_tokens) or bins
        for rows, bins in zip(rows_of_rank, packed, strict=True)
    ]


def _first_fit_decreasing(rows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Each row, longest first, into the first bin with room: at most 11/9 of the fewest bins, plus one."""
    room: list[int] = []
    bins: list[list[int]] = []
    for i in np.argsort(-lengths, kind="stable"):
        length = int(lengths[i])
        fitting = next((b for b, free in enumerate(room) if free >= length), None)
        if fitting is None:
            room.append(max_tokens - length)  # negative for a row that alone exceeds the budget: nothing joins it
            bins.append([int(rows[i])])
        else:
            room[fitting] -= length
            bins[fitting].append(int(rows[i]))
    return [np.array(sorted(b), dtype=np.int64) for b in bins]


def _evenly_filled(rows: np.ndarray, lengths: np.ndarray, count: int, max_tokens: int) -> list[np.ndarray] | None:
    """The rows in `count` bins of nearly equal tokens, or None where that breaks the budget or leaves bins empty."""
    parts = balanced_parts(lengths, count) if 0 < count <= len(rows) else []
    if not parts or any(lengths[part].sum() > max_tokens or not len(part) for part in parts):
        return None
    return [rows[part] for part in parts]
