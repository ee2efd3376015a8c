"""Reinforcement-learning arithmetic as pure functions: arrays in, arrays out, no configuration and no process group."""

from .advantages import advantage_estimators, equal_reward_groups, grpo_advantages
from .aggregation import aggregations, loss_weights
from .corrections import corrections
from .kl import kl, kl_estimators
from .losses import policy_loss, surrogates
from .metrics import Metric, finish_metrics, merge_metrics
from .mismatch import mismatch_metrics
from .reductions import masked, masked_max, masked_mean, masked_sum
from .spec import PolicyLossSpec
from .terms import Term

__all__ = [
    "Metric",
    "PolicyLossSpec",
    "Term",
    "advantage_estimators",
    "aggregations",
    "corrections",
    "equal_reward_groups",
    "finish_metrics",
    "grpo_advantages",
    "kl",
    "kl_estimators",
    "loss_weights",
    "masked",
    "masked_max",
    "masked_mean",
    "masked_sum",
    "merge_metrics",
    "mismatch_metrics",
    "policy_loss",
    "surrogates",
]
