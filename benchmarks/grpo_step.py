"""One GRPO step of Miles, the whole path, beside one of TRL's GRPOTrainer: seconds by phase, samples/s, memory, ratio.

    python benchmarks/grpo_step.py --case learn4              the tiny task as it is learned, at most 4 new tokens
    python benchmarks/grpo_step.py --case random4             the same with random rewards: every row has a gradient
    python benchmarks/grpo_step.py --case random64            a random model of the same shape, at most 64 new tokens
    python benchmarks/grpo_step.py --case random64 --cores 0 1 --peer-python OTHER_VENV/bin/python

Our side is `train.py` as a user starts it: Ray, an engine over HTTP, the megatron trainer, publication of weights. TRL is
one process (trl_peer.py); it needs `pip install -e '.[benchmarks]'`. Both get the same checkpoint, prompts, rewards,
geometry (32 prompts x 8 samples), loss (clipped, no KL, mean over tokens then rows), AdamW, fp32, one update a rollout, and
the same cores, to which all processes of a side are bound. Whole runs take turns; medians are over the steps of all runs
but the first ones of each.

Two things make steps unequal, so they are cases. Rows whose group is all right or all wrong have no gradient: Miles leaves
them out of the forward pass, TRL computes them. `learn4` measures that as it happens, from the first step of the recipe to
its last; in `random*` no such row exists. And lengths: a random model ends one row in a hundred at each token, on both
sides alike, so rows have about 48 tokens of at most 64; a learning rate of 1e-6 keeps it there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from common import ROOT, interleave, median, pin, report, spread

TASK = ROOT / ".miles" / "tiny_addition"
NUM_PROMPTS, GROUP_SIZE = 32, 8
NUM_SAMPLES = NUM_PROMPTS * GROUP_SIZE
#: Seconds without which no run of a side is plausible.
RUN_LIMIT_S = 600


@dataclass(frozen=True)
class Case:
    """What both sides train on."""

    new_tokens: int
    """At most, in one answer."""
    reward: str
    """`exact` or `random`."""
    lr: float
    random_model: bool = False
    tokens_per_micro_batch: int = 4096


CASES = {
    "learn4": Case(4, "exact", 5e-4),
    "random4": Case(4, "random", 1e-6),
    "random64": Case(64, "random", 1e-6, random_model=True),
}


@dataclass(frozen=True)
class Step:
    """Seconds of one step by phase; tokens of all answers; mean reward."""

    total_s: float
    generate_s: float
    reward_s: float
    train_s: float
    sync_s: float
    tokens: float
    rows_trained: float
    reward: float

    @property
    def other_s(self) -> float:
        return self.total_s - self.generate_s - self.reward_s - self.train_s - self.sync_s


@dataclass(frozen=True)
class Run:
    """What one process tree left: a line of JSON for each step, and what it used late in the run."""

    lines: list[dict[str, float]]
    cpu_s_per_step: float
    """Of all its processes: what s/step would be on cores that nobody else wants, but for waits."""
    memory_bytes: int
    """Sum of proportional set sizes: pages that processes share count once."""


def main() -> None:
    args = _parse()
    cores = pin(args.cores)
    case = CASES[args.case]
    _make_task(args.seed)
    with tempfile.TemporaryDirectory(prefix="miles-grpo-step-") as directory:
        model = _random_model(Path(directory) / "model") if case.random_model else TASK / "model"
        runs: dict[str, list[Run]] = {"miles": [], "trl": []}
        sides: dict[str, Callable[[], object]] = {
            "miles": lambda: runs["miles"].append(_run_miles(case, model, args, Path(directory) / str(time.time_ns()))),
            "trl": lambda: runs["trl"].append(_run_trl(case, model, args, Path(directory) / f"{time.time_ns()}.jsonl")),
        }
        interleave({name: sides[name] for name in args.sides}, repeats=args.repeats, warm_up=0)
    read = {"miles": _miles_step, "trl": _trl_step}
    steps = {
        name: [read[name](line) for run in runs[name] for line in run.lines[args.warm_up :]] for name in args.sides
    }
    rows = [_row(name, steps[name], runs[name]) for name in args.sides]
    notes = []
    if len(args.sides) == 2:
        seconds = {name: median([s.total_s for s in steps[name]]) for name in steps}
        cpu = {name: median([run.cpu_s_per_step for run in runs[name]]) for name in steps}
        notes.append(
            f"ratio: {seconds['trl'] / seconds['miles']:.2f}x TRL's samples/s by the clock, "
            f"{cpu['trl'] / cpu['miles']:.2f}x by CPU time"
        )
    report(
        f"grpo_step {args.case}",
        rows,
        settings={**asdict(case), "samples": f"{NUM_PROMPTS} x {GROUP_SIZE}", "cores": cores}
        | {name: getattr(args, name) for name in ("steps", "warm_up", "repeats", "seed")},
        json_path=args.json,
        notes=notes,
    )


def _row(name: str, steps: Sequence[Step], runs: Sequence[Run]) -> dict[str, object]:
    seconds = [s.total_s for s in steps]
    return {
        "side": name,
        "s/step": median(seconds),
        "spread": spread(seconds),
        "CPU s/step": median([run.cpu_s_per_step for run in runs]),
        "generate": median([s.generate_s for s in steps]),
        "reward": median([s.reward_s for s in steps]),
        "train": median([s.train_s for s in steps]),
        "weight sync": median([s.sync_s for s in steps]),
        "other": median([s.other_s for s in steps]),
        "samples/s": NUM_SAMPLES / median(seconds),
        "tokens/s": median([s.tokens / s.total_s for s in steps]),
        "tokens/step": median([s.tokens for s in steps]),
        "rows trained": median([s.rows_trained for s in steps]),
        "MB": max(run.memory_bytes for run in runs) / 1e6,
        "reward, last 10": sum(s.reward for s in steps[-10:]) / len(steps[-10:]),
    }


# ------------------------------------------------------------------------------------------------------------- our side


def _run_miles(case: Case, model: Path, args: argparse.Namespace, run_dir: Path) -> Run:
    flags: dict[str, object] = {
        "hf-checkpoint": model,
        "prompt-data": TASK / "train.jsonl",
        "input-key": "prompt",
        "label-key": "label",
        "rm-type": case.reward,
        "num-rollout": args.steps,
        "rollout-batch-size": NUM_PROMPTS,
        "n-samples-per-prompt": GROUP_SIZE,
        "num-steps-per-rollout": 1,
        "rollout-max-response-len": case.new_tokens,
        "rollout-temperature": 1.0,
        "rollout-seed": args.seed,
        "seed": args.seed,
        "max-tokens-per-gpu": args.tokens_per_micro_batch or case.tokens_per_micro_batch,
        "eps-clip": 0.2,
        "eps-clip-high": 0.28,
        "lr": case.lr,
        "min-lr": 0.0,
        "lr-decay-style": "linear",
        "weight-decay": 0.0,
        "adam-beta1": 0.9,
        "adam-beta2": 0.99,
        "clip-grad": 1.0,
        "progress": "plain",
        "run-dir": run_dir,
    }
    switches = ["--apply-chat-template", "--rollout-shuffle", "--use-dynamic-batch-size", "--colocate"]
    command = [sys.executable, str(ROOT / "train.py"), *switches]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    run = _run(command, run_dir / "metrics.jsonl", args.steps, args.warm_up)
    return replace(run, lines=[line for line in run.lines if "perf/train_time" in line])


def _miles_step(line: dict[str, float]) -> Step:
    return Step(
        total_s=line["perf/step_time"],
        # Rewards are given while other groups are still being generated: one phase.
        generate_s=line["perf/generate_time"],
        reward_s=0.0,
        train_s=line["perf/train_time"],
        sync_s=line["perf/update_weights_time"],
        tokens=line["rollout/trained_tokens"],
        rows_trained=line["rollout/rows"] - line["rollout/rows_skipped"],
        reward=line["rollout/raw_reward"],
    )


# --------------------------------------------------------------------------------------------------------------- theirs


def _run_trl(case: Case, model: Path, args: argparse.Namespace, out: Path) -> Run:
    spec = {
        "model": str(model),
        "prompts": str(TASK / "train.jsonl"),
        "out": str(out),
        "steps": args.steps,
        "seed": args.seed,
        "num_prompts": NUM_PROMPTS,
        "group_size": GROUP_SIZE,
        "new_tokens": case.new_tokens,
        "reward": case.reward,
        "lr": case.lr,
    }
    peer = Path(__file__).with_name("trl_peer.py")
    return _run([args.peer_python, str(peer), json.dumps(spec)], out, args.steps, args.warm_up)


def _trl_step(line: dict[str, float]) -> Step:
    return Step(sync_s=0.0, rows_trained=NUM_SAMPLES, **line)


# --------------------------------------------------------------------------------------------------------------- shared


def _run(command: list[str], lines_at: Path, steps: int, warm_up: int) -> Run:
    """Runs to the end, watching for the line that each step leaves in `lines_at`."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True)
        try:
            used = _watch(process, lines_at, warm_up, max(warm_up + 1, steps - 5))
            process.wait(RUN_LIMIT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode or used is None:
            output.seek(0)
            sys.exit(
                f"{' '.join(command)}\n{output.read().decode(errors='replace')[-4000:]}\nended with {process.returncode}"
            )
    return Run([json.loads(line) for line in lines_at.read_text().splitlines()], *used)


def _watch(process: subprocess.Popen[Any], lines_at: Path, first: int, last: int) -> tuple[float, int] | None:
    """CPU seconds a step between lines `first` and `last` of the file, and PSS bytes at the last; None where it ends before."""
    began: tuple[int, float] | None = None
    while process.poll() is None:
        count = lines_at.read_bytes().count(b"\n") if lines_at.exists() else 0
        if began is None and count >= first:
            began = count, _of_family(process.pid, lambda p: sum(p.cpu_times()[:2]))
        if began is not None and count >= max(last, began[0] + 1):
            cpu_s = _of_family(process.pid, lambda p: sum(p.cpu_times()[:2])) - began[1]
            return cpu_s / (count - began[0]), int(_of_family(process.pid, lambda p: p.memory_full_info().pss))
        time.sleep(0.1)
    return None


def _of_family(pid: int, figure: Callable[[psutil.Process], float]) -> float:
    """Sum of a figure over the process and all below it."""
    total = 0.0
    for member in (root := psutil.Process(pid), *root.children(recursive=True)):
        try:
            total += figure(member)
        except psutil.Error:
            continue  # it ended while it was being read
    return total


def _make_task(seed: int) -> None:
    command = [sys.executable, str(ROOT / "tools" / "make_tiny_task.py"), str(TASK), "--seed", str(seed)]
    subprocess.run(command, check=True)


def _random_model(directory: Path) -> Path:
    """The tiny model's shape and tokenizer, weights that know nothing."""
    code = (
        "import sys, torch, transformers as t; torch.manual_seed(0)\n"
        "c = t.AutoConfig.from_pretrained(sys.argv[1]); c.initializer_range = 0.02\n"
        "t.AutoModelForCausalLM.from_config(c, dtype=torch.float32).save_pretrained(sys.argv[2])\n"
        "t.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(TASK / "model"), str(directory)], check=True)
    return directory


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="learn4")
    parser.add_argument("--steps", type=int, default=60, help="steps of one run (default: 60, the recipe's)")
    parser.add_argument("--warm-up", type=int, default=5, help="first steps of a run that do not count (default: 5)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--cores", type=int, nargs="+", help="cores of every side (default: the last one)")
    parser.add_argument("--sides", nargs="+", choices=["miles", "trl"], default=["miles", "trl"])
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has TRL (default: this one)")
    parser.add_argument("--tokens-per-micro-batch", type=int, help="ours (default: the case's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
