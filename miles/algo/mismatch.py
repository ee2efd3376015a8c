"""How far the trainer's log-probs are from the engine's, for the same tokens: the first thing to look at when a run breaks.

A gap of about 1e-2 is ordinary with different kernels, 1e-5 means numerical agreement. Legend: `R` tokens.
"""

from __future__ import annotations

import torch

from .kl import clamped_log_ratio, kl
from .metrics import ESS_W, ESS_W2, Metric, largest, mean, total


def mismatch_metrics(
    train_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor
) -> dict[str, Metric]:
    """Gap between trainer and engine over `mask`; all inputs [R], finite under the mask.

    `train_rollout_logprob_abs_diff` and `..._max`: mean and largest |trainer - engine|. `train_rollout_kl`: k3 estimate
    of KL(engine || trainer), the engine having sampled. `ess_w`, `ess_w2`: pieces of the effective sample size of
    w = exp(trainer - engine), see `finish_metrics`.
    """
    gap = (train_log_probs - rollout_log_probs).abs()
    w = clamped_log_ratio(train_log_probs, rollout_log_probs).exp()
    return {
        "train_rollout_logprob_abs_diff": mean(gap, mask, weight),
        "train_rollout_logprob_abs_diff_max": largest(gap, mask),
        "train_rollout_kl": mean(kl("k3", rollout_log_probs, train_log_probs), mask, weight),
        ESS_W: total(w, mask),
        ESS_W2: total(w.square(), mask),
    }
