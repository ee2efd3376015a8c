"""What trains a critic, and how good its values are.

Legend: `R` tokens of a micro-batch, or of a rank's whole batch.
"""

from __future__ import annotations

import torch

from miles.interfaces import Reduce
from miles.types import LossOutputs

from .metrics import TOTAL_WEIGHT, mean, total
from .reductions import identity, masked, masked_sum
from .returns import value_loss


def critic_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    *,
    clip: float | None,
) -> LossOutputs:
    """`sum_t w_t value_loss_t` over the trained tokens; `w_t` holds the whole aggregation, as in the policy loss.

    All [R]: values with gradient, those before the first update, the returns, the mask (bool) and the weights. What
    untrained tokens hold is never read. Metrics: `value_loss`, `value_clipfrac` (the share of tokens whose loss is that of
    the clipped value, which has no gradient), `loss`.
    """
    values, old_values, returns = (masked(column, mask) for column in (values, old_values.detach(), returns.detach()))
    losses = value_loss(values, old_values, returns, clip=clip)
    held = losses.detach() > value_loss(values, old_values, returns, clip=None).detach()
    metrics = {
        "value_loss": total(losses, mask, weight),
        "value_clipfrac": mean(held.to(losses.dtype), mask, weight),
        TOTAL_WEIGHT: total(weight, mask),
    }
    loss = masked_sum(losses, mask, weight)
    return LossOutputs(loss, {**metrics, "loss": ("sum", loss.detach())})


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, reduce: Reduce = identity
) -> float | None:
    """`1 - Var(G - V) / Var(G)` over the trained tokens of all ranks: 1 is a perfect critic, 0 one that knows the mean alone.

    values, returns, mask: [R]. None where all returns are the same. Every rank calls it, also one without tokens.
    """
    residual, target = (masked(column, mask).double() for column in (returns - values, returns))
    sums = reduce(torch.stack([residual.sum(), target.sum(), mask.sum().double()]))
    count = sums[2].clamp(min=1)
    centred = [masked(column - total_ / count, mask) for column, total_ in ((residual, sums[0]), (target, sums[1]))]
    squares = reduce(torch.stack([c.square().sum() for c in centred]))
    # Returns that are the same but for rounding have no variance to explain.
    scale = float(sums[1].abs() / count) or 1.0
    if float(squares[1] / count) <= (1e-6 * scale) ** 2:
        return None
    return 1.0 - float(squares[0] / squares[1])
