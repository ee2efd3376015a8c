"""A part of a running system dies or hangs: the run ends with one error that says which part, and why.

More deaths, and what the same command makes of them, are in tests/integration/kill.
"""

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
    """The youngest process whose title it is."""
    found = [p for p in family(process.pid) if title in " ".join(p.cmdline())]
    assert found, [p.cmdline() for p in family(process.pid)]
    return max(found, key=lambda p: p.create_time())


def output_of(process: subprocess.Popen[str]) -> str:
    """All it prints, once it has ended by itself."""
    try:
        return process.communicate(timeout=90)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


STOPPED = r"\(pid \d+\), got no sign of life since [\d:]+ while the driver waited for .* \(since [\d:]+\): it is stopped by a signal"


@pytest.mark.parametrize(
    ("title", "sig", "overrides", "expected"),
    [
        (
            "miles.engines.embedded",
            "SIGKILL",
            {"max_engine_restarts": 0},
            r"EngineError: engine-0, got its end after 0 restarts .*--max-engine-restarts 0 .* engine engine-0, got its end \(signal SIGKILL\)",
        ),
        (
            "ray::RolloutManager",
            "SIGSTOP",
            {"heartbeat_timeout": 4},
            f"error: WaitTimeout: process rollout-manager {STOPPED}",
        ),
        (
            "ray::TrainerActor",
            "SIGSTOP",
            {"heartbeat_timeout": 4, "actor_num_gpus_per_node": 2},
            rf"error: WaitTimeout: process trainer-\d {STOPPED}",
        ),
    ],
)
def test_a_killed_or_stopped_part_is_named(task, tmp_path, title, sig, overrides, expected):
    process = run_until_steps(task, tmp_path / "run", **overrides)
    members = family(process.pid)
    member(process, title).send_signal(getattr(signal, sig))
    output = output_of(process)
    assert process.returncode == 1, output
    assert re.search(expected, output), output
    assert "error: " in output
    assert f"logs: {tmp_path / 'run' / 'logs'}" in output
    # Stopped ones too.
    wait_until(
        lambda: not [p for p in members if p.is_running() and p.status() != psutil.STATUS_ZOMBIE],
        limit_s=15,
        what="the end of every process",
    )


def test_a_hang_in_the_rollout_is_shown_where_it_hangs(task, tmp_path):
    hook = tmp_path / "hook.py"
    hook.write_text(
        "import asyncio\n"
        "async def wait_for_nobody():\n    await asyncio.Event().wait()\n"
        "async def generate(args, sample, sampling_params):\n    await wait_for_nobody()\n"
    )
    run = flags(task, custom_generate_function_path=f"{hook}:generate", wait_timeout=12)
    process = start(run, tmp_path / "run")
    output = output_of(process)
    assert process.returncode == 1, output
    assert "error: WaitTimeout: wait for rollout 0, got nothing new from rollout-manager for 12 s" in output
    assert re.search(r"name='group-0'.*GroupRunner.run", output), "the tasks of the loop that works are listed"


def test_a_rank_that_does_not_come_to_a_collective_is_named_with_its_stack(task, tmp_path):
    plugin = tmp_path / "late.py"
    plugin.write_text(
        "import time\n"
        "from pathlib import Path\n"
        "if b'TrainerActor' in Path('/proc/self/cmdline').read_bytes():\n"
        "    from miles.trainers.megatron.trainer import MegatronTrainer\n"
        "    train = MegatronTrainer.train\n"
        "    def dawdle(self, batch):\n"
        "        if self.parallel.rank == 1:\n"
        "            time.sleep(600)\n"
        "        return train(self, batch)\n"
        "    MegatronTrainer.train = dawdle\n"
    )
    run = flags(task, plugin=plugin, actor_num_gpus_per_node=2, distributed_timeout_minutes=0.1)
    process = start(run, tmp_path / "run")
    output = output_of(process)
    assert process.returncode == 1, output
    expected = (
        "error: WaitTimeout: a collective of the trainers in the training step, got nothing from trainer-1 within "
    )
    assert f"{expected}--distributed-timeout-minutes" in output
    assert " in dawdle" in output
