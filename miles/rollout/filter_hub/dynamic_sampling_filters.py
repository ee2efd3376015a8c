"""Compatibility: the built-in filter under the path that launch scripts give to --dynamic-sampling-filter-path."""

from miles.rollout.filters import check_reward_nonzero_std

__all__ = ["check_reward_nonzero_std"]
