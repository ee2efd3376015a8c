"""Distillation from a teacher: how far the student's next-token distributions are from the teacher's.

    log-probs [n, V] of both, a chunk of tokens at a time --divergence--> [n]

With the vocabulary split over ranks each holds its columns of both tables, and `reduce` sums over the ranks; it must pass the
gradient on. Legend: `n` tokens of a chunk, `V` vocabulary (of this rank), `K` the teacher's top tokens, `T` teacher, `S` student.
"""

from __future__ import annotations

import math

import torch

from miles.interfaces import Reduce
from miles.types import LossInputs, LossOutputs

from .metrics import SCORED_TOKENS, TOTAL_WEIGHT, mean, own_mean, total
from .reductions import identity, masked, masked_sum
from .supervised import channel_weights
from .terms import required, trained_tokens

#: A log-prob whose `exp` is exactly 0, and which, unlike -inf, can be multiplied by that.
_NEVER = -1e4


def generalized_jsd(
    student: torch.Tensor, teacher: torch.Tensor, beta: float, reduce: Reduce = identity
) -> torch.Tensor:
    """`beta KL(T || M) + (1 - beta) KL(S || M)`, `M = beta T + (1 - beta) S`; 0 is KL(T || S), 1 is KL(S || T). [n]

    arXiv 2306.13649. student, teacher: [n, V] log-probs, normalised over the whole vocabulary, of logits that were divided by
    the temperature; a log-prob of -inf is a probability of 0. No factor of temperature squared. The gradient is that of the
    student; pass the teacher's detached.
    """
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(
            f"student and teacher, got {tuple(student.shape)} and {tuple(teacher.shape)}: both must be [n, V]"
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"beta, got {beta}: it mixes the two; give 0 to 1")
    student, teacher = student.clamp(min=_NEVER), teacher.clamp(min=_NEVER)
    if beta == 0:
        return reduce(_kl(teacher, student))
    if beta == 1:
        return reduce(_kl(student, teacher))
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return reduce(beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture))


def gkd_loss(inputs: LossInputs, sft_alpha: float = 0.0) -> LossOutputs:
    """`sum_t w_t (divergence_t - sft_alpha log p_t)` over the trained tokens. arXiv 2306.13649.

    Rows of `inputs.own_answer` have no term in `sft_alpha`: the student has nothing to imitate in its own answers. `divergence` [R] is `generalized_jsd` of each token's distributions. Metrics: `divergence` and `nll`, means by
    `token_weight`, and each as `<name>_<channel>` over the tokens of each of `inputs.channels`. Raises ValueError where the divergence is missing.
    """
    tokens = trained_tokens(inputs)
    mask, weight = tokens.loss_mask, tokens.token_weight
    values = divergence = required(tokens.divergence, "divergence", "--loss-type gkd")
    if sft_alpha:
        imitated = tokens.log_probs
        if tokens.own_answer is not None:
            imitated = masked(imitated, ~tokens.own_answer.index_select(0, tokens.row))
        values = values - sft_alpha * imitated
    metrics = {
        "divergence": mean(divergence, mask, weight),
        "nll": mean(-tokens.log_probs, mask, weight),
        SCORED_TOKENS: total(torch.ones_like(weight), mask),
        TOTAL_WEIGHT: total(weight, mask),
    }
    for channel, own in channel_weights(tokens):
        metrics |= own_mean(f"divergence_{channel}", divergence, mask, own)
        metrics |= own_mean(f"nll_{channel}", -tokens.log_probs, mask, own)
    return LossOutputs(masked_sum(values, mask, weight), metrics)


def with_remainder(top: torch.Tensor) -> torch.Tensor:
    """[n, K] log-probs of some tokens -> [n, K + 1]: what all others share is one more outcome.

    For a teacher that tells its top tokens alone: applied to its log-probs and the student's of the same tokens, both are
    distributions, and their divergence is a lower bound of the whole one. A remainder below the rounding of the given log-probs
    (1e-7 in float32) is not known better than that.
    """
    # Rounding may leave a sum of 1 and more: the remainder keeps the smallest probability that the sum can tell from 1.
    left = (1 - top.double().exp().sum(dim=-1, keepdim=True)).clamp(min=torch.finfo(top.dtype).eps)
    return torch.cat([top, left.log().to(top.dtype)], dim=-1)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`sum_v p (log p - log q)`, [n], of finite log-probs."""
    return (p.exp() * (p - q)).sum(dim=-1)
