"""Off-policy corrections: factors, one a token and without gradient, that multiply the surrogate. Legend: `R` tokens.

@corrections.register("mis")
def mis(tokens, spec) -> Term: ...
"""

from __future__ import annotations

from miles.types import LossInputs

from .kl import clamped_log_ratio
from .metrics import mean
from .registry import Registry
from .spec import PolicyLossSpec
from .terms import Term, TermFn, required

corrections: Registry[TermFn] = Registry("correction")


@corrections.register("tis")
def truncated_importance_sampling(tokens: LossInputs, spec: PolicyLossSpec) -> Term:
    """`clamp(exp(train_old - rollout), tis_clip_low, tis_clip)`, without gradient: engine-sampled tokens under the trainer's policy.

    https://fengyao.notion.site/off-policy-rl. train_old is the trainer's log-prob before the update:
    `train_log_probs` where given, else `old_log_probs`. All [R].
    """
    rollout = required(tokens.rollout_log_probs, "rollout_log_probs", "--use-tis")
    train = tokens.old_log_probs if tokens.train_log_probs is None else tokens.train_log_probs
    ratio = clamped_log_ratio(train, rollout).exp()
    weight = ratio.clamp(spec.tis_clip_low, spec.tis_clip)
    mask, token_weight = tokens.loss_mask, tokens.token_weight
    return Term(
        weight,
        {
            "tis": mean(ratio, mask, token_weight),
            "tis_weight": mean(weight, mask, token_weight),
            "tis_clipfrac_low": mean((ratio < spec.tis_clip_low).to(ratio.dtype), mask, token_weight),
            "tis_clipfrac_high": mean((ratio > spec.tis_clip).to(ratio.dtype), mask, token_weight),
        },
    )
