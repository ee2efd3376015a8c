"""Kills one process of a run in one phase, runs the same command again, and compares with a run that was never touched.

    python -m tests.integration.kill.matrix                                     all 20 cases
    python -m tests.integration.kill.matrix --victim driver --phase saving      one
    python -m tests.integration.kill.matrix --driver train_async.py             of the driver that is one step ahead

Prints a line for each case: where the process ended, how the first command did, what the second one's start-up said, and
whether weights, optimizer and random state, data state, samples and metrics (but perf/* and memory/*, which the machine decides)
are bitwise those of the untouched run. Exit status 1 where any differs. A lost engine is replaced in the running run, so there the
first command is the only one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tests.integration.e2e.harness import REPO, Finished, flags, train

VICTIMS = ("driver", "trainer", "rollout_manager", "engine")
PHASES = ("generation", "reward", "training", "weight_sync", "saving")
NUM_ROLLOUT = 3
SIGKILLED, FAILED = -9, 1
#: Metrics of the machine, which differ between any two runs.
MEASURED = ("perf/", "memory/")


@dataclass(frozen=True)
class Result:
    """What came of one case; `differences` is empty where the result is bitwise that of the untouched run."""

    where: str
    first: Finished
    last: Finished
    """The run that came to the end: `first` itself where that went on by itself."""
    differences: tuple[str, ...]

    @property
    def said(self) -> str:
        """What the second start-up said about the first."""
        lines = [line for line in self.last.output.splitlines() if line.startswith(("found ", "continuing "))]
        return " | ".join(lines) if self.last is not self.first else "went on with a new engine"


def command(task: Path, directory: Path) -> list[str]:
    return flags(
        task,
        plugin=Path(__file__).with_name("plugin_kill.py"),
        deterministic_mode=True,
        num_rollout=NUM_ROLLOUT,
        rollout_batch_size=4,
        n_samples_per_prompt=4,
        num_steps_per_rollout=2,
        actor_num_gpus_per_node=2,
        rm_type="exact_in_worker",
        rm_num_workers=1,
        update_weight_buffer_size=100_000,
        lr_decay_style="linear",
        save=directory / "ckpt",
        load=directory / "ckpt",
        save_interval=1,
        heartbeat_timeout=120,  # cores that others use as well
    )


def untouched(task: Path, directory: Path, driver: str = "train.py") -> Finished:
    return _run(task, directory, "", driver).check()


def run_case(
    task: Path, directory: Path, reference: Finished, victim: str, phase: str, driver: str = "train.py"
) -> Result:
    """Raises AssertionError where the kill did not happen, or a command did not end as it has to."""
    first = last = _run(task, directory, f"{victim}:{phase}", driver)
    mark = directory / "killed"
    assert mark.exists(), f"nothing was killed:\n{first.output}"
    if victim == "engine":
        first.check()
    else:
        assert first.returncode == (SIGKILLED if victim == "driver" else FAILED), first.output
        named = r"error: ProcessDied: process (trainer-\d|rollout-manager), got its end while the run waited for "
        assert victim == "driver" or re.search(named, first.output), first.output
        last = _run(task, directory, f"{victim}:{phase}", driver).check()
        assert "found a run in" in last.output, last.output
    return Result(mark.read_text(), first, last, tuple(differences(reference, last)))


def _run(task: Path, directory: Path, kill: str, driver: str) -> Finished:
    directory.mkdir(parents=True, exist_ok=True)
    os.environ.update(KILL=kill or ":", KILL_DIR=str(directory))
    return train(command(task, directory), directory / "run", timeout_s=300, driver=driver)


# --------------------------------------------------------------------------------------------------------------- compare


def differences(reference: Finished, other: Finished) -> list[str]:
    """Names of what is not the same to the last bit."""
    found = []
    for name, read in (("samples", _samples), ("metrics", _metrics), ("checkpoint", _checkpoint)):
        expected, actual = read(reference.run_dir), read(other.run_dir)
        keys = sorted(expected.keys() | actual.keys(), key=str)
        found += [f"{name} {key}" for key in keys if not _same(expected.get(key), actual.get(key))]
    return found


def _samples(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "samples").iterdir()}


def _metrics(run_dir: Path) -> dict[str, float]:
    """Each step may have several lines. `time` is when a line was written."""
    lines = Finished(0, "", run_dir).metrics
    return {
        f"{key} of step {line['step']}": value
        for line in lines
        for key, value in line.items()
        if not key.startswith(MEASURED) and key != "time"
    }


def _checkpoint(run_dir: Path) -> dict[str, Any]:
    """Everything in the last checkpoint: tensors of model and optimizer, random streams, and the state of the data source."""
    last = run_dir.parent / "ckpt" / f"iter_{NUM_ROLLOUT:07d}"
    tensors: dict[str, Any] = {}
    _load_state_dict(tensors, FileSystemReader(last), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    others = {
        p.name: p.read_bytes() for p in last.iterdir() if p.suffix in (".json", ".safetensors") and p.stem != "manifest"
    }
    common = torch.load(last / "common.pt", weights_only=False)
    return {**dict(_leaves(tensors)), **others, "common.pt": str(common)}


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{name}.{key}")]
    return [(name, value)]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and (a == b or str(a) == str(b))


# --------------------------------------------------------------------------------------------------------------- command


def _line(task: Path, root: Path, reference: Finished, driver: str, victim: str, phase: str) -> tuple[bool, str]:
    """Whether a case is bitwise equal, and its part of the table."""
    started = time.monotonic()
    try:
        result = run_case(task, root / f"{victim}-{phase}", reference, victim, phase, driver)
        verdict = f"DIFFERS: {', '.join(result.differences[:9])}" if result.differences else "bitwise equal"
        details = f"    {result.where}\n    {result.said}"
    except AssertionError as error:
        verdict, details = "FAILED", str(error)
    seconds = time.monotonic() - started
    return verdict == "bitwise equal", f"{victim:17}{phase:13}{verdict}  {seconds:.0f} s\n{details}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--victim", choices=VICTIMS, action="append", help="only this one; may be repeated")
    parser.add_argument("--phase", choices=PHASES, action="append", help="only this one; may be repeated")
    parser.add_argument("--driver", choices=("train.py", "train_async.py"), default="train.py")
    parser.add_argument("--task", type=Path, default=REPO / ".miles" / "tiny_addition", help="tiny model and task")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    chosen = parser.parse_args()
    cases = [(victim, phase) for victim in chosen.victim or VICTIMS for phase in chosen.phase or PHASES]
    # Processes, not threads: a case is told to the plugin in the environment.
    with (
        tempfile.TemporaryDirectory(prefix="miles-kill-") as directory,
        ProcessPoolExecutor(chosen.jobs, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        root = Path(directory)
        reference = untouched(chosen.task, root / "untouched", chosen.driver)
        lines = [pool.submit(_line, chosen.task, root, reference, chosen.driver, *case) for case in cases]
        equal = 0
        for line in lines:
            is_equal, text = line.result()
            equal += is_equal
            print(text, flush=True)
    print(f"{equal} of {len(cases)} cases are bitwise equal to the untouched run")
    return equal != len(cases)


if __name__ == "__main__":
    sys.exit(main())
