"""Many samples, checked, as columns: what `check_sample` makes of each of them, side by side.

    Samples --check_samples--> TrainRows --take--> TrainRows of some rows, in another order

Samples as engines make them, lists of plain numbers, are read all at once. One that is anything else (a hook's arrays, or
broken) sends them all through `check_sample`, one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from miles.types import Sample, Status

from .row import TrainRow, check_sample, is_id, trajectory_of


@dataclass(frozen=True)
class TrainRows:
    """Columns of `B` rows; `R` response tokens and `T` tokens of all of them, side by side."""

    tokens: np.ndarray
    """[T] int64."""
    loss_mask: np.ndarray
    """[R] uint8."""
    rollout_log_probs: np.ndarray
    """[R] float32; 0 in rows that have none."""
    loss_scale: np.ndarray | None
    """[R] float32; None where no row has one."""
    has_log_probs: np.ndarray
    """[B] bool."""
    total_lengths: np.ndarray
    """[B] int64."""
    response_lengths: np.ndarray
    """[B] int64."""
    trained_tokens: np.ndarray
    """[B] int64, response tokens that are not masked."""
    temperature: np.ndarray
    """[B] float32; 1 for greedy samples."""
    index: np.ndarray
    """[B] int64."""
    trajectory_id: np.ndarray
    """[B] int64."""
    group_index: np.ndarray
    """[B] int64."""

    def __len__(self) -> int:
        return len(self.index)

    def take(self, rows: np.ndarray) -> TrainRows:
        """These rows, in this order. rows: [N] int64 below B."""
        of_tokens, of_response = _spans(self.total_lengths, rows), _spans(self.response_lengths, rows)
        return TrainRows(
            tokens=self.tokens[of_tokens],
            loss_mask=self.loss_mask[of_response],
            rollout_log_probs=self.rollout_log_probs[of_response],
            loss_scale=None if self.loss_scale is None else self.loss_scale[of_response],
            has_log_probs=self.has_log_probs[rows],
            total_lengths=self.total_lengths[rows],
            response_lengths=self.response_lengths[rows],
            trained_tokens=self.trained_tokens[rows],
            temperature=self.temperature[rows],
            index=self.index[rows],
            trajectory_id=self.trajectory_id[rows],
            group_index=self.group_index[rows],
        )


def check_samples(samples: Sequence[Sample]) -> TrainRows:
    """The samples as rows to train on. DataError of the first that `check_sample` refuses."""
    rows = _plain_rows(samples)
    return _side_by_side([check_sample(sample) for sample in samples]) if rows is None else rows


def _plain_rows(samples: Sequence[Sample]) -> TrainRows | None:
    """The rows, if every sample is lists of plain numbers and right in all that `check_sample` asks for; else None."""
    with_log_probs = bool(samples) and samples[0].rollout_log_probs is not None
    for s in samples:
        length, mask, log_probs = s.response_length, s.loss_mask, s.rollout_log_probs
        if not (
            (s.status is Status.COMPLETED or s.status is Status.TRUNCATED)
            and type(s.tokens) is list
            and type(length) is int
            and 0 <= length < len(s.tokens)
            and (mask is None or (type(mask) is list and len(mask) == length))
            and ((type(log_probs) is list and len(log_probs) == length) if with_log_probs else log_probs is None)
            and s.loss_scale is None
            and type(s.temperature) is float
            and 0 <= s.temperature < math.inf
            and is_id(s.index)
            and is_id(s.group_index)
        ):
            return None
    tokens = _flat(int, [s.tokens for s in samples])
    masks = _flat(int, [s.loss_mask or [1] * s.response_length for s in samples])
    values = _flat(float, [s.rollout_log_probs or [] for s in samples])
    if tokens is None or masks is None or values is None:
        return None
    if tokens.min(initial=0) < 0 or masks.min(initial=0) < 0 or masks.max(initial=0) > 1:
        return None
    if not math.isfinite(values.sum()):  # where it is masked, a row may hold infinities
        return None
    return _columns(
        tokens,
        masks,
        values if with_log_probs else np.zeros(len(masks)),
        None,
        [with_log_probs] * len(samples),
        [
            (len(s.tokens), s.response_length, s.temperature or 1.0, s.index, trajectory_of(s), s.group_index)
            for s in samples
        ],
    )


def _flat(kind: type, lists: list[list[Any]]) -> np.ndarray | None:
    """All entries side by side, int64 or float64; None where one is of another type, or does not fit."""
    values = list(chain.from_iterable(lists))
    if not set(map(type, values)) <= {kind}:
        return None
    try:
        return np.fromiter(values, dtype=kind, count=len(values))
    except OverflowError:
        return None


def _side_by_side(rows: Sequence[TrainRow]) -> TrainRows:
    nothing = [np.empty(0)]
    lengths = [len(row.loss_mask) for row in rows]
    none = [np.zeros(length) for length in lengths]
    scales = [np.ones(len(row.loss_mask)) if row.loss_scale is None else row.loss_scale for row in rows]
    return _columns(
        np.concatenate([row.tokens for row in rows] or nothing),
        np.concatenate([row.loss_mask for row in rows] or nothing),
        np.concatenate(
            [z if row.rollout_log_probs is None else row.rollout_log_probs for row, z in zip(rows, none, strict=True)]
            or nothing
        ),
        np.concatenate(scales) if any(row.loss_scale is not None for row in rows) else None,
        [row.rollout_log_probs is not None for row in rows],
        [
            (len(row.tokens), length, row.temperature, row.index, row.trajectory_id, row.group_index)
            for row, length in zip(rows, lengths, strict=True)
        ],
    )


def _columns(
    tokens: np.ndarray,
    loss_mask: np.ndarray,
    rollout_log_probs: np.ndarray,
    loss_scale: np.ndarray | None,
    has_log_probs: list[bool],
    of_rows: list[tuple[Any, ...]],
) -> TrainRows:
    """of_rows: [B] of (total length, response length, temperature, index, trajectory, group)."""
    total, response, temperature, index, trajectory, group = zip(*of_rows, strict=True) if of_rows else [()] * 6
    response_lengths = np.array(response, dtype=np.int64)
    row = np.repeat(np.arange(len(of_rows)), response_lengths)
    return TrainRows(
        tokens=tokens.astype(np.int64, copy=False),
        loss_mask=loss_mask.astype(np.uint8),
        rollout_log_probs=rollout_log_probs.astype(np.float32),
        loss_scale=None if loss_scale is None else loss_scale.astype(np.float32),
        has_log_probs=np.array(has_log_probs, dtype=bool),
        total_lengths=np.array(total, dtype=np.int64),
        response_lengths=response_lengths,
        trained_tokens=np.bincount(row, loss_mask, len(of_rows)).astype(np.int64),
        temperature=np.array(temperature, dtype=np.float32),
        index=np.array(index, dtype=np.int64),
        trajectory_id=np.array(trajectory, dtype=np.int64),
        group_index=np.array(group, dtype=np.int64),
    )


def _spans(lengths: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Where the entries of `rows` stand in a column that holds all rows of `lengths` side by side."""
    starts, taken = np.cumsum(lengths) - lengths, lengths[rows]
    return np.arange(taken.sum()) + np.repeat(starts[rows] - (np.cumsum(taken) - taken), taken)
