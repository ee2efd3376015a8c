"""Growing a sample token by token, and checking what a hook made of one.

A row is `prompt | response`; the response alternates between what the model said (trained, with the engine's
log-probs) and what the world answered (not trained):

    tokens             p p p p | m m m o o m m
    loss_mask                  | 1 1 1 0 0 1 1
    rollout_log_probs          | x x x 0 0 x x
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from miles.errors import HookError
from miles.types import Sample, Status


def clone(sample: Sample) -> Sample:
    """A copy whose lists and dicts are its own."""
    clone = copy.copy(sample)
    clone.tokens = list(sample.tokens)
    clone.loss_mask = None if sample.loss_mask is None else list(sample.loss_mask)
    clone.rollout_log_probs = None if sample.rollout_log_probs is None else list(sample.rollout_log_probs)
    clone.weight_versions = list(sample.weight_versions)
    clone.metadata = copy.deepcopy(sample.metadata) if sample.metadata else {}
    clone.train_metadata = copy.deepcopy(sample.train_metadata)
    clone.reward = copy.deepcopy(sample.reward)
    return clone


def append_generated(sample: Sample, token_ids: Sequence[int], log_probs: Sequence[float], text: str) -> None:
    """Adds what the model said: trained tokens with the engine's log-probs."""
    _begin_columns(sample)
    assert sample.loss_mask is not None
    assert sample.rollout_log_probs is not None
    assert len(token_ids) == len(log_probs)
    sample.tokens.extend(token_ids)
    sample.loss_mask.extend([1] * len(token_ids))
    sample.rollout_log_probs.extend(log_probs)
    sample.response += text
    sample.response_length += len(token_ids)


def append_observation(sample: Sample, token_ids: Sequence[int], text: str) -> None:
    """Adds what the world said (a tool's result, the next user message): seen by the model, never trained on."""
    _begin_columns(sample)
    assert sample.loss_mask is not None
    assert sample.rollout_log_probs is not None
    sample.tokens.extend(token_ids)
    sample.loss_mask.extend([0] * len(token_ids))
    sample.rollout_log_probs.extend([0.0] * len(token_ids))
    sample.response += text
    sample.response_length += len(token_ids)


def _begin_columns(sample: Sample) -> None:
    if sample.loss_mask is None:
        sample.loss_mask = [1] * sample.response_length
    if sample.rollout_log_probs is None:
        sample.rollout_log_probs = [0.0] * sample.response_length


def check_rows(rows: object, sample: Sample, *, hook: str) -> list[Sample]:
    """What a generation hook returned, as rows that can be trained on.

    Raises:
        HookError: naming the hook, the sample, the field and both numbers, when a contract of `Sample` is broken.
    """
    what = f"{hook} on sample {sample.index}"
    listed = [rows] if isinstance(rows, Sample) else rows
    if not isinstance(listed, list) or not listed or not all(isinstance(row, Sample) for row in listed):
        raise HookError(
            f"{what}, got {type(rows).__name__}: it must return a Sample or a list of them; return the sample"
        )
    for number, row in enumerate(listed):
        where = f"{what}, row {number}" if len(listed) > 1 else what
        _check_row(row, where)
        row.group_index, row.index = sample.group_index, sample.index
        if len(listed) > 1:
            row.trajectory_id = sample.index
    return listed


def _check_row(row: Sample, where: str) -> None:
    if (wrong := row.wrong_field()) is not None:
        raise HookError(f"{where}, {wrong}")
    n = row.response_length
    if row.status is Status.PENDING:
        raise HookError(f"{where}, got status pending: set Sample.Status.COMPLETED, TRUNCATED, ABORTED or FAILED")
    if row.status in (Status.FAILED, Status.ABORTED):
        return
    if not 0 <= n <= len(row.tokens):
        raise HookError(
            f"{where}, got response_length {n} with {len(row.tokens)} tokens: tokens holds the prompt and the response; "
            "response_length counts the last of them"
        )
    for name in ("loss_mask", "rollout_log_probs"):
        column = getattr(row, name)
        if column is not None and len(column) != n:
            raise HookError(
                f"{where}, got {name} of {len(column)} entries with response_length {n}: it covers the response alone, "
                "one entry for each token; see miles.rollout.trajectory.append_observation"
            )
    if row.loss_mask is not None and not set(row.loss_mask) <= {0, 1}:
        raise HookError(f"{where}, got loss_mask values {sorted(set(row.loss_mask))}: only 0 and 1 are allowed")
    if n == 0 and row.status is Status.COMPLETED:
        raise HookError(f"{where}, got response_length 0 and status completed: nothing was generated; set it FAILED")
