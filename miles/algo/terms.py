"""What surrogates and corrections take and return: clean tokens in, one value a token out. Legend: `R` tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from miles.types import LossInputs

from .metrics import Metric
from .reductions import masked
from .spec import PolicyLossSpec

#: Columns of LossInputs that hold a value for each token, and may hold anything where a token is not trained on.
TOKEN_COLUMNS = (
    "log_probs",
    "old_log_probs",
    "advantages",
    "token_weight",
    "ref_log_probs",
    "rollout_log_probs",
    "train_log_probs",
    "entropy",
    "divergence",
)

#: Those of them that are functions of the weights.
TRAINED_COLUMNS = ("log_probs", "entropy", "divergence")


@dataclass(frozen=True)
class Term:
    """One value a token, with the metrics that go with it."""

    values: torch.Tensor
    """[R]"""
    metrics: dict[str, Metric] = field(default_factory=dict)


#: A part of the policy loss. It gets tokens from `trained_tokens`, so it needs no masking of its own before reductions.
TermFn: TypeAlias = Callable[[LossInputs, PolicyLossSpec], Term]


def trained_tokens(inputs: LossInputs) -> LossInputs:
    """The same tokens with every untrained one replaced by zeros, so that nothing in it reaches loss or gradient.

    `loss_mask` becomes what is trained on: masked in, and of weight other than 0. Columns that are data are detached. Raises
    ValueError where a column is not `[R]`, the mask is not bool, or log-probs are not float32 or float64 (a ratio of bfloat16
    log-probs is noise).
    """
    shape = inputs.log_probs.shape
    if len(shape) != 1:
        raise ValueError(f"log_probs, got shape {tuple(shape)}: tokens of a micro-batch are packed; pass [R]")
    if inputs.loss_mask.dtype != torch.bool or inputs.loss_mask.shape != shape:
        raise ValueError(
            f"loss_mask, got {inputs.loss_mask.dtype} {tuple(inputs.loss_mask.shape)}: it must be bool {tuple(shape)}"
        )
    active = inputs.loss_mask & (inputs.token_weight != 0)
    clean: dict[str, torch.Tensor] = {"loss_mask": active}
    for name in TOKEN_COLUMNS:
        column = getattr(inputs, name)
        if column is None:
            continue
        if column.shape != shape:
            raise ValueError(f"{name}, got shape {tuple(column.shape)}: it must be {tuple(shape)}, as log_probs is")
        if column.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}, got {column.dtype}: exp amplifies its rounding; convert to float32 first")
        # Only what is trained carries a gradient: an old log-prob that does would cancel the policy's.
        clean[name] = masked(column if name in TRAINED_COLUMNS else column.detach(), active)
    if inputs.policy_mask is not None and (inputs.policy_mask.dtype != torch.bool or inputs.policy_mask.shape != shape):
        mask = inputs.policy_mask
        raise ValueError(f"policy_mask, got {mask.dtype} {tuple(mask.shape)}: it must be bool {tuple(shape)}")
    return dataclasses.replace(inputs, **clean)  # type: ignore[arg-type]  # every value is a tensor field


def required(column: torch.Tensor | None, name: str, flag: str) -> torch.Tensor:
    """`column`, or ValueError that names the feature which needs it."""
    if column is None:
        raise ValueError(f"{name}, got None: {flag} needs it; pass the column or switch {flag} off")
    return column
