"""Reinforcement-learning arithmetic as pure functions: arrays in, arrays out, no configuration and no process group.

`kl.kl`, `kl.kl_estimators` and `corrections.corrections` are imported from their modules, whose names they share.
Names here are imported when first used: the rollout manager and the command line need the numpy half alone, and torch takes two
seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .advantages import AdvantageSpec, Outcomes, advantage_estimators, equal_reward_groups
    from .aggregation import aggregations, loss_weights
    from .critic import critic_loss, explained_variance
    from .losses import policy_loss
    from .metrics import Metric, finish_metrics, merge_metrics
    from .mismatch import mismatch_metrics
    from .policy_losses import surrogates
    from .reductions import masked, masked_max, masked_mean, masked_sum
    from .returns import TokenAdvantageSpec, critic_advantages, gae, token_advantages, value_loss, whiten
    from .spec import PolicyLossSpec
    from .terms import Term

_HOMES = {
    "advantages": ("AdvantageSpec", "Outcomes", "advantage_estimators", "equal_reward_groups"),
    "aggregation": ("aggregations", "loss_weights"),
    "critic": ("critic_loss", "explained_variance"),
    "losses": ("policy_loss",),
    "metrics": ("Metric", "finish_metrics", "merge_metrics"),
    "mismatch": ("mismatch_metrics",),
    "policy_losses": ("surrogates",),
    "reductions": ("masked", "masked_max", "masked_mean", "masked_sum"),
    "spec": ("PolicyLossSpec",),
    "terms": ("Term",),
    "returns": ("TokenAdvantageSpec", "critic_advantages", "gae", "token_advantages", "value_loss", "whiten"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AdvantageSpec",
    "Metric",
    "Outcomes",
    "PolicyLossSpec",
    "Term",
    "TokenAdvantageSpec",
    "advantage_estimators",
    "aggregations",
    "critic_advantages",
    "critic_loss",
    "equal_reward_groups",
    "explained_variance",
    "finish_metrics",
    "gae",
    "loss_weights",
    "masked",
    "masked_max",
    "masked_mean",
    "masked_sum",
    "merge_metrics",
    "mismatch_metrics",
    "policy_loss",
    "surrogates",
    "token_advantages",
    "value_loss",
    "whiten",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value
