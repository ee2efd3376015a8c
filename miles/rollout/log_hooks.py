"""Log hooks: what users make of a rollout's samples for their own records. They never stop a run.

    f(rollout_id, args, samples, rollout_extra_metrics, rollout_time) -> bool     --custom-rollout-log-function-path
    f(rollout_id, args, data, extra_metrics) -> bool                              --custom-eval-rollout-log-function-path

Numbers that a hook puts into the dict of metrics are logged with the step. True leaves out the metrics that we would have
logged there (`rollout/*`, `eval/*`). One that raises, or takes longer than --custom-log-timeout, is switched off.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from miles.config import Config, args_view, load_hook
from miles.interfaces import Args
from miles.types import Sample, Status, reward_parts

from .failures import explain
from .preflight import log_hook_flags

logger = logging.getLogger(__name__)


class LogHooks:
    """The log hooks of one run. Raises `HookError` where one cannot be loaded."""

    def __init__(self, config: Config):
        self._args: Args = args_view(config)
        self._limit_s = config.rollout.custom_log_timeout
        self._hooks: dict[str, tuple[str, Callable[..., Any]]] = {
            name: (f"{flag} {path}", load_hook(path, flag=flag, parameters=parameters, is_async=is_async))
            for name, (path, flag, parameters, is_async) in log_hook_flags(config).items()
        }

    @property
    def has_rollout(self) -> bool:
        """Whether there is one for training rollouts, and it was not switched off."""
        return "rollout" in self._hooks

    async def rollout(
        self, rollout_id: int, samples: Sequence[Sample], metrics: Mapping[str, float], rollout_time_s: float
    ) -> dict[str, float]:
        """`metrics` of a training rollout as they are to be logged. The hook may change neither them nor the training."""
        return await self._apply(
            "rollout", "rollout/", metrics, rollout_id, self._args, list(samples), after=(rollout_time_s,)
        )

    async def evaluation(
        self, rollout_id: int, samples_by_dataset: Mapping[str, Sequence[Sample]], metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """The same of an evaluation. `data` is {data set: {rewards, truncated, samples}} of the samples that did not fail."""
        data = {}
        for name, samples in samples_by_dataset.items() if "evaluation" in self._hooks else ():
            scored = [s for s in samples if s.status is not Status.FAILED]
            data[name] = {
                "rewards": [self._reward(sample) for sample in scored],
                "truncated": [s.status is Status.TRUNCATED for s in scored],
                "samples": scored,
            }
        return await self._apply("evaluation", "eval/", metrics, rollout_id, self._args, data)

    def _reward(self, sample: Sample) -> Any:
        """The number that trains; the whole reward where evaluation has dicts without that entry."""
        parts = reward_parts(sample.reward, self._args.reward_key, self._args.reward_weights)
        return sample.reward if isinstance(parts, str) else sample.get_reward_value(self._args)

    async def _apply(
        self, kind: str, ours: str, metrics: Mapping[str, float], *before: Any, after: tuple[Any, ...] = ()
    ) -> dict[str, float]:
        if kind not in self._hooks:
            return dict(metrics)
        what, hook = self._hooks[kind]
        extra: dict[str, Any] = dict(metrics)
        try:
            skip = await _in_thread(hook, *before, extra, *after, limit_s=self._limit_s)
            added = {k: _number(k, v) for k, v in dict(extra).items() if k not in metrics or v is not metrics[k]}
        except TimeoutError:
            why = f"it took longer than --custom-log-timeout {self._limit_s:g}"
        except Exception as error:
            why = explain(error).strip()
        else:
            kept = {k: v for k, v in metrics.items() if not (skip and k.startswith(ours))}
            return {**kept, **added}
        del self._hooks[kind]
        logger.warning("%s is switched off: %s", what, why)
        return dict(metrics)


async def _in_thread(hook: Callable[..., Any], *arguments: Any, limit_s: float) -> Any:
    """The hook's result. A thread that never ends is left behind and keeps nobody from ending. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not done.done():
            setter(value)

    def work() -> None:
        try:
            result = hook(*arguments)
        except Exception as error:
            loop.call_soon_threadsafe(settle, done.set_exception, error)
        except BaseException as error:  # sys.exit in a hook ends the hook
            loop.call_soon_threadsafe(settle, done.set_exception, RuntimeError(repr(error)))
        else:
            loop.call_soon_threadsafe(settle, done.set_result, result)

    threading.Thread(target=work, name="log-hook", daemon=True).start()
    return await asyncio.wait_for(done, limit_s)


def _number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"metric {key}, got {value!r}: it is not a number; log numbers alone") from None
    return number if math.isfinite(number) else math.nan
