"""Runs train.py as a user does, in a process of its own, and reads back what it left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil
import torch
from safetensors.torch import load_file

from miles.observe import MetricsFile
from miles.observe.catalogue import describe

#: Metrics that differ from run to run.
TIMED = ("perf/", "memory/")

REPO = Path(__file__).resolve().parents[3]


@dataclass
class Finished:
    """One run of train.py that ended."""

    returncode: int
    output: str
    run_dir: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return MetricsFile.read(self.run_dir / "metrics.jsonl")

    def series(self, key: str) -> list[float]:
        return [line[key] for line in self.metrics if key in line]

    def samples(self, rollout_id: int) -> list[dict[str, Any]]:
        lines = (self.run_dir / "samples" / f"rollout_{rollout_id:06d}.jsonl").read_bytes().splitlines()
        return [orjson.loads(line) for line in lines]

    def check(self) -> Finished:
        logs = "\n".join(f"--- {p.name}\n{p.read_text()[-2000:]}" for p in sorted((self.run_dir / "logs").glob("*")))
        assert self.returncode == 0, f"{self.output}\n{logs}"
        logged = {key for line in self.metrics for key in line} - {"step"}
        unknown = sorted(key for key in logged if describe(key) is None)
        assert not unknown, f"not in miles/observe/catalogue.py: {unknown}"
        return self


def flags(task: Path, **overrides: Any) -> list[str]:
    """A small run on the tiny task; `name=None` drops a flag, `name=True` is a switch."""
    values: dict[str, Any] = {
        "hf_checkpoint": task / "model",
        "prompt_data": task / "train.jsonl",
        "input_key": "prompt",
        "label_key": "label",
        "apply_chat_template": True,
        "rollout_shuffle": True,
        "rm_type": "exact",
        "num_rollout": 4,
        "rollout_batch_size": 8,
        "n_samples_per_prompt": 4,
        "num_steps_per_rollout": 1,
        "rollout_max_response_len": 4,
        "micro_batch_size": 64,
        "lr": 5e-4,
        "weight_decay": 0.0,
        "adam_beta2": 0.99,
        "progress": "plain",
    }
    values.update(overrides)
    argv: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        argv.append("--" + name.replace("_", "-"))
        if value is not True:
            argv += [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
    return argv


def environment() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**env, "PYTHONUNBUFFERED": "1"}


def start(argv: list[str], run_dir: Path, *, driver: str = "train.py", **more: str) -> subprocess.Popen[str]:
    """more: of the environment."""
    return subprocess.Popen(
        [sys.executable, str(REPO / driver), *argv, "--run-dir", str(run_dir)],
        cwd=REPO,
        env=environment() | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train(
    argv: list[str], run_dir: Path, *, timeout_s: float = 150, driver: str = "train.py", **environment: str
) -> Finished:
    """Runs to the end, or kills what this call started and fails."""
    process = start(argv, run_dir, driver=driver, **environment)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"train.py did not end within {timeout_s} s:\n{output}") from None
    return Finished(process.returncode, output, run_dir)


def check_continues_exactly(
    whole: Finished, argv: list[str], tmp_path: Path, *, iteration: int, driver: str = "train.py"
) -> None:
    """A run of the same flags, from checkpoint `iteration` of `whole`, makes what `whole` made after it, to the last bit.

    `argv` is that of `whole`, with --save and --save-hf.
    """
    last = {flag: argv[len(argv) - 1 - argv[::-1].index(flag) + 1] for flag in ("--save", "--save-hf")}
    again = tmp_path / "again"
    ours = {"--save": str(again / "ckpt"), "--save-hf": str(again / Path(last["--save-hf"]).name)}
    start = Path(last["--save"]) / f"iter_{iteration:07d}"
    moved = [*argv, "--load", str(start), *(word for pair in ours.items() for word in pair)]
    continued = train(moved, tmp_path / "again-run", driver=driver).check()
    expected = [line for line in whole.metrics if line["step"] > iteration and "train/global_step" in line]
    made = [line for line in continued.metrics if "train/global_step" in line]
    assert expected
    for a, b in zip(expected, made, strict=True):
        assert {k: v for k, v in a.items() if not k.startswith(TIMED)} == {
            k: v for k, v in b.items() if not k.startswith(TIMED)
        }
    exported = sorted(path.name for path in again.iterdir() if path.name != "ckpt")
    first, second = (
        load_file(parent / exported[-1] / "model.safetensors") for parent in (Path(last["--save-hf"]).parent, again)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def family(pid: int) -> list[psutil.Process]:
    """The process and everything below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def wait_until(condition: Any, *, limit_s: float, what: str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {limit_s} s"
        time.sleep(0.2)
