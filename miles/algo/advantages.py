"""From the rewards of trajectories to their advantages. Legend: `N` trajectories, `G` those of one prompt (a group), `R` reward.

    Outcomes --estimator, by name--> [N] float64 --(trainer) returns over tokens, whitening: returns.py--> [tokens]

Computed in float64 on the host, once per rollout, before anything is split over ranks. Every estimator is a function under
`@advantage_estimators.register(name)` of `(outcomes, spec)`.

Conventions of all that compare within a group: a group of one gets 0; a group of equal rewards gets exactly 0, whatever float
rounding makes of its mean and standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .registry import Registry

#: Added to a standard deviation, outside the root.
STD_EPS = 1e-6


@dataclass(frozen=True)
class Outcomes:
    """How the trajectories of one rollout ended. ValueError for shapes that disagree and values that are not finite."""

    rewards: np.ndarray
    """[N] what is maximised; with several rewards their weighted sum."""
    group: np.ndarray
    """[N] integers, equal within a group, in any order."""
    lengths: np.ndarray | None = None
    """[N] trained response tokens."""
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name -> [N], the separate rewards where there are several."""
    greedy: np.ndarray | None = None
    """[N] reward of the greedy answer to the same prompt."""

    def __post_init__(self) -> None:
        rewards, group = np.asarray(self.rewards, dtype=np.float64), np.asarray(self.group)
        if rewards.ndim != 1 or group.shape != rewards.shape:
            raise ValueError(f"rewards and group, got shapes {rewards.shape} and {group.shape}: both must be [N]")
        object.__setattr__(self, "rewards", rewards)
        object.__setattr__(self, "group", group)
        object.__setattr__(self, "parts", {k: np.asarray(v, dtype=np.float64) for k, v in self.parts.items()})
        for name in ("lengths", "greedy"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        columns = {"reward": rewards, "length": self.lengths, "greedy reward": self.greedy}
        columns |= {f"reward {name}": part for name, part in self.parts.items()}
        for name, column in columns.items():
            if column is None:
                continue
            if column.shape != rewards.shape:
                raise ValueError(f"{name}, got shape {column.shape} for {len(rewards)} trajectories: it must be [N]")
            if not np.isfinite(column).all():
                bad = int(np.flatnonzero(~np.isfinite(column))[0])
                raise ValueError(
                    f"{name} of trajectory {bad}, got {column[bad]}: it spoils its whole group; score it or leave it out"
                )


@dataclass(frozen=True)
class AdvantageSpec:
    """What estimators can be told, as plain values."""

    normalize_std: bool = True
    """grpo, gdpo: divide by the group's standard deviation."""
    baseline: bool = True
    """grpo: False leaves the rewards as they are."""
    k: int = 1
    """pass_at_k: answers that may be tried."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """gdpo: weight of each separate reward; 1 where it is not named."""


class AdvantageEstimator(Protocol):
    """`[N]` float64 advantages. ValueError for rewards that it is not defined for."""

    def __call__(self, outcomes: Outcomes, spec: AdvantageSpec) -> np.ndarray: ...


advantage_estimators: Registry[AdvantageEstimator] = Registry("advantage estimator")


class Groups:
    """Statistics of the groups, spread over their members. All arrays [N] unless said otherwise."""

    def __init__(self, group: np.ndarray):
        names, self._number = np.unique(group, return_inverse=True)
        self._count = len(names)
        self.size = np.bincount(self._number, minlength=self._count)[self._number]

    def sum(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._number, values, self._count)[self._number]

    def mean(self, values: np.ndarray) -> np.ndarray:
        return self.sum(values) / self.size

    def std(self, values: np.ndarray) -> np.ndarray:
        """With ddof 1; 0 for a group of one."""
        return np.sqrt(self.sum((values - self.mean(values)) ** 2) / np.maximum(self.size - 1, 1))

    def constant(self, values: np.ndarray) -> np.ndarray:
        """Bool: whether all values of the group are the same, up to the rounding of a float64 sum."""
        high, low = np.full(self._count, -np.inf), np.full(self._count, np.inf)
        np.maximum.at(high, self._number, values)
        np.minimum.at(low, self._number, values)
        rounding = 4 * np.finfo(np.float64).eps * np.maximum(np.abs(high), np.abs(low))
        return (high - low <= rounding)[self._number]

    def members(self) -> list[np.ndarray]:
        """Positions of each group's members."""
        order = np.argsort(self._number, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self._number, minlength=self._count))[:-1]) if len(order) else []


def equal_reward_groups(rewards: np.ndarray, group: np.ndarray) -> np.ndarray:
    """`[N]` bool: whether all rewards of a trajectory's group are the same, so that it teaches nothing.

    Rewards that differ by the rounding of a float64 sum (0.1 + 0.2 against 0.3) are the same. A group of one is too.
    """
    outcomes = Outcomes(rewards, group)
    return Groups(outcomes.group).constant(outcomes.rewards)


def group_normalized(values: np.ndarray, groups: Groups, *, std: bool) -> np.ndarray:
    """`(values - mean_G) / (std_G + 1e-6)`, or without the division; 0 where the group is constant. All [N]."""
    centred = values - groups.mean(values)
    if std:
        centred = centred / (groups.std(values) + STD_EPS)
    return np.where(groups.constant(values), 0.0, centred)


@advantage_estimators.register("grpo", "gspo")
def grpo(outcomes: Outcomes, spec: AdvantageSpec) -> np.ndarray:
    """`(R - mean_G) / (std_G + 1e-6)`. arXiv 2402.03300; without the division 2503.20783 (Dr.GRPO).

    The standard deviation has ddof 1 and the epsilon stands outside the root. GSPO (2507.18071) has the same advantage.
    """
    if not spec.baseline:
        return outcomes.rewards.copy()
    return group_normalized(outcomes.rewards, Groups(outcomes.group), std=spec.normalize_std)


@advantage_estimators.register("rloo")
def rloo(outcomes: Outcomes, spec: AdvantageSpec) -> np.ndarray:
    """`R_i - mean of R_j over j != i in the group`, which is `G / (G - 1) (R_i - mean_G)`. arXiv 2402.14740."""
    groups = Groups(outcomes.group)
    centred = group_normalized(outcomes.rewards, groups, std=False)
    return centred * groups.size / np.maximum(groups.size - 1, 1)


@advantage_estimators.register("reinforce_plus_plus")
def reinforce_plus_plus(outcomes: Outcomes, spec: AdvantageSpec) -> np.ndarray:
    """`R`, the terminal reward of a discounted return with KL penalties at each token, whitened over the batch.

    arXiv 2501.03262. Return and whitening are those of `token_advantages`.
    """
    return outcomes.rewards.copy()


@advantage_estimators.register("ppo")
def ppo(outcomes: Outcomes, spec: AdvantageSpec) -> np.ndarray:
    """`R`, the terminal reward of GAE with a critic's values, whitened over the batch. arXiv 1707.06347, 1506.02438.

    GAE and whitening are those of `returns.critic_advantages`.
    """
    return outcomes.rewards.copy()


@advantage_estimators.register("reinforce_plus_plus_baseline")
def reinforce_plus_plus_baseline(outcomes: Outcomes, spec: AdvantageSpec) -> np.ndarray:
    """`R - mean_G`, then return and whitening as in `reinforce_plus_plus`. arXiv 2501.03262."""
    return group_normalized(outcomes.rewards, Groups(outcomes.group), std=False)


@advantage_estimators.register("gdpo")
def gdpo(outcomes: Outcomes, spec: AdvantageSpec) -> np.ndarray:
    """`S = sum_k w_k (R_k - mean_G) / (std_G + 1e-6)`, then `(S - mean) / (std + 1e-6)` over the batch. arXiv 2601.05242.

    A reward that is constant in a group adds 0 there. The batch is all `N` trajectories, its standard deviation has ddof 1.
    Where no group tells its members apart all advantages are 0.
    """
    if not outcomes.parts:
        raise ValueError("rewards, got one: gdpo normalises several, each by itself; give them with --reward-weights")
    groups = Groups(outcomes.group)
    total = np.zeros(len(outcomes.rewards))
    for name, part in outcomes.parts.items():
        total += spec.weights.get(name, 1.0) * group_normalized(part, groups, std=spec.normalize_std)
    return group_normalized(total, Groups(np.zeros(len(total), dtype=np.int64)), std=True)


@advantage_estimators.register("maxrl")
def maxrl(outcomes: Outcomes, spec: AdvantageSpec) -> np.ndarray:
    """`(R - mean_G) / mean_G`, 0 where the mean is 0. arXiv 2602.02710.

    For rewards of 0 and 1 its gradient is that of a truncated series of the log of the success probability, which is
    `1/K sum over the K successes of grad log p` minus a zero-mean control variate. Not defined for negative rewards.
    """
    rewards = outcomes.rewards
    if (rewards < 0).any():
        bad = int(np.flatnonzero(rewards < 0)[0])
        raise ValueError(
            f"reward of trajectory {bad}, got {rewards[bad]}: maxrl divides by the group's mean, whose sign would turn the "
            "update around; give rewards of 0 and more"
        )
    groups = Groups(outcomes.group)
    mean = groups.mean(rewards)
    return group_normalized(rewards, groups, std=False) / np.where(mean > 0, mean, 1.0)


@advantage_estimators.register("remax")
def remax(outcomes: Outcomes, spec: AdvantageSpec) -> np.ndarray:
    """`R - R(greedy answer to the same prompt)`. arXiv 2310.10505."""
    if outcomes.greedy is None:
        raise ValueError(
            "greedy rewards, got none: remax takes them as its baseline; let the rollout make a greedy answer"
        )
    return outcomes.rewards - outcomes.greedy


@advantage_estimators.register("opo")
def opo(outcomes: Outcomes, spec: AdvantageSpec) -> np.ndarray:
    """`R - sum_G(L R) / sum_G(L)`, `L` trained tokens: the baseline of least variance. arXiv 2505.23585.

    A group without tokens gets 0.
    """
    if outcomes.lengths is None:
        raise ValueError(
            "lengths, got none: opo weights its baseline by them; pass the trained tokens of each trajectory"
        )
    groups = Groups(outcomes.group)
    total = groups.sum(outcomes.lengths)
    baseline = groups.sum(outcomes.lengths * outcomes.rewards) / np.maximum(total, 1)
    return np.where(groups.constant(outcomes.rewards) | (total == 0), 0.0, outcomes.rewards - baseline)


@advantage_estimators.register("pass_at_k")
def pass_at_k(outcomes: Outcomes, spec: AdvantageSpec) -> np.ndarray:
    """Mean over the subsets of `k` answers that hold answer `i` of `(best reward of the subset - mean) / std`. 2508.10751.

    Mean and standard deviation are those of the best reward over all subsets of the group. With rewards of 0 and 1 and
    `n` failures among `G`: `mean = 1 - C(n,k)/C(G,k)`, `std = sqrt(mean (1 - mean))`, a success gets `(1 - mean) / std`, a
    failure `(1 - mean - C(n-1,k-1)/C(G-1,k-1)) / std`. The closed form here is for any rewards. Where all subsets are as
    good the advantage is 0; so it is in a group that has fewer than `k` answers left, the others having failed.
    """
    out = np.zeros(len(outcomes.rewards))
    for members in Groups(outcomes.group).members():
        if len(members) >= spec.k:
            out[members] = _best_of_k(outcomes.rewards[members], spec.k)
    return out


def _best_of_k(rewards: np.ndarray, k: int) -> np.ndarray:
    """The advantages of one group of at least `k`, [G]. Legend: `p` position in ascending order, from 0."""
    size = len(rewards)
    order = np.argsort(rewards, kind="stable")
    ascending = rewards[order]
    positions = np.arange(size)
    # The answer at p is the best of C(p, k-1) of the C(size, k) subsets: those that fill up from below it.
    share = _ratios(positions, k - 1, math.comb(size, k))
    mean = share @ ascending
    variance = share @ (ascending - mean) ** 2
    if variance <= (4 * np.finfo(np.float64).eps * np.abs(ascending).max()) ** 2:
        return np.zeros(size)
    # Of the C(size-1, k-1) subsets that hold p, it is the best of C(p, k-1), and q > p is of C(q-1, k-2).
    subsets = math.comb(size - 1, k - 1)
    own = _ratios(positions, k - 1, subsets) * ascending
    above = _ratios(positions - 1, k - 2, subsets) * ascending if k > 1 else np.zeros(size)
    later = np.cumsum(above[::-1])[::-1] - above
    out = np.empty(size)
    out[order] = (own + later - mean) / np.sqrt(variance)
    return out


def _ratios(n: np.ndarray, k: int, total: int) -> np.ndarray:
    """`C(n, k) / total` for each n, 0 where `n < k`. Through whole numbers: no binomial is too large."""
    return np.array([math.comb(int(i), k) / total if i >= k else 0.0 for i in n])
