"""Gives samples their rewards: chooses the reward of each sample and where it runs.

    sample --metadata["rm_type"] > hook > --rm-type--> inline rule | quick verdict | service | worker
                                                                     |
           sample.reward, or status FAILED with `error`  <-----------'

Several rewards (`math,format`) are scored side by side and become one dict.

Consumes generated samples, changes them in place. Waits for reward workers and services, each under its time limit.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import logging
import math
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from miles.errors import HookError
from miles.interfaces import Args
from miles.rollout.failures import explain
from miles.types import Sample, Status, reward_parts

from . import registry
from .pool import Failed, Item, RewardPool, Scored
from .registry import Rule
from .target import Target
from .worker import CHANGEABLE, check_rewards

logger = logging.getLogger(__name__)

#: Large, or not JSON, and of no use to a reward.
_NOT_SENT = ("rollout_routed_experts", "rollout_log_probs")


@dataclass(frozen=True)
class RewardSource:
    """Where the rewards of a training run, or of one evaluation data set, come from."""

    rm_type: str | None = None
    hook: str | None = None
    group: bool = False
    """The hook scores whole groups."""
    reward_key: str | None = None
    evaluation: bool = False
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    """Entries of a dict that count together, where `reward_key` names none."""


class Scorer:
    """`pool` may be None where no reward needs a worker."""

    def __init__(self, args: Args, pool: RewardPool | None):
        self._args = args
        self._pool = pool

    async def score(self, samples: Sequence[Sample], seeds: Sequence[int], source: RewardSource) -> list[str]:
        """Sets the reward of every sample that has none yet and did not fail. `seeds` are for random rewards.

        A sample whose reward cannot be had becomes FAILED with the reason in `error`. Returns the failures' tracebacks.
        """
        open_ = [i for i, s in enumerate(samples) if s.reward is None and s.status is not Status.FAILED]
        tracebacks = await self._score_open(samples, seeds, source, open_)
        for i in open_:
            tracebacks += _check_entries(samples[i], source)
        return tracebacks

    async def _score_open(
        self, samples: Sequence[Sample], seeds: Sequence[int], source: RewardSource, open_: Sequence[int]
    ) -> list[str]:
        tracebacks: list[str] = []
        by_target: dict[Target, list[int]] = {}
        waits: list[Awaitable[list[str]]] = []
        several: list[tuple[int, list[str]]] = []
        for i in open_:
            try:
                target = self._target(samples[i], source)
                if target.kind == "hook":
                    by_target.setdefault(target, []).append(i)
                    continue
                if len(names := registry.split(target.name)) > 1:
                    several.append((i, names))
                    continue
                rule = registry.find(target.name)
                if rule.inline:
                    # Without a task for each where there is nothing to wait for: the last answers' rewards hold up the step.
                    result = self._call_inline(samples[i], seeds[i], rule, target.name)
                    if inspect.isawaitable(result):
                        waits.append(self._take_awaited(samples[i], result, target.name))
                    else:
                        _take(samples[i], result, target.name)
                elif rule.quick is None or (verdict := rule.quick(samples[i])) is None:
                    by_target.setdefault(target, []).append(i)
                else:
                    samples[i].reward = verdict
            except Exception as error:
                fail(samples[i], error)
                tracebacks.append(explain(error))
        waits += [
            self._score_in_worker([samples[i] for i in group], [seeds[i] for i in group], target, source)
            for target, group in by_target.items()
        ]
        if several:
            waits.append(self._score_several([(samples[i], seeds[i], names) for i, names in several], source))
        for found in await asyncio.gather(*waits):
            tracebacks += found
        return tracebacks

    async def _score_several(
        self, jobs: Sequence[tuple[Sample, int, Sequence[str]]], source: RewardSource
    ) -> list[str]:
        """Each reward on a copy of its sample, all samples at once; one that fails fails the sample."""
        copies = [
            [dataclasses.replace(sample, metadata={**sample.metadata, "rm_type": name}) for name in names]
            for sample, _, names in jobs
        ]
        seeds = [seed for _, seed, names in jobs for _ in names]
        tracebacks = await self._score_open([c for of in copies for c in of], seeds, source, range(len(seeds)))
        for (sample, _, names), scored in zip(jobs, copies, strict=True):
            try:
                _merge(sample, names, scored)
            except HookError as error:
                fail(sample, error)
                tracebacks.append(explain(error))
        return tracebacks

    @staticmethod
    def _target(sample: Sample, source: RewardSource) -> Target:
        named = sample.metadata.get("rm_type")
        if named is None and source.hook is not None:
            return Target("hook", source.hook, source.group)
        rm_type = named if named is not None else source.rm_type
        if rm_type is None:
            raise HookError(
                f"reward of sample {sample.index}, got no reward type: neither --rm-type, --custom-rm-path nor "
                'metadata["rm_type"] names one; give one of them'
            )
        return Target("rule", rm_type)

    def _call_inline(self, sample: Sample, seed: int, rule: Rule, rm_type: str) -> Any:
        offered = registry.offered(rm_type, sample, seed=seed, timeout_s=self._limit_s(rule))
        return registry.call(rule.function, self._args, sample, **offered)

    @staticmethod
    async def _take_awaited(sample: Sample, result: Awaitable[Any], rm_type: str) -> list[str]:
        try:
            _take(sample, await result, rm_type)
        except Exception as error:
            fail(sample, error)
            return [explain(error)]
        return []

    def _limit_s(self, rule: Rule | None) -> float:
        limit_s = float(self._args.rm_timeout)
        return limit_s if rule is None or rule.time_limit_s is None else min(limit_s, rule.time_limit_s)

    async def _score_in_worker(
        self, samples: list[Sample], seeds: list[int], target: Target, source: RewardSource
    ) -> list[str]:
        assert self._pool is not None, f"reward {target.key} needs a worker"
        rule = registry.find(target.name) if target.kind == "rule" else None
        batches = [samples] if target.group else [[sample] for sample in samples]
        items = [Item([_to_dict(s) for s in batch], seed) for batch, seed in zip(batches, seeds, strict=False)]
        try:
            outcomes = await self._pool.run(
                target,
                items,
                timeout_s=self._limit_s(rule),
                retry=rule is None,  # a rule gives the same answer again
                evaluation=source.evaluation,
            )
        except TypeError as error:
            outcomes = [Failed(f"a sample cannot be sent to a reward worker: {error}")] * len(items)
        tracebacks: list[str] = []
        for batch, outcome in zip(batches, outcomes, strict=True):
            if isinstance(outcome, Scored):
                for sample, reward, changes in zip(batch, outcome.rewards, outcome.changes, strict=True):
                    sample.reward = reward
                    for name, value in changes.items():
                        setattr(sample, name, value)
            elif outcome.timeout and rule is not None and rule.timeout_reward is not None:
                for sample in batch:
                    value = rule.timeout_reward
                    sample.reward = value(self._args, sample) if callable(value) else value
                    sample.metadata = {**sample.metadata, "reward_timeout": True}
            else:
                for sample in batch:
                    sample.status, sample.error = Status.FAILED, f"reward {target.name}: {outcome.error}"
                tracebacks.append(outcome.traceback or f"reward {target.name}: {outcome.error}")
        return tracebacks


def _take(sample: Sample, reward: Any, rm_type: str) -> None:
    (sample.reward,) = check_rewards([reward], 1, rm_type)


def _merge(sample: Sample, names: Sequence[str], copies: Sequence[Sample]) -> None:
    """The copies' rewards as one dict, and what the rewards changed otherwise."""
    failed = next((copy for copy in copies if copy.status is Status.FAILED), None)
    if failed is not None:
        sample.status, sample.error = failed.status, failed.error
        return
    named = {name: sample.metadata[name] for name in ("rm_type",) if name in sample.metadata}
    before = {name: getattr(sample, name) for name in CHANGEABLE - {"metadata"}}
    for copy in copies:
        for name, value in before.items():
            if (new := getattr(copy, name)) is not value:
                setattr(sample, name, new)
        del copy.metadata["rm_type"]
        sample.metadata = {**sample.metadata, **copy.metadata, **named}
    sample.reward = registry.combine({name: copy.reward for name, copy in zip(names, copies, strict=True)})


def fail(sample: Sample, error: BaseException) -> None:
    """Marks the sample FAILED with the exception's text."""
    sample.status, sample.error = Status.FAILED, f"{type(error).__name__}: {error}"


def scalar(reward: Any, reward_key: str | None, reward_weights: Mapping[str, float]) -> float:
    """The number that counts of a reward that was scored: itself, or of a dict the entry or the weighted entries."""
    parts = reward_parts(reward, reward_key, reward_weights)
    assert not isinstance(parts, str), parts
    return sum(weight * value for weight, value in parts.values())


def _check_entries(sample: Sample, source: RewardSource) -> list[str]:
    """A dict needs --reward-key or --reward-weights to say which of its numbers train."""
    if not isinstance(sample.reward, dict) or sample.status is Status.FAILED:
        return []
    names = [source.reward_key] if source.reward_key is not None else list(source.reward_weights)
    for name in names:
        value = sample.reward.get(name)
        if name in sample.reward and not (isinstance(value, int | float) and math.isfinite(value)):
            text = f"reward of sample {sample.index}, got {value!r} in {name!r}: it must be a finite number; mend the reward"
            fail(sample, HookError(text))
            return [text]
    parts = reward_parts(sample.reward, source.reward_key, source.reward_weights)
    if not isinstance(parts, str):
        return []
    fail(sample, HookError(text := f"reward of sample {sample.index}, {parts}"))
    return [text]


def _to_dict(sample: Sample) -> dict[str, Any]:
    data = sample.to_dict()
    for name in _NOT_SENT:
        data[name] = None
    return data
