"""A part of a running system dies or hangs: the run ends with one error that says which part, and why."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from .harness import family, flags, start, wait_until


def run_until_steps(task: Path, run_dir: Path, **overrides: object) -> subprocess.Popen[str]:
    process = start(flags(task, num_rollout=2000, **overrides), run_dir)
    metrics = run_dir / "metrics.jsonl"
    wait_until(
        lambda: process.poll() is not None or (metrics.exists() and len(metrics.read_bytes().splitlines()) >= 2),
        limit_s=90,
        what="the first step",
    )
    assert process.poll() is None, process.communicate()[0]
    return process


def member(process: subprocess.Popen[str], title: str) -> psutil.Process:
    found = [p for p in family(process.pid) if title in " ".join(p.cmdline())]
    assert len(found) == 1, [p.cmdline() for p in family(process.pid)]
    return found[0]


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("ray::RolloutManager", r"error: ProcessDied: process rollout-manager, got its end while the run waited for"),
        ("miles.engines.embedded", r"engine engine-0 ended \(signal SIGKILL\)"),
    ],
)
def test_a_killed_part_is_named(task, tmp_path, title, expected):
    process = run_until_steps(task, tmp_path / "run")
    member(process, title).kill()
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1, output
    assert re.search(expected, output), output
    assert "error: " in output
    assert f"logs: {tmp_path / 'run' / 'logs'}" in output


def test_a_hang_in_the_rollout_is_shown_where_it_hangs(task, tmp_path):
    hook = tmp_path / "hook.py"
    hook.write_text(
        "import asyncio\n"
        "async def wait_for_nobody():\n    await asyncio.Event().wait()\n"
        "async def generate(args, sample, sampling_params):\n    await wait_for_nobody()\n"
    )
    run = flags(task, custom_generate_function_path=f"{hook}:generate", wait_timeout=3)
    process = start(run, tmp_path / "run")
    try:
        output, _ = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 1, output
    assert "error: WaitTimeout: wait for rollout 0, got nothing new from rollout-manager for 3 s" in output
    assert re.search(r"name='group-0'.*GroupRunner.run", output), "the tasks of the loop that works are listed"
