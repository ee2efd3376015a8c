"""Supervised fine-tuning: likelihood of tokens that are given. Legend: `R` tokens, `C` channels.

How much a token counts (--loss-scale) and what is averaged is in `token_weight`, as for policy losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch

from miles.types import LossInputs, LossOutputs

from .metrics import SCORED_TOKENS, TOTAL_WEIGHT, Metric, mean, own_mean, total
from .reductions import masked, masked_sum
from .registry import Registry
from .terms import required, trained_tokens

#: [R] log-probs with gradient -> [R] loss of each token.
TokenLoss: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
token_losses: Registry[TokenLoss] = Registry("supervised loss")


@token_losses.register("cross_entropy")
def cross_entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """`-log p`."""
    return -log_probs


@token_losses.register("dft")
def dft(log_probs: torch.Tensor) -> torch.Tensor:
    """`-sg(p) log p`: tokens that the model finds unlikely no longer dominate. arXiv 2508.05629."""
    return -log_probs.detach().exp() * log_probs


def channel_weights(tokens: LossInputs) -> Iterator[tuple[str, torch.Tensor]]:
    """Each of `tokens.channels` with `token_weight` [R] of its own tokens, 0 elsewhere.

    Raises ValueError where it is not told which rows are of which.
    """
    if tokens.channels:
        of_token = required(tokens.channel, "channel", "a loss by channel").index_select(0, tokens.row)
        for number, channel in enumerate(tokens.channels):
            yield channel, masked(tokens.token_weight, of_token == number)


def sft_loss(inputs: LossInputs, kind: str = "cross_entropy") -> LossOutputs:
    """`sum_t w_t * token_loss_t` over the trained tokens.

    Metrics: `nll`, mean of `-log p` by `token_weight`, whatever `kind` is; `nll_<channel>`, the same over the tokens of each
    of `inputs.channels`, each with its own denominator; `entropy` where it is given.
    Raises ConfigError for an unknown kind.
    """
    tokens = trained_tokens(inputs)
    mask, weight = tokens.loss_mask, tokens.token_weight
    values = token_losses.get(kind)(tokens.log_probs)
    metrics: dict[str, Metric] = {
        "nll": mean(-tokens.log_probs, mask, weight),
        SCORED_TOKENS: total(torch.ones_like(weight), mask),
        TOTAL_WEIGHT: total(weight, mask),
    }
    if tokens.entropy is not None:
        metrics["entropy"] = mean(tokens.entropy, mask, weight)
    for channel, own in channel_weights(tokens):
        metrics |= own_mean(f"nll_{channel}", -tokens.log_probs, mask, own)
    return LossOutputs(masked_sum(values, mask, weight), metrics)
