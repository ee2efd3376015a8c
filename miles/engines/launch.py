"""An engine's server as a process of its own: started, watched until it serves, ended with everything it started.

    launch_embedded(...) | sglang.launch_sglang(...) -> EngineProcess(url) ... poll() ... terminate()

A server exits when its stdin closes, so it cannot outlive us, however we end. Its port is one the system picks; its
token travels in the environment, where other users do not see it. Output goes to its log file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from miles.errors import EngineError
from miles.observe import tail
from miles.observe.vitals import KILL_LIMIT_S

from .embedded.options import TOKEN_VARIABLE

#: The line an engine prints once it serves.
_READY = re.compile(rb"^miles-engine ready url=(http://\S+)\s*$", re.MULTILINE)
_POLL_S = 0.05
_LOG_LINES = 30


class _Group:
    """A child that leads a process group. The group is killed when the child has ended, however it ended, and before its
    status is collected: afterwards the system may give its number to somebody else's processes. Any thread may call."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        with self._lock:
            if self._process.returncode is None:
                # Looks without collecting: the zombie keeps the group's number ours.
                if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                    return None
                os.killpg(self.pid, signal.SIGKILL)
            return self._process.wait()

    def end(self, grace_s: float) -> int | None:
        """Closes its stdin, SIGTERM, SIGKILL after `grace_s`; returns the exit status, None where the kernel cannot end it."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        if grace_s > 0:
            self._signal(signal.SIGTERM)
            if (status := self._wait(grace_s)) is not None:
                return status
        self._signal(signal.SIGKILL)
        return self._wait(KILL_LIMIT_S)

    def _wait(self, limit_s: float) -> int | None:
        until = time.monotonic() + limit_s
        while (status := self.poll()) is None and time.monotonic() < until:
            time.sleep(_POLL_S / 5)
        return status

    def _signal(self, number: int) -> None:
        """To a child whose status was not collected: the number is still its own."""
        with self._lock:
            if self._process.returncode is None:
                os.killpg(self.pid, number)


class EngineProcess:
    """A running engine. Bound to no event loop."""

    def __init__(self, name: str, url: str, log_path: Path, group: _Group) -> None:
        self.name = name
        self.url = url
        self.log_path = log_path
        self._group = group

    @property
    def pid(self) -> int:
        """Also the id of its process group and session."""
        return self._group.pid

    def poll(self) -> int | None:
        """Exit status; None while it runs, minus the signal's number if one ended it."""
        return self._group.poll()

    def epitaph(self) -> str | None:
        """How it ended and its last lines; None while it runs."""
        status = self.poll()
        if status is None:
            return None
        return (
            f"engine {self.name}, got its end ({_exit_text(status)}): see {self.log_path}, which ends in:\n"
            f"{tail(self.log_path, _LOG_LINES)}"
        )

    def terminate(self, grace_s: float = 5.0) -> int | None:
        """SIGTERM, then SIGKILL after `grace_s`, to the engine and everything it started. Returns the exit status.

        Blocks at most a little longer than that; returns None where a dead disk keeps the kernel from ending it. May be
        called again, and on an engine that has ended.
        """
        return self._group.end(grace_s)


async def launch_embedded(
    *,
    name: str,
    model_path: str,
    token: str,
    log_path: Path,
    env: Mapping[str, str] | None = None,
    server_args: Mapping[str, object] | None = None,
    start_timeout_s: float = 120.0,
    device: str = "auto",
) -> EngineProcess:
    """Starts one engine on a free loopback port and returns once it serves. Start several with `asyncio.gather`.

    `server_args` are SGLang's server arguments by name (`{"max_running_requests": 64}`); None and False leave one out,
    True is a switch. `env` is added to ours.
    Raises `EngineError` with the last lines of its log when it ends or is not up in time; nothing of it is left then.
    """
    command = [sys.executable, "-m", "miles.engines.embedded", "--model-path", model_path, "--port", "0"]
    command += ["--device", device, "--exit-with-parent", *flags(server_args or {})]

    def ready(output: bytes) -> str | None:
        found = _READY.search(output)
        return found.group(1).decode() if found else None

    return await start_server(
        name, command, token=token, log_path=log_path, env=env or {}, ready=ready, start_timeout_s=start_timeout_s
    )


async def start_server(
    name: str,
    command: Sequence[str],
    *,
    token: str,
    log_path: Path,
    env: Mapping[str, str],
    ready: Callable[[bytes], str | None],
    start_timeout_s: float,
) -> EngineProcess:
    """Runs `command` until `ready`, given its output so far, knows the URL at which it serves.

    Raises `EngineError` with the last lines of its log when it ends or is not up in time; nothing of it is left then.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with open(log_path, "ab") as log:
        begin = log.tell()
        group = _Group(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env, TOKEN_VARIABLE: token, "PYTHONUNBUFFERED": "1"},
                # A group of its own can be ended as a whole, and a Ctrl-C in the terminal reaches the driver alone.
                start_new_session=True,
            )
        )
    try:
        while (url := await asyncio.to_thread(ready, _output(log_path, begin))) is None:
            status = group.poll()
            if status is not None:
                raise EngineError(
                    f"engine {name}, got its end ({_exit_text(status)}) before it served: see {log_path}, which ends in:\n"
                    f"{tail(log_path, _LOG_LINES)}"
                )
            if time.monotonic() - started > start_timeout_s:
                raise EngineError(
                    f"engine {name}, got no answer within {start_timeout_s:g} s of its start: it loads too slowly or hangs; "
                    f"raise --start-timeout or see {log_path}, which ends in:\n{tail(log_path, _LOG_LINES)}"
                )
            await asyncio.sleep(_POLL_S)
    except BaseException:
        group.end(grace_s=0.0)
        raise
    return EngineProcess(name, url, log_path, group)


def _output(log_path: Path, begin: int) -> bytes:
    with open(log_path, "rb") as log:
        log.seek(begin)
        return log.read()


def flags(server_args: Mapping[str, object]) -> Iterator[str]:
    """`{"max_running_requests": 64}` -> `--max-running-requests 64`; None and False are left out, True is a switch."""
    for key, value in server_args.items():
        if value is None or value is False:
            continue
        yield f"--{key.replace('_', '-')}"
        if value is not True:
            yield from map(str, value) if isinstance(value, (list, tuple)) else (str(value),)


def _exit_text(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
