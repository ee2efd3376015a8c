"""From one advantage a trajectory to one a token: penalties in the reward, returns, whitening.

    [B] advantage of each row --KL penalty, discounted return--> [R] --distillation term--> [R] --whitened over the batch--> [R]
    with a critic:              --KL penalty--> rewards [R] --GAE with values [R]--> [R] --as above--> [R], and returns [R]

Needs log-probs, so it runs where they are: in the trainer, after its scoring passes and before the first update.
Untrained tokens are skipped, not decayed across: a return passes over them as if they were not there.
Legend: `R` response tokens of this rank's whole batch, rows side by side; `B` rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from miles.interfaces import Reduce

from .kl import kl
from .reductions import identity, masked

#: Added to the standard deviation that advantages are whitened by.
WHITEN_EPS = 1e-8


@dataclass(frozen=True)
class TokenAdvantageSpec:
    """What happens to advantages at token level; the defaults leave them as they are."""

    kl_coef: float = 0.0
    """Weight of the KL penalty in the reward."""
    kl_type: str = "k1"
    """Its estimator, see `kl.kl_estimators`."""
    gamma: float = 1.0
    """Discount of a later reward, for each trained token between."""
    opd_kl_coef: float = 0.0
    """Weight of the on-policy distillation term."""
    whiten: bool = False
    """Mean 0 and standard deviation 1 over the trained tokens of the batch."""
    lambd: float | None = None
    """Lambda of GAE, which takes values; None is a plain return."""

    @property
    def is_identity(self) -> bool:
        return not (self.kl_coef or self.opd_kl_coef or self.whiten) and self.gamma == 1 and self.lambd is None


def token_advantages(
    advantages: torch.Tensor,
    mask: torch.Tensor,
    row: torch.Tensor,
    spec: TokenAdvantageSpec,
    *,
    old_log_probs: torch.Tensor | None = None,
    ref_log_probs: torch.Tensor | None = None,
    teacher_log_probs: torch.Tensor | None = None,
    reduce: Reduce = identity,
) -> torch.Tensor:
    """`A_t = sum_{s >= t} gamma^(s - t) (-kl_coef KL_s + [s is the last] A) - opd_kl_coef (log p - log p_teacher)`, whitened.

    advantages: [B] of rows. mask: [R] bool, trained tokens. row: [R] int64 ascending. Log-probs: [R] of the policy before
    the update, of the reference and of the teacher; whatever untrained tokens hold is not read. Positions count trained
    tokens. Returns [R] float32, 0 where the mask is off. `reduce` sums over the ranks that share the batch; every rank
    calls this, also one without tokens. Raises ValueError where a log-prob column is missing.
    """
    trained = mask.nonzero().squeeze(1)
    rewards = _token_rewards(advantages, trained, row, spec, old_log_probs, ref_log_probs)
    values = discounted_suffix_sums(rewards, row[trained], spec.gamma)
    return _finished(values, mask, trained, spec, old_log_probs, teacher_log_probs, reduce)


def critic_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    row: torch.Tensor,
    spec: TokenAdvantageSpec,
    *,
    old_log_probs: torch.Tensor | None = None,
    ref_log_probs: torch.Tensor | None = None,
    teacher_log_probs: torch.Tensor | None = None,
    reduce: Reduce = identity,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE of `r_t = -kl_coef KL_t + [t is the last] R`: advantages of the tokens, and the returns that the critic learns.

    rewards: [B] of rows. values: [R] of the critic, before each token. The rest as in `token_advantages`, which the
    advantages go on as: distillation term, whitening. Returns ([R], [R]) float32, 0 where the mask is off; the returns are
    `A + V` with `A` as GAE gives it. `spec.lambd` is set.
    """
    assert spec.lambd is not None
    trained = mask.nonzero().squeeze(1)
    kept = torch.ones_like(trained, dtype=torch.bool)
    token_rewards = _token_rewards(rewards, trained, row, spec, old_log_probs, ref_log_probs)
    found, returns = gae(
        token_rewards, values[trained].double(), kept, row[trained], gamma=spec.gamma, lambd=spec.lambd
    )
    advantages = _finished(found, mask, trained, spec, old_log_probs, teacher_log_probs, reduce)
    return advantages, _spread(returns, mask, trained)


def _token_rewards(
    rewards: torch.Tensor,
    trained: torch.Tensor,
    row: torch.Tensor,
    spec: TokenAdvantageSpec,
    old_log_probs: torch.Tensor | None,
    ref_log_probs: torch.Tensor | None,
) -> torch.Tensor:
    """`-kl_coef KL_t`, at a row's last trained token plus its reward: [trained tokens] float64."""
    rows = row[trained]
    values = torch.zeros(len(trained), dtype=torch.float64, device=rewards.device)
    if len(trained):
        is_last = torch.ones_like(rows, dtype=torch.bool)
        is_last[:-1] = rows[1:] != rows[:-1]
        values[is_last] = rewards.double()[rows[is_last]]
        if spec.kl_coef:
            policy, reference = _pair(old_log_probs, ref_log_probs, "ref_log_probs", "--kl-coef")
            values -= spec.kl_coef * kl(spec.kl_type, policy[trained].double(), reference[trained].double())
    return values


def _finished(
    values: torch.Tensor,
    mask: torch.Tensor,
    trained: torch.Tensor,
    spec: TokenAdvantageSpec,
    old_log_probs: torch.Tensor | None,
    teacher_log_probs: torch.Tensor | None,
    reduce: Reduce,
) -> torch.Tensor:
    """[trained tokens] -> [R]: with the distillation term, whitened."""
    if spec.opd_kl_coef and len(trained):
        policy, teacher = _pair(old_log_probs, teacher_log_probs, "teacher_log_probs", "--use-opd")
        values = values + spec.opd_kl_coef * distillation_advantage(policy[trained], teacher[trained]).double()
    if spec.whiten:
        values = whiten(values, torch.ones_like(values, dtype=torch.bool), reduce=reduce)
    return _spread(values, mask, trained)


def _spread(values: torch.Tensor, mask: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """[trained tokens] -> [R] float32, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=torch.float32, device=values.device).index_copy(0, trained, values.float())


def distillation_advantage(log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    """`-(log p_student - log p_teacher)`, [R]: minus the sampled reverse KL at each token.

    Added to any advantage, times `--opd-kl-coef`. https://thinkingmachines.ai/blog/on-policy-distillation/
    """
    return (teacher_log_probs - log_probs).detach()


def discounted_suffix_sums(values: torch.Tensor, row: torch.Tensor, decay: float) -> torch.Tensor:
    """`y_t = x_t + decay * y_{t+1}` within each row, [R]. row: [R] ascending.

    By doubling: after step k, `y_t` holds the next `2^k` terms. log2(longest row) passes over the tokens.
    """
    if not len(values):
        return values
    longest = int(torch.bincount(row).max())
    sums, shift = values.clone(), 1
    while shift < longest:
        same = row[shift:] == row[:-shift]
        ahead = torch.where(same, sums[shift:] * decay**shift, torch.zeros((), dtype=sums.dtype, device=sums.device))
        sums = torch.cat([sums[:-shift] + ahead, sums[-shift:]])
        shift *= 2
    return sums


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, row: torch.Tensor, *, gamma: float, lambd: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns: `A_t = sum_{s >= t} (gamma lambda)^(s - t) delta_s`, `delta_t = r_t + gamma V_{t+1} - V_t`.

    arXiv 1506.02438. rewards, values, mask, row: [R]; the value after a row's last trained token is 0. Untrained tokens are
    skipped: the next value is that of the next trained token, and nothing decays across them. Returns `(A, A + V)`, [R],
    both 0 where the mask is off. Whiten the advantages with `whiten`.
    """
    trained = mask.nonzero().squeeze(1)
    rows, v = row[trained], values[trained].detach()
    following = torch.zeros_like(v)
    if len(v):
        following[:-1] = torch.where(rows[1:] == rows[:-1], v[1:], torch.zeros_like(v[1:]))
    delta = rewards[trained] + gamma * following - v
    advantages = discounted_suffix_sums(delta, rows, gamma * lambd)
    empty = torch.zeros(mask.shape, dtype=v.dtype, device=v.device)
    return empty.index_copy(0, trained, advantages), empty.index_copy(0, trained, advantages + v)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, clip: float | None
) -> torch.Tensor:
    """`0.5 max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2)` at each token, [R]; without a clip `0.5 (V - G)^2`.

    arXiv 1707.06347, with the clip of its reference implementation. values: [R] with gradient; old_values, returns: [R]
    data. Untrained tokens are left out by the sum that follows: `reductions.masked_sum`.
    """
    target = returns.detach()
    error = (values - target).square()
    if clip is not None:
        old = old_values.detach()
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - target).square())
    return 0.5 * error


def whiten(values: torch.Tensor, mask: torch.Tensor, *, reduce: Reduce = identity) -> torch.Tensor:
    """`(x - mean) / (std + 1e-8)` over `mask` of all ranks that `reduce` sums over, 0 elsewhere. [R].

    The standard deviation is the population's (ddof 0). Values that are all the same become exactly 0, also where rounding
    makes their variance positive. Every rank calls it, also one without tokens.
    """
    kept = masked(values, mask).double()
    first = reduce(torch.stack([kept.sum(), mask.sum().double()]))
    count = first[1].clamp(min=1)
    mean = first[0] / count
    centred = masked(kept - mean, mask)
    second = reduce(torch.stack([centred.square().sum(), kept.square().sum()])) / count
    std, scale = second[0].sqrt(), second[1].sqrt()
    out = centred / (std + WHITEN_EPS)
    # Rounding of the mean is a few units in the last place of the values' size.
    return torch.where(std <= 8 * torch.finfo(torch.float64).eps * scale, torch.zeros_like(out), out).to(values.dtype)


def _pair(
    policy: torch.Tensor | None, other: torch.Tensor | None, name: str, flag: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if policy is None or other is None:
        missing = "old_log_probs" if policy is None else name
        raise ValueError(f"{missing}, got None: {flag} needs it; pass the column or switch {flag} off")
    return policy, other
