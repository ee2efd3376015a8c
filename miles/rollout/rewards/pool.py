"""Reward workers that can be killed: where hooks and computer algebra run.

    Scorer --call (the samples of a group)--> RewardPool --frames--> worker processes --rewards, changes--> Scorer

Each item of a call has a time limit. Cooperative (async) hooks are cancelled at it by the worker; one that blocks is
killed with its worker and all its child processes a moment later, and a new worker takes the place. Work that merely
shared the worker with a culprit is not blamed: it is done again, alone on a worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from miles.errors import HookError, ProcessDied, WaitTimeout
from miles.observe.vitals import KILL_LIMIT_S

from . import frames
from .target import Target

logger = logging.getLogger(__name__)

#: Calls of async hooks that overlap in one worker.
_CALLS_PER_WORKER = 64
#: Seconds after the time limit until a worker that has not answered is killed; async hooks are cancelled in between.
_GRACE_S = 0.5
#: Seconds for a worker to import everything. Slow disks and heavy hooks are common; hanging imports are rare.
_START_LIMIT_S = 180.0
_CLOSE_LIMIT_S = 2.0
#: A hook that never answered is given up after so many calls for each worker, and where it hangs no sooner than the first
#: call could be repeated to its end. Were every sample of a batch to run into the time limit, the failure policy would speak up only
#: after hours.
_SILENT_CALLS_PER_WORKER = 2


@dataclass(frozen=True)
class Item:
    """One reward call: a sample, or for a group hook all samples of the group."""

    samples: list[dict[str, Any]]
    """`Sample.to_dict`, without what no reward reads."""
    seed: int = 0


@dataclass(frozen=True)
class Scored:
    rewards: list[Any]
    """One for each sample of the item: float or dict."""
    changes: list[dict[str, Any]]
    """Fields that the reward changed, for each sample."""


@dataclass(frozen=True)
class Failed:
    error: str
    traceback: str = ""
    timeout: bool = False


#: The worker ended while it had more to do than this item: nobody knows who did it.
_LOST = Failed("its worker was lost")


@dataclass(eq=False)
class _Worker:
    """The pool's end of one worker process."""

    number: int
    process: asyncio.subprocess.Process
    concurrent: dict[str, bool] = field(default_factory=dict)
    calls: dict[int, asyncio.Queue[frames.Frame | None]] = field(default_factory=dict)
    """Replies of the calls in flight, by call id; None says that the worker ended."""
    exclusive: bool = False
    alive: bool = True
    reader: asyncio.Task[None] | None = None

    @property
    def stdin(self) -> asyncio.StreamWriter:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def stdout(self) -> asyncio.StreamReader:
        assert self.process.stdout is not None
        return self.process.stdout

    async def pump(self) -> None:
        """Hands replies to the calls that wait for them, until the worker ends."""
        while (frame := await frames.read(self.stdout)) is not None:
            if (queue := self.calls.get(frame["id"])) is not None:
                queue.put_nowait(frame)
        self.alive = False
        for queue in self.calls.values():
            queue.put_nowait(None)

    def kill(self) -> None:
        """Ends the worker and everything it started, at once."""
        self.alive = False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Kills the worker and waits until it is gone and its pipes are closed."""
        self.kill()
        self.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILL_LIMIT_S):
                await self.process.wait()
                if self.reader is not None:
                    await self.reader


class RewardPool:
    """`num_workers` worker processes, started by `start` or by the first call. Belongs to the event loop that uses it.

    Args:
        config: `miles.config.config_to_dict` of the run; hooks see it as `args`.
        targets: what will be called; imported by every worker at its start.
        modules: further modules to import then, so that no call pays for it.
        rules: names of the rewards that prepare themselves then.
        max_retries: repetitions of an item that raised or timed out.
    """

    def __init__(
        self,
        config: dict[str, Any],
        *,
        num_workers: int,
        targets: Sequence[Target] = (),
        modules: Sequence[str] = (),
        rules: Sequence[str] = (),
        max_retries: int = 0,
    ):
        self._setup = {
            "config": config,
            "targets": [_target_dict(t) for t in dict.fromkeys(targets)],
            "modules": list(modules),
            "rules": list(rules),
            "sys_path": [os.path.abspath(p) for p in sys.path],
        }
        self._num_workers = num_workers
        self._max_retries = max_retries
        self._workers: list[_Worker] = []
        self._started = False
        self._starting = asyncio.Lock()
        self._replacements: set[asyncio.Task[None]] = set()
        self._exchanges: set[asyncio.Task[list[Scored | Failed]]] = set()
        self._changed = asyncio.Condition()
        self._broken: Exception | None = None
        self._ids = itertools.count()
        self._numbers = itertools.count()
        self._closed = False
        self._answered: set[Target] = set()
        """Hooks that gave a reward, or raised an error, in time."""
        self._silent: Counter[Target] = Counter()
        """Calls that ended without either, by hook."""
        self._first_call: dict[Target, float] = {}
        self.kills = 0
        """Workers killed at a time limit or found dead, since the start."""

    async def start(self) -> None:
        """Returns when every worker has imported everything. Raises `HookError` with the first worker's reason."""
        async with self._starting:
            if not self._started:
                await self._start()
                self._started = True

    async def _start(self) -> None:
        started = await asyncio.gather(*(self._spawn() for _ in range(self._num_workers)), return_exceptions=True)
        self._workers = [w for w in started if isinstance(w, _Worker)]
        for result in started:
            if isinstance(result, BaseException):
                await self.close()
                raise result

    async def close(self) -> None:
        """Ends all workers. Safe to call twice."""
        self._closed = True
        await asyncio.gather(*self._replacements, return_exceptions=True)
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.stdin.close()
        for worker in workers:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(worker.process.wait(), _CLOSE_LIMIT_S)
            await worker.end()  # also what its hooks left behind
        async with self._changed:
            self._changed.notify_all()
        await asyncio.gather(*self._exchanges, return_exceptions=True)

    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    async def run(
        self,
        target: Target,
        items: Sequence[Item],
        *,
        timeout_s: float,
        retry: bool = True,
        evaluation: bool = False,
    ) -> list[Scored | Failed]:
        """Scores all items, in one message to one worker; what fails is repeated alone.

        Raises:
            ProcessDied: workers cannot be started any more.
            HookError: the hook has not answered since the start of the run.
        """
        if not self._started:
            await self.start()
        outcomes = await self._call(target, items, timeout_s=timeout_s, evaluation=evaluation)

        async def settle(number: int) -> Scored | Failed:
            outcome = outcomes[number]
            attempts = 0 if outcome is _LOST else 1
            while isinstance(outcome, Failed) and attempts <= (self._max_retries if retry else 0):
                await asyncio.sleep(0.0 if attempts == 0 else min(0.1 * 2**attempts, 5.0))
                (outcome,) = await self._call(
                    target, [items[number]], timeout_s=timeout_s, evaluation=evaluation, alone=True
                )
                attempts += 1
            return outcome

        return list(await asyncio.gather(*(settle(i) for i in range(len(items)))))

    async def _call(
        self, target: Target, items: Sequence[Item], *, timeout_s: float, evaluation: bool, alone: bool = False
    ) -> list[Scored | Failed]:
        """`_exchange`, which goes on to its end when the caller is cancelled: the worker stays in step, and alive."""
        task = asyncio.create_task(self._exchange(target, items, timeout_s, evaluation, alone))
        self._exchanges.add(task)
        task.add_done_callback(self._exchanges.discard)
        self._first_call.setdefault(target, time.monotonic())
        outcomes = await asyncio.shield(task)
        if target.kind == "hook":
            await self._give_up_on_the_silent(target, outcomes, timeout_s)
        return outcomes

    async def _give_up_on_the_silent(self, target: Target, outcomes: list[Scored | Failed], timeout_s: float) -> None:
        """Ends all calls, those that wait for a worker among them, when a hook hangs or dies whatever it is asked."""
        failed = [o for o in outcomes if isinstance(o, Failed)]
        if len(failed) < len(outcomes) or any(o.traceback for o in failed):
            self._answered.add(target)
        silent = [o for o in failed if o is not _LOST and not o.traceback]
        self._silent[target] += len(silent)
        if target in self._answered or self._silent[target] < _SILENT_CALLS_PER_WORKER * self._num_workers:
            return
        waited_s = time.monotonic() - self._first_call[target]
        if not silent or (silent[-1].timeout and waited_s < timeout_s * (1 + self._max_retries)):
            return
        async with self._changed:
            self._broken = HookError(
                f"--custom-rm-path {target.name}, got no reward and no error from any of its first {self._silent[target]} "
                f"calls: {silent[-1].error}; mend the hook, or raise --rm-timeout"
            )
            self._changed.notify_all()
        raise self._broken

    async def _exchange(
        self, target: Target, items: Sequence[Item], timeout_s: float, evaluation: bool, alone: bool
    ) -> list[Scored | Failed]:
        """One message and its replies. Items that never got theirs are `_LOST`, or failed where the blame is theirs."""
        concurrent = self._is_concurrent(target)
        message = frames.encode(
            {
                "id": (call_id := next(self._ids)),
                "target": _target_dict(target),
                "items": [item.samples for item in items],
                "seeds": [item.seed for item in items],
                "timeout_s": timeout_s,
                "evaluation": evaluation,
            }
        )
        exclusive = alone or not concurrent
        worker = await self._acquire(exclusive)
        replies: asyncio.Queue[frames.Frame | None] = asyncio.Queue()
        worker.calls[call_id] = replies
        outcomes: list[Scored | Failed | None] = [None] * len(items)
        cause = ""
        try:
            worker.stdin.write(message)
            loop = asyncio.get_running_loop()
            deadline = loop.time() + timeout_s + _GRACE_S
            while None in outcomes:
                async with asyncio.timeout_at(deadline):
                    frame = await replies.get()
                if frame is None:
                    cause = await self._obituary(worker)
                    break
                outcomes[frame["item"]] = _outcome(frame)
                if not concurrent:  # the next item begins now
                    deadline = loop.time() + timeout_s + _GRACE_S
        except TimeoutError:
            cause = f"no reward within {timeout_s:g} s; its worker was killed"
            worker.kill()
        except ConnectionError:
            cause = await self._obituary(worker)
        finally:
            worker.calls.pop(call_id, None)
            await self._release(worker)
        missing = [i for i, outcome in enumerate(outcomes) if outcome is None]
        blamed = missing[:1] if not concurrent else missing if exclusive and len(missing) == 1 else []
        for i in missing:
            outcomes[i] = Failed(cause, timeout=cause.startswith("no reward")) if i in blamed else _LOST
        return [outcome for outcome in outcomes if outcome is not None]

    def _is_concurrent(self, target: Target) -> bool:
        if target.kind == "rule":
            return False
        return any(w.concurrent.get(target.key, False) for w in self._workers)

    async def _acquire(self, exclusive: bool) -> _Worker:
        """A worker with room. The wait is bounded by the time limits of those who are being served."""
        async with self._changed:
            while True:
                if self._broken is not None:
                    raise self._broken
                if self._closed:
                    raise ProcessDied("reward pool, got a call after it was closed")
                free = [w for w in self._workers if w.alive and not w.exclusive]
                free = [w for w in free if (not w.calls if exclusive else len(w.calls) < _CALLS_PER_WORKER)]
                if free:
                    worker = min(free, key=lambda w: len(w.calls))
                    worker.exclusive = exclusive
                    return worker
                await self._changed.wait()

    async def _release(self, worker: _Worker) -> None:
        async with self._changed:
            worker.exclusive = False
            if not worker.alive and worker in self._workers:
                self._workers.remove(worker)
                self.kills += 1
                task = asyncio.create_task(self._replace(worker))
                self._replacements.add(task)
                task.add_done_callback(self._replacements.discard)
            self._changed.notify_all()

    async def _replace(self, dead: _Worker) -> None:
        await dead.end()
        if self._closed:
            return
        try:
            worker = await self._spawn()
        except (HookError, ProcessDied, WaitTimeout) as error:
            self._broken = error
        else:
            self._workers.append(worker)
        async with self._changed:
            self._changed.notify_all()

    async def _spawn(self) -> _Worker:
        """Starts a worker and waits until it is ready."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "miles.rollout.rewards.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # one kill ends it with all that it started
            limit=1 << 20,
        )
        worker = _Worker(next(self._numbers), process)
        try:
            worker.stdin.write(frames.encode({"setup": self._setup}))
            async with asyncio.timeout(_START_LIMIT_S):
                first = await frames.read(worker.stdout)
        except TimeoutError:
            await worker.end()
            raise WaitTimeout(
                f"reward worker {worker.number}, got no answer within {_START_LIMIT_S:g} s of its start: "
                "an import of the reward hook hangs; run `python -m miles.rollout.rewards` with it"
            ) from None
        except BaseException:
            await worker.end()
            raise
        if first is None:
            cause = await self._obituary(worker)
            await worker.end()
            raise ProcessDied(f"reward worker {worker.number}, {cause} while it started")
        if "error" in first:
            await worker.end()
            raise HookError(f"reward worker, got {first['error']}: it could not be set up\n{first['traceback']}")
        worker.concurrent = first["ready"]
        worker.reader = asyncio.create_task(worker.pump(), name=f"reward-worker-{worker.number}")
        return worker

    @staticmethod
    async def _obituary(worker: _Worker) -> str:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(worker.process.wait(), _CLOSE_LIMIT_S)
        code = worker.process.returncode
        return (
            f"its worker ended by {signal.Signals(-code).name}" if code and code < 0 else f"its worker exited ({code})"
        )


def _outcome(frame: frames.Frame) -> Scored | Failed:
    if "rewards" in frame:
        return Scored(frame["rewards"], frame["changes"])
    return Failed(frame["error"], frame["traceback"], frame["timeout"])


def _target_dict(target: Target) -> dict[str, Any]:
    return {"kind": target.kind, "name": target.name, "group": target.group}
