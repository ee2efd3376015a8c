"""How far a run is, or how it ended: RUN_DIR/state.json, written at each phase by the driver.

driver: StateFile.phase("train", step) ... StateFile.end("failed", error)
anyone: read_run_state(run_dir) -> RunState; its outcome is "killed" where nobody was left to write the end
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import orjson

from . import run_lock

#: Bytes of a state in place: blanks follow the JSON, so that a shorter one leaves nothing of the one before. Within one page.
_BLOCK = 1024

Outcome = Literal["running", "finished", "failed", "interrupted", "killed"]


@dataclass(frozen=True)
class RunState:
    """One run of the command. Times are seconds since 1970."""

    outcome: Outcome
    """`finished`: the loop came to its end; `failed`: an error; `interrupted`: Ctrl-C or SIGTERM; `killed`: none of them."""
    phase: str
    """What it was doing: "start", or a phase of the loop as in `perf/<phase>_time`."""
    step: int
    """The step of that phase: rollout `step - 1` was being made or trained."""
    first_step: int
    """What this process began with: 0, or the step of the checkpoint that it continues."""
    num_rollout: int
    started: float
    updated: float
    """Beginning of the phase, or the end of the run."""
    pid: int
    error: str = ""
    """The first line of what a failed run ended with."""


class StateFile:
    """The driver's side. A failure to write is not the run's failure.

    Phases are written in place, one write within one page, which a kill cannot cut in two: a file that replaces another takes
    ext4 half a millisecond, many times a second. Nothing is flushed to disk, unlike what a power failure must not take.
    """

    def __init__(self, path: Path, *, num_rollout: int, first_step: int = 0):
        self.path = path
        now = time.time()
        self.state = RunState("running", "start", first_step, first_step, num_rollout, now, now, os.getpid())
        self._fd: int | None = None
        with contextlib.suppress(OSError):
            self._replace()
            self._fd = os.open(path, os.O_WRONLY)

    def phase(self, name: str, step: int) -> None:
        self._set(phase=name, step=step)
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._fd, self._encoded(), 0)

    def end(self, outcome: Outcome, error: BaseException | None = None) -> None:
        text = str(error).strip() or type(error).__name__ if error is not None else ""
        self._set(outcome=outcome, error=text.splitlines()[0] if text else "")
        with contextlib.suppress(OSError):
            self._replace()
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def _set(self, **changes: object) -> None:
        self.state = replace(self.state, **changes, updated=time.time())  # type: ignore[arg-type]

    def _encoded(self) -> bytes:
        return orjson.dumps(asdict(self.state), option=orjson.OPT_INDENT_2).ljust(_BLOCK - 1) + b"\n"

    def _replace(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_bytes(self._encoded())
        temporary.replace(self.path)


def read_run_state(run_dir: Path) -> RunState | None:
    """None where no run left a whole state file. A run that says "running" and holds no lock any more was killed."""
    try:
        state = RunState(**orjson.loads(_settled(run_dir / "state.json")))
    except (OSError, ValueError, TypeError):
        return None
    if state.outcome == "running" and not run_lock.is_held(run_dir):
        return replace(state, outcome="killed")
    return state


def _settled(path: Path) -> bytes:
    """What two reads agree on: the driver may be writing."""
    before = path.read_bytes()
    while (content := path.read_bytes()) != before:
        before = content
    return content
