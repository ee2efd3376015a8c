"""From scalar rewards of trajectories to their advantages. Legend: `N` trajectories.

Statistics are those of a group: the trajectories of one prompt. Computed in float64 on the host, once per rollout, before
anything is split over ranks.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .registry import Registry


class AdvantageEstimator(Protocol):
    """`[N]` rewards and `[N]` group ids to `[N]` float64 advantages."""

    def __call__(
        self, rewards: np.ndarray, group: np.ndarray, *, normalize_std: bool = True, baseline: bool = True
    ) -> np.ndarray: ...


advantage_estimators: Registry[AdvantageEstimator] = Registry("advantage estimator")


def equal_reward_groups(rewards: np.ndarray, group: np.ndarray) -> np.ndarray:
    """`[N]` bool: whether all rewards of a trajectory's group are the same, so that it teaches nothing.

    Rewards that differ by the rounding of a float64 sum (0.1 + 0.2 against 0.3) are the same. A group of one is too.
    """
    values, (number, num_groups) = _checked(rewards, group)
    high = np.full(num_groups, -np.inf)
    low = np.full(num_groups, np.inf)
    np.maximum.at(high, number, values)
    np.minimum.at(low, number, values)
    rounding = 4 * np.finfo(np.float64).eps * np.maximum(np.abs(high), np.abs(low))
    return (high - low <= rounding)[number]


@advantage_estimators.register("grpo")
def grpo_advantages(
    rewards: np.ndarray, group: np.ndarray, *, normalize_std: bool = True, baseline: bool = True, eps: float = 1e-6
) -> np.ndarray:
    """`A = (R - mean_G) / (std_G + eps)`. arXiv 2402.03300; without the division 2503.20783 (Dr.GRPO).

    rewards: [N] finite. group: [N] integers, equal within a group, in any order. Returns [N] float64.
    normalize_std=False leaves the division out; baseline=False returns the rewards themselves.

    Conventions: the standard deviation has ddof 1 and `eps` stands outside the root; a group of one gets 0; a group of
    equal rewards gets exactly 0, whatever float rounding makes of its standard deviation.
    Raises ValueError on shapes that disagree and on rewards that are not finite.
    """
    values, (number, num_groups) = _checked(rewards, group)
    if not baseline:
        return values.copy()
    size = np.bincount(number, minlength=num_groups)
    centred = values - (np.bincount(number, values, num_groups) / size)[number]
    if normalize_std:
        variance = np.bincount(number, centred**2, num_groups) / np.maximum(size - 1, 1)
        centred = centred / (np.sqrt(variance) + eps)[number]
    return np.where(equal_reward_groups(values, group), 0.0, centred)


def _checked(rewards: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, int]]:
    """Rewards as float64, and groups as consecutive numbers with their count."""
    values = np.asarray(rewards, dtype=np.float64)
    group = np.asarray(group)
    if values.ndim != 1 or group.shape != values.shape:
        raise ValueError(f"rewards and group, got shapes {values.shape} and {group.shape}: both must be [N]")
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"reward {bad}, got {values[bad]}: it spoils its whole group; score it or leave it out")
    names, number = np.unique(group, return_inverse=True)
    return values, (number, len(names))
