"""Per-token estimators of KL(policy || reference) from tokens that the policy sampled.

With `d = ref_log_prob - log_prob`: `k1 = -d`, `k2 = d^2 / 2`, `k3 = e^d - 1 - d` (also named low_var_kl).
http://joschu.net/blog/kl-approx.html. Legend: `R` tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .registry import Registry

#: Log-ratios are clamped to +-20 before `exp`: e^20 is 5e8, far past any ratio that carries information, and its square
#: still fits a float32.
LOG_RATIO_LIMIT = 20.0

#: [R] log-ratio reference - policy -> [R] estimate
KlEstimator = Callable[[torch.Tensor], torch.Tensor]

kl_estimators: Registry[KlEstimator] = Registry("KL estimator")


def clamped_log_ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """`numerator - denominator` (log-probs), clamped to +-20 so that its `exp` is finite."""
    return (numerator - denominator).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


@kl_estimators.register("k1")
def k1(d: torch.Tensor) -> torch.Tensor:
    """`-d`. Unbiased, high variance, may be negative. As a loss its gradient is zero in expectation."""
    return -d


@kl_estimators.register("k2")
def k2(d: torch.Tensor) -> torch.Tensor:
    """`d^2 / 2`. Biased, low variance; its gradient is that of the true KL in expectation."""
    return d.square() / 2


@kl_estimators.register("k3", "low_var_kl")
def k3(d: torch.Tensor) -> torch.Tensor:
    """`e^d - 1 - d`. Unbiased, low variance, never negative. `d` is clamped to +-20, the value is not."""
    d = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    # expm1 keeps the digits that `exp(d) - 1` loses near d = 0, where a healthy run lives.
    return torch.expm1(d) - d


def kl(kind: str, log_probs: torch.Tensor, ref_log_probs: torch.Tensor) -> torch.Tensor:
    """Estimate of KL(policy || reference) at each token, `[R]`, with gradient through `log_probs`.

    kind: `k1`, `k2`, `k3` or `low_var_kl`. log_probs: [R] of the policy that is trained. ref_log_probs: [R].
    Both must be finite where the result is used: mask first. Raises ConfigError for an unknown kind.
    """
    return kl_estimators.get(kind)(ref_log_probs - log_probs)
