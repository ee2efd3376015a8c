"""What a rollout's batch is given before its first update, from the scoring passes: advantages of tokens, and which count.

    advantages of rows, log-probs (old, reference) --> advantages of response tokens      token_advantages
    rewards of rows, the same, values of a critic  --> advantages and returns             critic_advantages
    entropies of the old policy                    --> tokens that the policy loss counts  entropy_mask

All are in the batch's order of response tokens `[R]`, and all are collectives: every data-parallel rank calls them, also
one without rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from miles import algo
from miles.algo.kl import kl
from miles.algo.top_share import top_share
from miles.config.groups import GrpoArgs
from miles.types import TrainBatch

from .parallel import Parallel


def token_advantage_spec(grpo: GrpoArgs) -> algo.TokenAdvantageSpec:
    """The GRPO flags, as advantages of tokens take them."""
    return algo.TokenAdvantageSpec(
        kl_coef=grpo.kl_coef,
        kl_type=grpo.kl_loss_type,
        gamma=grpo.gamma,
        whiten=bool(grpo.normalize_advantages),
        opd_kl_coef=grpo.opd_kl_coef if grpo.use_opd else 0.0,
        lambd=grpo.lambd if grpo.advantage_estimator == "ppo" else None,
    )


def token_advantages(
    batch: TrainBatch,
    spec: algo.TokenAdvantageSpec,
    parallel: Parallel,
    old: Tensor | None,
    reference: Tensor | None,
    teacher: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Advantages [R] of the response tokens, and what they were made of: `reward_kl`, `teacher_kl`, `advantage_abs`."""
    mask, row = _trained(batch, parallel.device)
    reduce = parallel.sum_over_data
    advantages = algo.token_advantages(
        torch.from_numpy(batch.rows["rewards"]).to(parallel.device),
        mask,
        row,
        spec,
        old_log_probs=old,
        ref_log_probs=reference,
        teacher_log_probs=teacher,
        reduce=reduce,
    )
    return advantages, _advantage_metrics(advantages, mask, spec, parallel, old, reference, teacher)


def critic_advantages(
    batch: TrainBatch,
    spec: algo.TokenAdvantageSpec,
    parallel: Parallel,
    values: Tensor,
    old: Tensor | None,
    reference: Tensor | None,
    teacher: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Advantages [R] and returns [R] of the response tokens, from the critic's values [R]; and what they were made of:
    `value`, `return`, `explained_variance` (where returns differ), and the metrics of `token_advantages`."""
    mask, row = _trained(batch, parallel.device)
    reduce = parallel.sum_over_data
    rewards = torch.from_numpy(batch.rows["rewards"]).to(parallel.device)
    advantages, returns = algo.critic_advantages(
        rewards,
        values,
        mask,
        row,
        spec,
        old_log_probs=old,
        ref_log_probs=reference,
        teacher_log_probs=teacher,
        reduce=reduce,
    )
    metrics = _advantage_metrics(advantages, mask, spec, parallel, old, reference, teacher)
    metrics["value"] = float(algo.masked_mean(values.double(), mask, reduce))
    metrics["return"] = float(algo.masked_mean(returns.double(), mask, reduce))
    explained = algo.explained_variance(values, returns, mask, reduce)
    if explained is not None:
        metrics["explained_variance"] = explained
    return advantages, returns, metrics


def _advantage_metrics(
    advantages: Tensor,
    mask: Tensor,
    spec: algo.TokenAdvantageSpec,
    parallel: Parallel,
    old: Tensor | None,
    reference: Tensor | None,
    teacher: Tensor | None,
) -> dict[str, float]:
    reduce = parallel.sum_over_data
    metrics = {"advantage_abs": float(algo.masked_mean(advantages.abs().double(), mask, reduce))}
    if spec.kl_coef:
        assert old is not None
        assert reference is not None
        metrics["reward_kl"] = float(algo.masked_mean(kl(spec.kl_type, old, reference).double(), mask, reduce))
    if spec.opd_kl_coef:
        assert old is not None
        assert teacher is not None
        metrics["teacher_kl"] = float(algo.masked_mean((old - teacher).double(), mask, reduce))
    return metrics


def entropy_mask(batch: TrainBatch, entropies: Tensor, share: float, parallel: Parallel) -> Tensor:
    """[R] bool: of each optimizer step's trained tokens, over all ranks, the `share` of highest entropy."""
    mask, row = _trained(batch, parallel.device)
    chosen = torch.zeros_like(mask)
    for step in batch.steps:
        of_step = torch.zeros(batch.num_rows, dtype=torch.bool)
        of_step[torch.from_numpy(np.concatenate(step))] = True
        in_step = mask & of_step.to(parallel.device)[row]
        chosen |= top_share(entropies, in_step, share, reduce=parallel.sum_over_data)
    return chosen


def _trained(batch: TrainBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which response tokens are trained on, [R] bool, and their rows, [R] int64."""
    row = np.repeat(np.arange(batch.num_rows), batch.rows["response_lengths"])
    mask = (batch.ragged["loss_mask"] != 0) & (batch.rows["loss_weight"][row] != 0)
    return torch.from_numpy(mask).to(device), torch.from_numpy(row).to(device)
