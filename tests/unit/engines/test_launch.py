"""The launcher's side of an engine's life, against small programs that stand in for the interpreter it starts."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
import time
from pathlib import Path

import psutil
import pytest

from miles.engines.launch import launch_embedded
from miles.errors import EngineError

READY = 'echo "miles-engine ready url=http://127.0.0.1:4321"'


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Starts `script` (sh) where the launcher would start Python."""

    async def start(script: str, **options):
        program = tmp_path / f"program-{time.monotonic_ns()}"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(program))
        options = {"name": "engine-0", "model_path": "/model", "token": "s3cret", "device": "cpu", **options}
        return await launch_embedded(log_path=tmp_path / "logs" / "engine-0.log", **options)

    return start


def processes_of_group(group: int) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


async def group_ends(group: int) -> None:
    """Killed processes vanish a moment after the signal."""
    async with asyncio.timeout(10):
        while processes_of_group(group):
            await asyncio.sleep(0.02)


async def test_arguments_token_and_log(launch):
    engine = await launch(
        f'echo "args: $@"; echo "token: $MILES_ENGINE_TOKEN extra: $EXTRA" >&2; {READY}; exec cat',
        env={"EXTRA": "1"},
        server_args={"max_running_requests": 8, "enable_x": True, "off": False, "unset": None, "stop": [1, 2]},
    )
    assert engine.url == "http://127.0.0.1:4321"
    assert engine.poll() is None
    log = Path(engine.log_path).read_text()
    assert (
        "args: -m miles.engines.embedded --model-path /model --port 0 --device cpu --exit-with-parent "
        "--max-running-requests 8 --enable-x --stop 1 2\n" in log
    )
    assert "token: s3cret extra: 1\n" in log
    assert os.getpgid(engine.pid) == engine.pid == os.getsid(engine.pid)
    engine.terminate()
    assert engine.poll() is not None


async def test_an_early_end_shows_the_end_of_this_starts_log(launch):
    with pytest.raises(EngineError, match=r"engine engine-0, got its end \(exit status 3\).*\n.*no such model"):
        await launch("echo no such model >&2; exit 3")
    # A ready line of an earlier life must not count.
    with pytest.raises(EngineError, match="SIGKILL"):
        await launch("kill -9 $$")
    engine = await launch(f"{READY}; exec cat")
    engine.terminate()
    with pytest.raises(EngineError, match="exit status 4"):
        await launch("sleep 0.2; exit 4")


async def test_a_start_that_takes_too_long_leaves_nothing(launch, tmp_path):
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"no answer within 0\.3 s of its start.*\n.*loading"):
        await launch(f"echo loading; echo $$ > {tmp_path}/pid; sleep 60 & trap '' TERM; wait", start_timeout_s=0.3)
    assert time.monotonic() - begin < 10
    await group_ends(int((tmp_path / "pid").read_text()))


async def test_a_cancelled_start_leaves_nothing(launch, tmp_path):
    starting = asyncio.create_task(launch(f"echo $$ > {tmp_path}/pid; sleep 60"))
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await group_ends(int((tmp_path / "pid").read_text()))


async def test_terminate_asks_first_and_then_ends_the_whole_group(launch):
    polite = await launch(f"trap 'exit 7' TERM; {READY}; while :; do sleep 0.05; done")
    assert polite.terminate() == 7

    stubborn = await launch(f"trap '' TERM; sleep 60 & {READY}; while :; do sleep 0.05; done")
    begin = time.monotonic()
    assert stubborn.terminate(grace_s=0.3) == -9
    assert time.monotonic() - begin < 10
    assert stubborn.terminate() == -9
    await group_ends(stubborn.pid)


async def test_what_a_dead_engine_started_dies_when_its_end_is_noticed(launch):
    engine = await launch(f"sleep 60 & {READY}; sleep 0.1; exit 5")
    async with asyncio.timeout(10):
        while engine.poll() is None:
            await asyncio.sleep(0.02)
    await group_ends(engine.pid)
    assert engine.terminate() == 5


async def test_no_signal_goes_to_a_number_that_may_be_somebody_elses(launch, monkeypatch):
    """Before its status is collected a dead engine is a zombie, and its number is its own; waitid shows which."""
    signals: list[int] = []

    def killpg(group: int, number: int) -> None:
        os.waitid(os.P_PID, group, os.WEXITED | os.WNOWAIT | os.WNOHANG)  # ChildProcessError once it is collected
        signals.append(number)
        real(group, number)

    real = os.killpg
    monkeypatch.setattr(os, "killpg", killpg)
    dead = await launch(f"{READY}; sleep 0.1; exit 5")
    await asyncio.sleep(0.3)
    statuses = await asyncio.gather(
        *(asyncio.to_thread(call) for call in [dead.poll, dead.epitaph, dead.terminate, dead.poll] * 8)
    )
    assert {status for status in statuses if isinstance(status, int)} == {5}
    assert signals == [signal.SIGKILL]


async def test_an_end_that_the_kernel_delays_is_not_waited_for_without_a_limit(launch, monkeypatch):
    engine = await launch(f"{READY}; exec cat")
    monkeypatch.setattr("miles.engines.launch.KILL_LIMIT_S", 0.2)
    with monkeypatch.context() as patched:
        patched.setattr(os, "waitid", lambda *_: None)  # what a process in uninterruptible sleep looks like
        assert engine.terminate(grace_s=0.1) is None
    assert engine.terminate() == -signal.SIGTERM


async def test_stdin_stays_open_as_long_as_the_engine_is_wanted(launch):
    engine = await launch(f"{READY}; cat; exit 8")
    await asyncio.sleep(0.1)
    assert engine.poll() is None
    assert engine.terminate() in (8, -15)
