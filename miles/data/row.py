"""One sample, checked against its contract, as arrays: what a hook or an engine got wrong is found here, by sample.

    Sample --check_sample--> TrainRow

A custom generation function can be tried out with it: whatever `check_sample` accepts, trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from miles.errors import DataError
from miles.types import Sample, Status


@dataclass(frozen=True)
class TrainRow:
    """Columns of one row; `R` response tokens, `T` all tokens."""

    tokens: np.ndarray
    """[T] int64, prompt then response."""
    loss_mask: np.ndarray
    """[R] uint8."""
    rollout_log_probs: np.ndarray | None
    """[R] float32; None where the sample has none."""
    loss_scale: np.ndarray | None
    """[R] float32; None where all of it is 1."""
    trained_tokens: int
    """Response tokens that are not masked."""
    temperature: float
    index: int
    trajectory_id: int
    group_index: int


def trajectory_of(sample: Sample) -> int:
    """Id of the sample's trajectory: `trajectory_id`, else its own `index`. DataError where it has neither."""
    name = sample.index if sample.trajectory_id is None else sample.trajectory_id
    if not is_id(name):
        raise DataError(
            f"a sample, got index {_short(name)}: it cannot be counted; keep the index of the sample it was made from"
        )
    return name


def check_sample(sample: Sample) -> TrainRow:
    """The sample as a row to train on. DataError with its index, what is wrong, and how to mend it."""

    def refuse(what: str, got: object, why: str, fix: str) -> DataError:
        return DataError(f"{what} of sample {sample.index}, got {got}: {why}; {fix}")

    trajectory_id = trajectory_of(sample)
    if not (is_id(sample.index) and is_id(sample.group_index)):
        got = f"{_short(sample.index)} and {_short(sample.group_index)}"
        raise refuse(
            "index and group_index",
            got,
            "both are needed, as whole numbers",
            "copy them from the sample that the hook was given",
        )
    if sample.status not in (Status.COMPLETED, Status.TRUNCATED):
        raise refuse(
            "status",
            sample.status.value,
            "only finished samples train",
            "set COMPLETED or TRUNCATED once it is generated",
        )
    tokens = _integers(sample.tokens)
    if tokens is None or tokens.min(initial=0) < 0:
        raise refuse(
            "tokens", _short(sample.tokens), "token ids are whole numbers >= 0", "give prompt and response ids"
        )
    length = sample.response_length
    if type(length) is not int or not 0 <= length < max(len(tokens), 1):
        raise refuse(
            "response_length",
            f"{length} with {len(tokens)} tokens",
            "a response follows a prompt of at least one token, and tokens hold both",
            "count the response's tokens alone",
        )

    mask = np.ones(length, dtype=np.uint8)
    if sample.loss_mask is not None:
        given = _numbers(sample.loss_mask)
        if given is None or not ((given == 0) | (given == 1)).all():
            raise refuse("loss_mask", _short(sample.loss_mask), "a token is trained on or not", "use 0 and 1")
        if len(given) != length:
            raise refuse("loss_mask", f"{len(given)} entries", f"the response has {length} tokens", "give one for each")
        mask = given.astype(np.uint8)

    log_probs = None
    if sample.rollout_log_probs is not None:
        log_probs = _numbers(sample.rollout_log_probs)
        if log_probs is None:
            got = _short(sample.rollout_log_probs)
            raise refuse(
                "rollout_log_probs", got, "log-probs are numbers", "use 0.0 for tokens that the engine did not make"
            )
    # An empty list is how code says "none" where there are tokens, and the right length where there are not.
    if log_probs is not None and (len(log_probs) or not length):
        if len(log_probs) != length:
            raise refuse(
                "rollout_log_probs",
                f"{len(log_probs)} entries",
                f"the response has {length} tokens",
                "give one for each",
            )
        # A sum is finite where every term is, and costs a third of asking each of them.
        if not math.isfinite(log_probs.sum()) and not np.isfinite(log_probs[mask == 1]).all():
            raise refuse(
                "rollout_log_probs",
                "a NaN or an infinity",
                "a token that is trained on was sampled, so its log-prob is finite",
                "mask tokens that the engine did not make",
            )
        log_probs = log_probs.astype(np.float32)
    else:
        log_probs = None

    scale = None
    if sample.loss_scale is not None:
        scale = _numbers(sample.loss_scale)
        if scale is None or len(scale) != length or not (np.isfinite(scale) & (scale >= 0)).all():
            raise refuse(
                "loss_scale",
                _short(sample.loss_scale),
                f"it weighs each of {length} response tokens",
                "give each a number from 0 up",
            )
        scale = scale.astype(np.float32)

    if not isinstance(sample.temperature, (int, float)) or not 0 <= sample.temperature < math.inf:
        raise refuse(
            "temperature", _short(sample.temperature), "logits are divided by it", "give the sampling temperature"
        )
    return TrainRow(
        tokens=tokens,
        loss_mask=mask,
        rollout_log_probs=log_probs,
        loss_scale=scale,
        trained_tokens=int(np.count_nonzero(mask)),
        temperature=sample.temperature or 1.0,
        index=sample.index,
        trajectory_id=trajectory_id,
        group_index=sample.group_index,
    )


def is_id(value: object) -> TypeGuard[int]:
    """A whole number that fits an int64 column with room to spare."""
    return type(value) is int and abs(value) < 2**62


def _numbers(values: Sequence[Any] | np.ndarray) -> np.ndarray | None:
    """[N] float64, or None where an entry is no number."""
    try:
        array = np.asarray(values)
    except ValueError:  # ragged
        return None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "biuf"):
        return None
    return array.astype(np.float64, copy=False)


def _integers(values: Sequence[Any] | np.ndarray) -> np.ndarray | None:
    """[N] int64, or None where an entry is no whole number."""
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        return None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        return None
    return array.astype(np.int64, copy=False)


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
