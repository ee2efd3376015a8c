"""Dynamic sampling: which scored groups are worth training on."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from miles.errors import HookError
from miles.interfaces import Args, DynamicFilterOutput
from miles.types import Sample, Status

#: A filter that has seen this many rollout batches of groups and still not kept one batch stops the run.
MAX_BATCHES_EXAMINED = 20


def check_reward_nonzero_std(args: Args, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    """Keeps a group whose rewards differ (DAPO's dynamic sampling); equal rewards have advantage 0 and teach nothing.

    FAILED samples do not count. Equal means equal up to rounding: twelve times 0.7 is dropped.
    """
    rewards = [s.get_reward_value(args) for s in samples if s.status is not Status.FAILED]
    if len(rewards) > 1 and not math.isclose(min(rewards), max(rewards), rel_tol=1e-6, abs_tol=1e-9):
        return DynamicFilterOutput(keep=True)
    return DynamicFilterOutput(keep=False, reason=f"zero_std_{round(rewards[0], 1):g}" if rewards else "all_failed")


class GroupFilter:
    """Applies a filter hook and counts what it drops. `hook` None keeps everything."""

    def __init__(self, hook: Callable[..., Any] | None, name: str, args: Args):
        self._hook = hook
        self._name = name
        self._args = args
        self.kept = 0
        self.dropped: Counter[str] = Counter()
        """Groups by reason, in this rollout."""

    def begin(self) -> None:
        """A new rollout: counts start at zero."""
        self.kept = 0
        self.dropped.clear()

    async def keep(self, samples: list[Sample]) -> bool:
        """The verdict on one scored group. Raises `HookError` when the hook raises or returns anything else."""
        if self._hook is None:
            self.kept += 1
            return True
        try:
            verdict = self._hook(self._args, samples)
            if inspect.isawaitable(verdict):
                verdict = await verdict
        except Exception as error:
            raise HookError(
                f"--dynamic-sampling-filter-path {self._name}, got {type(error).__name__}: {error}: it raised on group "
                f"{samples[0].group_index}; mend the filter"
            ) from error
        keep = getattr(verdict, "keep", verdict)
        if not isinstance(keep, bool):
            keep = self._as_bool(keep)
        if keep:
            self.kept += 1
        else:
            self.dropped[str(getattr(verdict, "reason", None) or "filtered")] += 1
        return keep

    def _as_bool(self, value: Any) -> bool:
        # numpy and torch comparisons give one-element arrays of bool
        if getattr(value, "shape", None) == () and "bool" in str(getattr(value, "dtype", "")):
            return bool(value)
        raise HookError(
            f"--dynamic-sampling-filter-path {self._name}, got {value!r}: it must return a bool or a DynamicFilterOutput"
        )

    def check_progress(self, target: int) -> None:
        """Raises `HookError` when `MAX_BATCHES_EXAMINED` batches were examined without one batch being kept."""
        examined = self.kept + sum(self.dropped.values())
        if self.kept < target and examined >= MAX_BATCHES_EXAMINED * target:
            counts = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())
            raise HookError(
                f"--dynamic-sampling-filter-path {self._name}, got {self.kept} of {examined} groups kept where {target} are "
                f"needed (dropped: {counts}): it would drop for ever; loosen the filter, or give prompts of fitting difficulty"
            )

    def metrics(self) -> dict[str, float]:
        out = {f"rollout/dropped/{reason}": float(count) for reason, count in self.dropped.items()}
        if self._hook is not None:
            out["rollout/dropped_groups"] = float(sum(self.dropped.values()))
        return out
