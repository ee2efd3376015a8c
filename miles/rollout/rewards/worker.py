"""One reward worker: `python -m miles.rollout.rewards.worker`, started and killed by `pool.RewardPool`.

    stdin --frames--> hook or rule --frames--> stdout as it was at the start; prints of hooks go to stderr

Sync functions run one after the other in the main thread, where also signal-based time limits of users' code work.
Async ones overlap. The worker ends with its parent: at the end of stdin, and by PDEATHSIG when it is too busy to see it.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import inspect
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from miles.config import args_view, config_from_dict, import_plugins
from miles.errors import HookError
from miles.interfaces import Args
from miles.rollout.failures import explain
from miles.types import Sample

from . import frames, registry
from .target import Target, is_concurrent

#: What a reward may change of a sample besides its reward; everything else is what the engine made and stays.
CHANGEABLE = frozenset({"metadata", "train_metadata", "remove_sample", "loss_mask"})
_PR_SET_PDEATHSIG = 1


class Worker:
    """Serves calls until stdin ends."""

    def __init__(self, replies: Any):
        self._replies = replies
        self._functions: dict[str, Callable[..., Any]] = {}
        self._args: Args | None = None

    def set_up(self, setup: dict[str, Any]) -> dict[str, bool]:
        """Imports everything that will be called. Returns target key -> may calls overlap."""
        sys.path.extend(path for path in setup["sys_path"] if path not in sys.path)
        config = config_from_dict(setup["config"])
        import_plugins(config)
        self._args = args_view(config)
        for target in (Target(**t) for t in setup["targets"]):
            self._functions[target.key] = target.load()
        for module in setup["modules"]:
            importlib.import_module(module)
        for name in setup["rules"]:
            Target("rule", name).load()
            if (prepare := registry.find(name).prepare) is not None:
                prepare(self._args)
        return {key: is_concurrent(function) for key, function in self._functions.items()}

    def reply(self, frame: frames.Frame) -> None:
        self._replies.write(frames.encode(frame))
        self._replies.flush()

    async def serve(self, requests: asyncio.StreamReader) -> None:
        running: set[asyncio.Task[None]] = set()
        while (call := await frames.read(requests)) is not None:
            target = Target(**call["target"])
            if target.key not in self._functions:
                self._functions[target.key] = target.load()
            if is_concurrent(self._functions[target.key]):
                for number in range(len(call["items"])):
                    task = asyncio.create_task(self._score(call, number, target))
                    running.add(task)
                    task.add_done_callback(running.discard)
            else:
                for number in range(len(call["items"])):
                    await self._score(call, number, target)

    async def _score(self, call: frames.Frame, number: int, target: Target) -> None:
        where = {"id": call["id"], "item": number}
        try:
            rewards, changes = await self._run(call, number, target)
            reply = frames.encode({**where, "rewards": rewards, "changes": changes})
        except TimeoutError as error:
            reply = frames.encode({**where, "error": str(error), "traceback": "", "timeout": True})
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            reply = frames.encode({**where, "error": text, "traceback": explain(error), "timeout": False})
        self._replies.write(reply)
        self._replies.flush()

    async def _run(self, call: frames.Frame, number: int, target: Target) -> tuple[list[Any], list[dict[str, Any]]]:
        function, given = self._functions[target.key], call["items"][number]
        samples = [Sample.from_dict(_copy(data)) for data in given]
        offered = {"seed": call["seeds"][number], "timeout_s": call["timeout_s"], "evaluation": call["evaluation"]}
        if target.kind == "rule":
            offered |= registry.offered(target.name, samples[0])
        assert self._args is not None
        try:
            result = registry.call(function, self._args, samples if target.group else samples[0], **offered)
        except TimeoutError as error:  # the hook's own
            raise HookError(f"TimeoutError: {error}") from error
        if inspect.isawaitable(result):
            try:
                async with asyncio.timeout(call["timeout_s"]):
                    result = await result
            except TimeoutError as error:
                if str(error):  # the hook's own
                    raise HookError(f"TimeoutError: {error}") from error
                raise TimeoutError(f"no reward within {call['timeout_s']:g} s") from None
        rewards = check_rewards(result if target.group else [result], len(samples), target.name)
        return rewards, [_changes(data, sample, target.name) for data, sample in zip(given, samples, strict=True)]


def check_rewards(rewards: Any, num_samples: int, name: str) -> list[Any]:
    """`rewards` with numbers made plain floats. Raises `HookError` for anything that is no reward."""
    if not isinstance(rewards, list | tuple) or len(rewards) != num_samples:
        got = f"{len(rewards)} rewards" if isinstance(rewards, list | tuple) else type(rewards).__name__
        raise HookError(f"{name}, got {got} for {num_samples} samples: return a list with one reward for each")
    return [_check_reward(reward, name) for reward in rewards]


def _check_reward(reward: Any, name: str) -> Any:
    if isinstance(reward, dict):  # numbers of numpy and torch become Python's
        return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in reward.items()}
    try:
        if isinstance(reward, str | bytes):
            raise TypeError
        value = float(reward)
    except (TypeError, ValueError):
        raise HookError(f"{name}, got {reward!r}: a reward is a number or a dict; return one") from None
    if not math.isfinite(value):
        raise HookError(f"{name}, got {value}: a reward must be finite")
    return value


def _changes(before: dict[str, Any], sample: Sample, name: str) -> dict[str, Any]:
    """The fields that the reward changed. Raises `HookError` for one that it must not change."""
    after = sample.to_dict()
    changed = {key for key, value in before.items() if after[key] != value and key != "reward"}
    if forbidden := changed - CHANGEABLE:
        raise HookError(
            f"{name}, got a change of sample.{min(forbidden)}: a reward may change {', '.join(sorted(CHANGEABLE))}; "
            "return the reward instead of rewriting what was generated"
        )
    return {key: after[key] for key in changed}


def _copy(value: Any) -> Any:
    """A deep copy of JSON."""
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_copy(v) if isinstance(v, dict | list) else v for v in value]
    return value


def _die_with_parent() -> None:
    """Asks the kernel for SIGKILL when the thread that started us ends; where that is unknown, stdin's end must do."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _private_streams() -> tuple[int, int]:
    """Takes stdin and stdout away from everyone else: reads of hooks get nothing, their prints go to stderr."""
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, replies


async def _main() -> None:
    requests_fd, replies_fd = _private_streams()
    requests = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(requests), os.fdopen(requests_fd, "rb", buffering=0)
    )
    with os.fdopen(replies_fd, "wb") as replies:
        worker = Worker(replies)
        first = await frames.read(requests)
        if first is None:
            return
        try:
            ready = worker.set_up(first["setup"])
        except Exception as error:
            worker.reply({"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
            return
        worker.reply({"ready": ready})
        await worker.serve(requests)
    os._exit(0)  # the pool is gone: whatever a hook still does is for nobody


if __name__ == "__main__":
    _die_with_parent()
    asyncio.run(_main())
