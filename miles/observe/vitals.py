"""A process of this machine as the kernel sees it: what tells a stopped one from one that is only busy."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

#: A process that used this share of a core while it was silent is computing (a long C call that holds the GIL); what Ray's
#: own threads use in a frozen one is far less.
BUSY_SHARE = 0.1

#: For the kernel to end what was killed: only a process in uninterruptible sleep (a dead network disk) takes longer, and
#: nobody can help it.
KILL_LIMIT_S = 10.0

State = Literal["gone", "stopped", "working", "asleep"]


@dataclass(frozen=True)
class Vitals:
    """One look at all threads of a process."""

    state: State
    """stopped: by SIGSTOP, SIGTSTP or a debugger. working: a thread runs, or waits for a disk. asleep: none does."""
    cpu_s: float
    """Of all threads, since the process began."""
    at_s: float
    """`time.monotonic()` of the look."""

    def is_busy(self, before: Vitals | None) -> bool:
        """Whether it works now, or has since `before`: then it answers late, and is not to be taken for frozen."""
        if self.state in ("working", "stopped", "gone") or before is None:
            return self.state == "working"
        return self.cpu_s - before.cpu_s >= BUSY_SHARE * (self.at_s - before.at_s)


def vitals(pid: int) -> Vitals:
    """Never raises: a process that cannot be looked at is gone."""
    states, ticks = [], 0
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            # The name in parentheses may hold blanks and parentheses itself.
            fields = path.read_text().rpartition(")")[2].split()
            states.append(fields[0])
            ticks += int(fields[11]) + int(fields[12])
    return Vitals(_state_of(states), ticks / os.sysconf("SC_CLK_TCK"), time.monotonic())


def is_well(pid: int) -> bool:
    """Whether it is there and not stopped, by its first thread alone: signals stop all threads of a process. One short read."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split(maxsplit=1)[0]
    except OSError:
        return False
    return state not in "TtZX"


def _state_of(threads: list[str]) -> State:
    if all(state in "ZX" for state in threads):
        return "gone"
    if any(state in "Tt" for state in threads):
        return "stopped"
    return "working" if any(state in "RD" for state in threads) else "asleep"


def describe(pid: int, now: Vitals) -> str:
    """Why a silent process is silent."""
    if now.state == "stopped":
        return f"it is stopped by a signal (`kill -CONT {pid}` would have let it go on)"
    return "its process is gone" if now.state == "gone" else "it is frozen, neither stopped nor computing"


def end(pid: int) -> None:
    """SIGKILL, which ends a stopped process as well; nothing if it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def end_group(pid: int) -> None:
    """SIGKILL to the process group that `pid` leads, if that is still an engine."""
    with contextlib.suppress(OSError):
        if b"miles.engines" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.killpg(pid, signal.SIGKILL)
