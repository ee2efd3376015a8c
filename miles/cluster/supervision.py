"""Signs of life of all processes of a run, looked for whenever the driver waits for any of them.

    driver --beat, once a second--> control lane of each actor --> Beat(pid, trouble of what it looks after)
       '-- silent for --heartbeat-timeout? /proc says: stopped or frozen -> lost;  computing, or writing to a disk -> busy

A lost process ends the run with an error that names it, or is left to its owner in `lost()` where it can be replaced. A
process on another host cannot be looked at: there silence alone counts.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import psutil
import ray

from miles.errors import MilesError, ProcessDied, WaitTimeout
from miles.observe import tail
from miles.observe.memory import resident_bytes
from miles.observe.vitals import Vitals, describe, end, end_group, is_well, vitals

from .actors import Beat
from .waits import Process, clock, died

logger = logging.getLogger(__name__)

#: Between two looks; a driver whose waits are short asks for more.
_LOOK_S = 0.2
#: Between two questions to one process.
_BEAT_S = 1.0
#: What passes between the moment a process stops and the moment it is noticed, beyond the silence itself: the beat before
#: is up to a second old, and so is the driver's last look.
_LAG_S = 2.0
#: A driver that looked away for longer was stopped itself, or busy: silence counts anew.
_AWAY_S = 5.0
#: For processes that are asked out of turn.
_ASK_LIMIT_S = 5.0
#: For a frozen process to write its stacks to its log.
_DUMP_S = 0.5


@dataclass(frozen=True)
class Lost:
    """What became of a process."""

    error: MilesError
    whole: bool
    """The process itself is dead or stopped, not only the server that it looks after."""


@dataclass(eq=False)
class _Watched:
    """What the driver knows of one process."""

    process: Process
    asked: ray.ObjectRef | None = None
    asked_at: float = 0.0
    heard_at: float = field(default_factory=time.monotonic)
    beat: Beat | None = None
    before: Vitals | None = None
    """In the first half of its silence."""
    lost: Lost | None = None
    busy_noted: bool = False


class Supervisor:
    """Looks after the processes given to `watch`; a process is judged once it has answered for the first time."""

    def __init__(self, heartbeat_timeout_s: float):
        self._limit_s = silence_limit_s(heartbeat_timeout_s)
        self._node = ray.get_runtime_context().get_node_id()
        self._watched: dict[Process, _Watched] = {}
        self._ray = {pid: name for name, pid in ray_servers().items()}
        self._ray_well_at = dict.fromkeys(self._ray, time.monotonic())
        self._looked_at = time.monotonic()
        self._waiting_for = "its start"

    def watch(self, process: Process) -> None:
        self._watched[process] = _Watched(process)

    def forget(self, process: Process) -> None:
        self._watched.pop(process, None)

    def lost(self) -> Mapping[Process, Lost]:
        """The replaceable processes that are dead, silent, or report trouble with what they look after."""
        return {p: w.lost for p, w in self._watched.items() if w.lost is not None and p.replaceable}

    def end_server_of(self, process: Process) -> None:
        """Kills the server of a lost actor: stopped, it would outlive it."""
        w = self._watched[process]
        if w.lost is not None and w.lost.whole and w.beat is not None and w.beat.server_pid and self._is_local(w.beat):
            end_group(w.beat.server_pid)

    def memory(self) -> dict[str, float]:
        """`memory/<kind>_rss_bytes` of the largest process of each kind, as of its last sign of life, and of the driver."""
        found = {"memory/driver_rss_bytes": float(resident_bytes(os.getpid()))}
        for process, w in self._watched.items():
            if w.beat is not None:
                key = f"memory/{process.name.rstrip('-0123456789').replace('-', '_')}_rss_bytes"
                found[key] = max(found.get(key, 0.0), float(w.beat.rss_bytes))
        return found

    def ask_now(self, processes: Sequence[Process]) -> None:
        """Asks these processes anew, and waits a little for all of them."""
        asked = [self._watched[process] for process in processes]
        for w in asked:
            w.asked, w.asked_at = w.process.handle.beat.remote(), time.monotonic()
        until = time.monotonic() + _ASK_LIMIT_S
        while time.monotonic() < until and any(w.asked is not None and w.lost is None for w in asked):
            self._hear(timeout_s=0.1)
            self._ask()

    def _is_local(self, beat: Beat) -> bool:
        return beat.node == self._node

    def look(self, what: str, since: float) -> bool:
        """To be called at every turn of the driver's waits: for `what` since `since` (monotonic).

        Raises `ProcessDied` or `WaitTimeout` for a process that cannot be replaced, which is killed if it is stopped.
        Returns False: nothing was done about the wait.
        """
        now, self._waiting_for = time.monotonic(), what
        if now - self._looked_at < _LOOK_S:
            return False
        if now - self._looked_at > _AWAY_S:
            for w in self._watched.values():
                w.heard_at, w.before = now, None
            self._ray_well_at = dict.fromkeys(self._ray, now)
        self._looked_at = now
        self._hear()
        self._ask()
        waiting = f"while the driver waited for {what} (since {clock(since)})"
        for w in self._watched.values():
            if w.lost is None and now - w.heard_at > self._limit_s and (error := self._judge(w, waiting)):
                w.lost = Lost(error, whole=True)
            if w.lost is not None and not w.process.replaceable:
                raise w.lost.error
        self._look_at_ray(now, waiting)
        return False

    def _hear(self, timeout_s: float = 0.0) -> None:
        """Takes the answers that have come, or waits for one."""
        asked = {w.asked: w for w in self._watched.values() if w.asked is not None}
        if not asked:
            return
        answered, _ = ray.wait(list(asked), num_returns=len(asked) if not timeout_s else 1, timeout=timeout_s)
        for ref in answered:
            w = asked[ref]
            w.asked = None
            try:
                w.beat = ray.get(ref)
            except ray.exceptions.ActorUnavailableError:
                continue
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                w.lost = Lost(died(w.process, error, self._waiting_for), whole=True)
                continue
            except ray.exceptions.RayTaskError as error:
                w.lost = Lost(_no_sign(w.process, error), whole=True)
                continue
            w.heard_at, w.before, w.busy_noted = time.monotonic(), None, False
            if w.beat is not None and w.beat.trouble is not None:
                w.lost = Lost(ProcessDied(w.beat.trouble), whole=False)

    def _ask(self) -> None:
        """The next question to those that have answered the last one, a second ago."""
        now = time.monotonic()
        for w in self._watched.values():
            if w.asked is None and w.lost is None and now - w.asked_at >= _BEAT_S:
                w.asked, w.asked_at = w.process.handle.beat.remote(), now
            silent = now - w.heard_at > self._limit_s / 2
            if silent and w.before is None and w.beat is not None and self._is_local(w.beat):
                w.before = vitals(w.beat.pid)

    def _judge(self, w: _Watched, waiting: str) -> MilesError | None:
        """The error of a silent process; None for one that is still starting, or only busy."""
        if w.beat is None:
            return None
        pid, process = w.beat.pid, w.process
        if not self._is_local(w.beat):
            why = "it is stopped, frozen or cut off"
        else:
            state = vitals(pid)
            if state.is_busy(w.before):
                if not w.busy_noted:
                    logger.warning("%s is busy: no answer since %s, but it computes", process.name, clock(w.heard_at))
                w.busy_noted = True
                return None
            why = describe(pid, state)
            if state.state == "asleep":
                _dump_stacks(pid)
            end(pid)
        return WaitTimeout(
            f"process {process.name} (pid {pid}), got no sign of life since {clock(w.heard_at)} {waiting}: {why}; the limit is "
            f"--heartbeat-timeout; see {process.log}, which ends in:\n{tail(process.log)}"
        )

    def _look_at_ray(self, now: float, waiting: str) -> None:
        """Ray's own processes on this machine, where the run started them: they answer nobody when they are stopped."""
        for pid, name in self._ray.items():
            if is_well(pid):
                self._ray_well_at[pid] = now
                continue
            state = vitals(pid)
            if state.state == "gone":
                raise ProcessDied(
                    f"Ray's {name} (pid {pid}), got its end {waiting}: see the kernel's log; run it again"
                )
            if state.state != "stopped":
                self._ray_well_at[pid] = now
            elif now - self._ray_well_at[pid] > self._limit_s:
                end(pid)
                raise WaitTimeout(
                    f"Ray's {name} (pid {pid}), got no work done since {clock(self._ray_well_at[pid])} {waiting}: "
                    f"{describe(pid, state)}; the limit is --heartbeat-timeout"
                )


def _no_sign(process: Process, error: ray.exceptions.RayTaskError) -> MilesError:
    """The error of a process whose `beat` raises: what it is doing is anybody's guess."""
    logger.error("%s raised in its sign of life", process.name, exc_info=error)
    return ProcessDied(
        f"process {process.name}, got {error.cause!r} instead of a sign of life: it cannot be looked after; see {process.log}"
    )


def silence_limit_s(heartbeat_timeout_s: float) -> float:
    """How long a process may be silent, so that it is an error --heartbeat-timeout after it stopped."""
    return max(heartbeat_timeout_s - _LAG_S, heartbeat_timeout_s / 2)


def ray_servers() -> dict[str, int]:
    """Ray's servers that this process started, by name: none on a cluster that was joined."""
    return {c.name(): c.pid for c in psutil.Process().children() if c.name() in ("raylet", "gcs_server")}


def _dump_stacks(pid: int) -> None:
    """Asks a process that answers nothing for its stacks: `open_process_log` has them written without the GIL."""
    try:
        os.kill(pid, signal.SIGUSR2)
    except ProcessLookupError:
        return
    time.sleep(_DUMP_S)
