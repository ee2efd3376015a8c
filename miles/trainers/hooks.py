"""Losses and corrections that a user's function makes, in the shapes that modules written for Miles and slime expect."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from miles.algo import PolicyLossSpec, Term
from miles.algo.metrics import SCORED_TOKENS, TOTAL_WEIGHT, mean, total
from miles.algo.reductions import masked_sum
from miles.algo.terms import TOKEN_COLUMNS, trained_tokens
from miles.config import args_view, load_hook
from miles.errors import HookError
from miles.types import LossInputs, LossOutputs

from .check import CORRECTION_KEYWORDS

if TYPE_CHECKING:
    from miles.config.groups import Config

_FLAG = "--custom-tis-function-path"


def with_custom_correction(spec: PolicyLossSpec, config: Config) -> PolicyLossSpec:
    """`spec` with the function of --custom-tis-function-path in place of a built-in correction; as it is without one."""
    path = config.grpo.custom_tis_function_path
    if path is None:
        return spec
    correction = custom_correction(path, config)
    return dataclasses.replace(spec, use_tis=False, off_policy_correction=None, custom_correction=correction)


def custom_correction(path: str, config: Config) -> Callable[[torch.Tensor, LossInputs], Term]:
    """The correction `f(args, *, pg_loss, train_log_probs, ...) -> (pg_loss, loss_masks, metrics)` as a term of ours.

    pg_loss: [R]. train_log_probs, rollout_log_probs, loss_masks: lists with a tensor for each row. total_lengths,
    response_lengths: lists of ints. What it returns: the corrected [R], a mask for each row (tokens masked out there leave
    the policy loss and no denominator), and metrics of [R] or one number each, logged as means over the trained tokens.
    Raises HookError for a result of another form.
    """
    hook = load_hook(path, flag=_FLAG, parameters=("args",), keywords=CORRECTION_KEYWORDS)
    args = args_view(config)

    def correct(values: torch.Tensor, tokens: LossInputs) -> Term:
        if not len(values):
            # Ranks reduce metrics together, so their names have to be found out also where there is nothing to correct.
            return Term(values, {name: mean(values, tokens.loss_mask, tokens.token_weight) for name in names()})
        new, masks, metrics = call(values, tokens)
        kept = torch.cat([mask.to(values.device) for mask in masks]).bool()
        return Term(
            torch.where(kept, new, torch.zeros_like(new)),
            {name: mean(value, tokens.loss_mask, tokens.token_weight) for name, value in metrics.items()},
        )

    def call(
        values: torch.Tensor, tokens: LossInputs
    ) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]:
        sizes = torch.bincount(tokens.row, minlength=tokens.num_rows).tolist()
        train = tokens.old_log_probs if tokens.train_log_probs is None else tokens.train_log_probs
        assert tokens.rollout_log_probs is not None, "checked when the batch arrived"
        result = hook(
            args,
            pg_loss=values,
            train_log_probs=list(train.split(sizes)),
            rollout_log_probs=list(tokens.rollout_log_probs.split(sizes)),
            loss_masks=list(tokens.loss_mask.to(values.dtype).split(sizes)),
            total_lengths=sizes if tokens.total_lengths is None else tokens.total_lengths.tolist(),
            response_lengths=sizes,
        )
        if not isinstance(result, tuple) or len(result) != 3:
            raise HookError(
                f"{_FLAG}, got {type(result).__name__} of {path}: it returns (pg_loss, loss_masks, metrics)"
            )
        new, masks, metrics = result
        try:
            masks = tokens.loss_mask.split(sizes) if masks is None else masks
            masks = [torch.as_tensor(mask).reshape(-1) for mask in masks]
            told = {str(name): _per_token(value, values) for name, value in dict(metrics or {}).items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise HookError(
                f"{_FLAG}, got masks or metrics of another form of {path} ({error}): return a mask for each row, and a dict of "
                "metrics with one number, or one for each token"
            ) from error
        shape, lengths = getattr(new, "shape", None), [mask.numel() for mask in masks]
        if not isinstance(new, torch.Tensor) or shape != values.shape or lengths != sizes:
            raise HookError(
                f"{_FLAG}, got a pg_loss of {shape} and masks of {lengths} tokens from {path}: rows have {sizes}; "
                "return one value for each token"
            )
        return new, masks, told

    def names() -> list[str]:
        zero = torch.zeros(1)
        one_token = LossInputs(
            **dict.fromkeys(("log_probs", "old_log_probs", "advantages", "token_weight", "rollout_log_probs"), zero),  # type: ignore[arg-type]
            loss_mask=torch.ones(1, dtype=torch.bool),
            row=torch.zeros(1, dtype=torch.long),
            num_rows=1,
        )
        return list(call(zero, one_token)[2])

    return correct


def _per_token(value: Any, like: torch.Tensor) -> torch.Tensor:
    """A metric of [R], or of one number, as [R]."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).expand(like.shape)


def custom_loss(path: str, config: Config) -> Callable[[LossInputs], LossOutputs]:
    """The loss `f(args, tokens) -> (token_losses, metrics)` of --custom-loss-function-path as a loss of ours.

    tokens: `LossInputs` of a micro-batch, `R` tokens, zeros where a token is not trained on. token_losses: [R] with gradient;
    `token_weight` sums them, so that no split over ranks and micro-batches changes the loss. metrics: of [R] or one number
    each, logged as means over the trained tokens under `train/custom/`; their names are the same in every call. Where a
    micro-batch has no token the hook is given one of zeros instead, for the names alone. Raises HookError for a result of another form.
    """
    flag = "--custom-loss-function-path"
    hook = load_hook(path, flag=flag, parameters=("args", "tokens"))
    args = args_view(config)

    def loss(inputs: LossInputs) -> LossOutputs:
        tokens = trained_tokens(inputs)
        mask, weight = tokens.loss_mask, tokens.token_weight
        if len(mask):
            values, means = call(tokens)
        else:
            # Ranks reduce metrics together, so their names have to be found out also where there is no loss.
            values, means = tokens.log_probs, dict.fromkeys(call(_one_token(tokens))[1], tokens.log_probs)
        metrics = {f"custom/{name}": mean(value, mask, weight) for name, value in means.items()}
        counts = {SCORED_TOKENS: total(torch.ones_like(weight), mask), TOTAL_WEIGHT: total(weight, mask)}
        # A loss that does not use the policy has no gradient, and megatron goes back through every micro-batch.
        return LossOutputs(masked_sum(values, mask, weight) + tokens.log_probs.sum() * 0, {**metrics, **counts})

    def call(tokens: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        result = hook(args, tokens)
        if not isinstance(result, tuple) or len(result) != 2:
            raise HookError(f"{flag}, got {type(result).__name__} of {path}: it returns (token_losses, metrics)")
        values, told = result
        if not isinstance(values, torch.Tensor) or values.shape != tokens.log_probs.shape:
            raise HookError(
                f"{flag}, got token_losses of {getattr(values, 'shape', None)} from {path}: the micro-batch has "
                f"{tuple(tokens.log_probs.shape)}; return one loss for each token"
            )
        try:
            return values, {str(name): _per_token(value, values) for name, value in dict(told or {}).items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise HookError(
                f"{flag}, got metrics of another form of {path} ({error}): return one number, or one for each token"
            ) from error

    return loss


def _one_token(empty: LossInputs) -> LossInputs:
    """`empty`, a micro-batch without tokens, with a row of one token of zeros in each column that it has."""
    like = empty.log_probs
    columns = {
        **{name: like.new_zeros(1) for name in TOKEN_COLUMNS if getattr(empty, name) is not None},
        "row": torch.zeros(1, dtype=torch.long, device=like.device),
        "loss_mask": torch.ones(1, dtype=torch.bool, device=like.device),
        "total_lengths": torch.ones(1, dtype=torch.long, device=like.device),
        "row_weight": None if empty.row_weight is None else like.new_ones(1),
        "policy_mask": None,
    }
    return dataclasses.replace(empty, num_rows=1, **columns)  # type: ignore[arg-type]  # every value is a tensor field
