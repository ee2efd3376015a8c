"""Outlives the driver by seconds, to end what the driver could not: run as a script, with the driver's pipe as stdin.

    guardian.py RAY_DIRECTORY RUN_MARK DRIVER_PID

Ray's processes, engines and reward workers end by themselves when the driver is killed, but not all of them at once
(Ray's agents first try for a minute to tell a head that is gone), and children of user hooks perhaps never. When stdin
reaches its end, whatever still belongs to the run is killed: a process counts as the run's when RUN_MARK is in its
environment, which children inherit, or when it has a file below RAY_DIRECTORY open (Ray's workers overwrite their
environment with their title).
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator

import psutil

MARK_VARIABLE = "MILES_RUN_MARK"

#: Time for processes to end by themselves, with their last words in the logs.
_GRACE_S = 2.0
#: After this the guardian gives up; nothing resists SIGKILL for that long but a process in uninterruptible sleep.
LIMIT_S = 30.0


def unmarked() -> dict[str, str]:
    """The environment for a process that outlives the driver: without the run's mark."""
    return {name: value for name, value in os.environ.items() if name != MARK_VARIABLE}


def members(directory: str, mark: str, driver: int) -> Iterator[psutil.Process]:
    """Processes of this user that belong to the run, except for the driver, which may be waiting for us to finish."""
    user = os.getuid()
    for process in psutil.process_iter():
        try:
            if process.pid in (os.getpid(), driver) or process.uids().real != user:
                continue
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            marked = process.environ().get(MARK_VARIABLE) == mark
            if marked or any(f.path.startswith(directory + os.sep) for f in process.open_files()):
                yield process
        except psutil.Error:
            continue  # it ended meanwhile, or is not ours to look into


def main(directory: str, mark: str, driver: int) -> None:
    sys.stdin.buffer.read()  # the driver writes nothing: this returns when it has ended
    since = time.monotonic()
    while (left := list(members(directory, mark, driver))) and time.monotonic() - since < LIMIT_S:
        if time.monotonic() - since > _GRACE_S:
            for process in left:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
        time.sleep(0.25)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
