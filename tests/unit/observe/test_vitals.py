"""A process seen from outside: real processes in each state."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from miles.observe.vitals import Vitals, describe, end, end_group, is_well, vitals


@contextlib.contextmanager
def python(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `code` after it said that it runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"print(flush=True)\n{code}"], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_asleep_stopped_and_gone():
    with python("import time; time.sleep(60)") as process:
        until(lambda: vitals(process.pid).state == "asleep")
        before = vitals(process.pid)
        assert not vitals(process.pid).is_busy(before)
        assert "frozen" in describe(process.pid, before)
        assert is_well(process.pid)
        process.send_signal(signal.SIGSTOP)
        until(lambda: vitals(process.pid).state == "stopped")
        stopped = vitals(process.pid)
        assert not stopped.is_busy(before)
        assert "stopped by a signal" in describe(process.pid, stopped)
        assert not is_well(process.pid)
        end(process.pid)
        until(lambda: vitals(process.pid).state == "gone")  # a zombie as yet
        assert not is_well(process.pid)
        assert process.wait() == -signal.SIGKILL
    assert vitals(process.pid).state == "gone"
    assert not is_well(process.pid)
    end(process.pid)


def test_a_thread_that_computes_makes_its_process_busy_whatever_the_main_thread_does():
    code = "import threading, time\ndef spin():\n while True: pass\nthreading.Thread(target=spin, daemon=True).start()\ntime.sleep(60)"
    with python(code) as process:
        before = vitals(process.pid)
        until(lambda: vitals(process.pid).state == "working")
        until(lambda: vitals(process.pid).cpu_s > before.cpu_s)
        process.send_signal(signal.SIGSTOP)
        until(lambda: vitals(process.pid).state == "stopped")


def test_a_share_of_a_core_since_it_fell_silent_is_work():
    asleep = Vitals("asleep", cpu_s=5.0, at_s=100.0)
    assert not Vitals("asleep", cpu_s=5.9, at_s=110.0).is_busy(asleep)
    assert Vitals("asleep", cpu_s=6.0, at_s=110.0).is_busy(asleep)
    assert Vitals("working", cpu_s=5.0, at_s=110.0).is_busy(asleep)
    assert not Vitals("stopped", cpu_s=9.0, at_s=110.0).is_busy(asleep)
    assert not Vitals("asleep", cpu_s=9.0, at_s=110.0).is_busy(None)


def test_only_an_engines_group_is_ended():
    with python("import time; time.sleep(60)") as stranger:
        end_group(stranger.pid)
        assert stranger.poll() is None
    with python("import time; time.sleep(60) # miles.engines") as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        end_group(engine.pid)
        assert engine.wait(timeout=10) == -signal.SIGKILL
