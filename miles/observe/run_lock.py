"""A directory that one run at a time writes to.

    take -> DIR/run.lock, locked until every process that holds its descriptor has ended: no stale lock is possible
    owner -> who wrote there last, also after its end

The driver hands the descriptor to its guardian (`cluster/guardian.py`), so that the directory of a killed driver is free
once the last process of its run is gone, not before.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import psutil

from miles.errors import ConfigError

NAME = "run.lock"
#: The file system keeps no locks: two runs at once cannot be noticed there.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
#: Longer than a guardian lives after its driver.
_DYING_S = 45.0
#: A reader that asks whether the lock is held holds it for a moment itself.
_BLINK_S = 0.5


@dataclass(frozen=True)
class Owner:
    """The run that took a directory last."""

    pid: int
    host: str
    started: float
    """Seconds since 1970."""
    run_dir: str

    @property
    def is_dead(self) -> bool:
        """Whether its driver is known to have ended; another host's is not."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            is_another = process.create_time() > self.started + 1  # the number was given out again
            return is_another or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


class RunLock:
    """The lock of `directory`, held. `fd` is None where the file system keeps no locks; `previous` held it last."""

    def __init__(self, directory: Path, fd: int | None, previous: Owner | None):
        self.directory, self.fd, self.previous = directory, fd, previous

    @classmethod
    def take(cls, directory: Path, run_dir: Path, *, flag: str, note: Callable[[str], None]) -> RunLock:
        """Locks `directory`, made if need be, for the run in `run_dir`.

        Waits, after a `note`, while the processes of a killed driver end. Raises `ConfigError`, naming the process, where a
        living run writes there, and where this user may not write.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            fd = os.open(directory / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{flag}, got {directory}: it cannot be written ({error.strerror}); name a directory of yours"
            ) from error
        try:
            if not _lock_patiently(fd, directory, flag, note):
                os.close(fd)
                return cls(directory, None, None)
            previous = owner(directory)
            me = Owner(os.getpid(), socket.gethostname(), time.time(), str(run_dir))
            os.ftruncate(fd, 0)
            os.pwrite(fd, orjson.dumps(asdict(me)) + b"\n", 0)
        except BaseException:
            os.close(fd)
            raise
        return cls(directory, fd, previous)

    def release(self) -> None:
        """Safe to call twice."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def _lock_patiently(fd: int, directory: Path, flag: str, note: Callable[[str], None]) -> bool:
    """True once the lock is held; False where there are no locks."""
    started, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            note(f"warning: {directory} keeps no locks ({error.strerror}): a second run there would not be noticed")
            return False
        holder = owner(directory)
        is_dying = holder is not None and holder.is_dead
        if time.monotonic() - started > (_DYING_S if is_dying else _BLINK_S):
            raise ConfigError(f"{flag}, got {directory}: {_who(holder)}; wait for its end, or name another directory")
        if is_dying and not told:
            told = True
            note(f"waiting for the processes of the run that was killed in {directory} to end")
        time.sleep(0.1)


def _who(holder: Owner | None) -> str:
    if holder is None:
        return "another run writes there"
    if holder.is_dead:
        return f"processes of the run whose driver, {holder.pid}, was killed still live and may write there"
    since = time.strftime("%H:%M:%S", time.localtime(holder.started))
    return f"process {holder.pid} on {holder.host} writes there since {since} (run directory {holder.run_dir})"


def owner(directory: Path) -> Owner | None:
    """Who took the lock last; None where nobody did, or is about to."""
    try:
        return Owner(**orjson.loads((directory / NAME).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def is_held(directory: Path) -> bool:
    """Whether a run, or what is left of one, holds the lock. Cheap; the lock stays as it is."""
    try:
        fd = os.open(directory / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
