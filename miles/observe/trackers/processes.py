"""The driver's side: starts a worker for each tracker, looks whether they live, and ends them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping

from miles.observe.logs import tail
from miles.observe.run_dir import RunDir
from miles.observe.vitals import KILL_LIMIT_S

from .state import TrackerState

#: What a worker may take beyond its own limit, at which it ends itself, before it is killed.
_GRACE_S = 5.0


class Trackers:
    """The workers of one run. No call waits for them but `close`.

    `names` are the trackers, `first_step` the first step that this process writes: later ones, left by a process that was
    killed, are done again. `environment` is the workers', with the keys that they need. Raises nothing: a worker that
    cannot start counts as one that failed.
    """

    def __init__(
        self,
        names: Iterable[str],
        run_dir: RunDir,
        *,
        first_step: int,
        close_timeout_s: float,
        environment: Mapping[str, str],
    ):
        self._run_dir, self._close_timeout_s = run_dir, close_timeout_s
        self._live: dict[str, subprocess.Popen[bytes]] = {}
        self._unstarted: list[str] = []
        for name in names:
            options = ["--first-step", str(first_step), "--close-timeout", str(close_timeout_s)]
            command = [sys.executable, "-m", "miles.observe.trackers", name, str(run_dir.path), *options]
            try:
                self._live[name] = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is the driver's to handle
                )
            except OSError as error:
                self._unstarted.append(f"tracker {name} could not be started: {error}; metrics.jsonl is complete")

    def complaints(self) -> list[str]:
        """A line for each worker that ended since the last call, which it should not have."""
        lines, self._unstarted = self._unstarted, []
        for name, process in list(self._live.items()):
            if process.poll() is not None:
                del self._live[name]
                lines.append(self._complaint(name, f"ended with status {process.returncode}"))
        return lines

    def close(self, outcome: str) -> list[str]:
        """Waits until everything is delivered, up to the limit; returns a line for each tracker that lacks something.

        `outcome` is `ok` or `failed`, as the trackers show it.
        """
        lines = self.complaints()
        for process in self._live.values():
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it ended meanwhile
                process.stdin.write(outcome.encode())
                process.stdin.close()
        deadline = time.monotonic() + self._close_timeout_s + _GRACE_S
        for name, process in self._live.items():
            try:
                status = process.wait(max(deadline - time.monotonic(), 0))
                why = f"ended with status {status}" if status else None
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(KILL_LIMIT_S)
                why = "was killed"
            if why:
                lines.append(self._complaint(name, why))
        self._live.clear()
        return lines

    def _complaint(self, name: str, how: str) -> str:
        state = TrackerState.read(self._run_dir.path, name)
        last = (tail(self._run_dir.logs / f"tracker-{name}.log", lines=1).splitlines() or ["no log"])[-1].strip()
        return (
            f"tracker {name} {how} and has the steps up to {state.delivered} only ({last}); metrics.jsonl is complete: "
            f"python -m miles.observe.trackers {name} {self._run_dir.path} delivers the rest"
        )
