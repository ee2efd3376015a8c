"""The process that writes report.html while a run runs, and the driver's handle on it.

    driver ──starts──> follower: read what is new, write report.html, wait, again
       └──── pipe ─────────┘     the pipe's end is the driver's end: read everything once more, write, exit

A process of its own, of the lowest priority: it takes no lock of the driver's interpreter and no core that the run can
use, its failure is one warning, and a SIGKILL of the driver ends in a complete report all the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from miles.observe import run_lock
from miles.observe.vitals import KILL_LIMIT_S

logger = logging.getLogger(__name__)

#: Seconds between two writings; more where a writing is slow, so that it takes at most a twentieth of the time.
INTERVAL_S = 5.0
_SHARE = 0.05
#: Seconds that the driver waits at its end for the last writing.
CLOSE_S = 20.0
#: Processes of a killed run may still write for as long as the guardian lets them.
_LAST_WORDS_S = 45.0


class ReportProcess:
    """The driver's side. Nothing here raises, and nothing waits but `close`."""

    def __init__(self, run_dir: Path, *, note: Callable[[str], None], environment: Mapping[str, str] | None = None):
        """`environment` is the process's; None is this one's."""
        self._run_dir, self._note, self._warned = run_dir, note, False
        command = [sys.executable, "-m", "miles.observe.report", "--follow", str(os.getpid()), str(run_dir)]
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with open(run_dir / "logs" / "report.log", "ab") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is the driver's to handle
                )
        except OSError as error:
            self._warn(str(error))

    def check(self) -> None:
        """Says once when the process has ended before its time. Costs one system call."""
        if self._process is not None and self._process.poll() is not None:
            self._warn(f"its process ended with status {self._process.returncode}, see logs/report.log")

    def close(self) -> None:
        """Lets the process write the last report, and waits for it. Call it once the run's end is in state.json."""
        if self._process is None:
            return
        self.check()
        process, self._process = self._process, None
        assert process.stdin is not None
        try:
            process.stdin.close()
            if process.wait(CLOSE_S) != 0:
                self._warn(f"its process ended with status {process.returncode}, see logs/report.log")
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_LIMIT_S)
            self._warn(f"its process was not done after {CLOSE_S:.0f} s")
        except OSError as error:
            self._warn(str(error))

    def _warn(self, why: str) -> None:
        if self._warned:
            return
        self._warned = True
        text = f"no report ({why}); build it with: python -m miles.observe.report {self._run_dir}"
        logger.warning(text)
        self._note(f"warning: {text}")


def follow(run_dir: Path, driver: int, *, stdin: int = 0) -> None:
    """The process: writes report.html every few seconds until stdin ends, and then a last time.

    `driver` is the driver's process id. Where the same command was given again meanwhile, the report is that run's.
    """
    os.nice(19)
    from . import environment
    from .page import write_page
    from .run import RunReader

    environment.write(run_dir)
    reader = RunReader(run_dir)
    path = run_dir / "report.html"
    gone = False
    while not gone:
        started = time.monotonic()
        if _is_driver(run_dir, driver):
            write_page(path, [reader.read()])
        cost_s = time.monotonic() - started
        gone = _ended(stdin, max(INTERVAL_S, cost_s / _SHARE))
    if _is_driver(run_dir, driver):
        write_page(path, [reader.read(driver_is_gone=True)])
    if _wait_for_last_words(run_dir, driver):
        write_page(path, [reader.read(driver_is_gone=True)])


def _is_driver(run_dir: Path, pid: int) -> bool:
    """Whether no other driver has taken the run directory since."""
    owner = run_lock.owner(run_dir)
    return owner is None or owner.pid == pid


def _ended(stdin: int, limit_s: float) -> bool:
    """Waits for the end of stdin, at most `limit_s`."""
    ready, _, _ = select.select([stdin], [], [], limit_s)
    return bool(ready) and os.read(stdin, 4096) == b""


def _wait_for_last_words(run_dir: Path, driver: int) -> bool:
    """Whether other processes of a killed run lived on for a while; returns once they have ended.

    A driver that ends in order holds the lock of the run directory until this process has ended, and has no others left.
    """
    from miles.observe.run_state import read_run_state

    state = read_run_state(run_dir)
    if state is None or state.outcome not in ("running", "killed"):
        return False
    since = time.monotonic()
    while run_lock.is_held(run_dir) and _is_driver(run_dir, driver) and time.monotonic() - since < _LAST_WORDS_S:
        time.sleep(0.25)
    return time.monotonic() - since > 0.2 and _is_driver(run_dir, driver)
