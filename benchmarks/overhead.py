"""What a step costs outside generation, training and weight sync, and where it goes.

    python benchmarks/overhead.py                                      256 samples of at most 4 tokens: the tiny task itself
    python benchmarks/overhead.py --samples 256 1024 4096 --tokens 64  how it grows
    python benchmarks/overhead.py --samples 16 --steps 1000            and whether memory grows with the steps

Runs scripts/run_qwen3_grpo.sh, the path that users run, with a plugin that notes when parts begin and end
(overhead_probe.py). Of each step

    overhead = step - engines - training - publication

where engines is the time in which a request was with an engine, training that of the slowest rank's `Trainer.train`, and
publication that of `weights.publish`. The parts below it add up to it; what none of them explains is `rest`. Medians over
the steps, the first ones left out. At 64 tokens the temperature is 5, so that few answers end early.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from common import ROOT, THREAD_VARIABLES, median, pin, report

#: Steps until caches are warm, compiled kernels and connections made.
WARM_UP = 5
GROUP_SIZE = 8

Span = tuple[float, float]


def main() -> None:
    args = _parse()
    cores = pin(args.cores or sorted(os.sched_getaffinity(0))[-2:])
    for name in THREAD_VARIABLES:  # of each process; `pin` gave it one for each core
        os.environ[name] = "1"
    rows, growth = [], []
    for samples in args.samples:
        with tempfile.TemporaryDirectory(prefix="miles-overhead-") as directory:
            metrics = run(Path(directory), samples, args.tokens, args.steps)
            rows.append({"samples": samples, **summary(steps_of(Path(directory)), metrics)})
            growth += memory(samples, metrics)
    settings = {"tokens": args.tokens, "steps": args.steps, "cores": cores}
    notes = [f"{row}" for row in growth]
    report("overhead, ms a step", rows, settings=settings, json_path=args.json, notes=notes)


def run(directory: Path, samples: int, tokens: int, steps: int) -> list[dict[str, float]]:
    """One training run; returns its metrics, a dict for each step."""
    command = ["bash", str(ROOT / "scripts/run_qwen3_grpo.sh"), "--plugin", str(ROOT / "benchmarks/overhead_probe.py")]
    command += ["--num-rollout", str(steps), "--rollout-batch-size", str(samples // GROUP_SIZE)]
    command += ["--rollout-max-response-len", str(tokens), "--run-dir", str(directory / "run"), "--no-report"]
    command += ["--eval-interval", str(10 * steps), "--skip-eval-before-train"]
    command += ["--rollout-temperature", "5" if tokens > 4 else "1"]
    environment = {**os.environ, "MILES_OVERHEAD_DIR": str(directory), "MILES_PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=directory)
    if done.returncode:
        raise SystemExit(f"the run of {samples} samples failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]


def steps_of(directory: Path) -> list[dict[str, list[Span]]]:
    """The spans of each counted step by part. A step runs from the start of its rollout to the end of `finish_step`."""
    spans: dict[str, list[Span]] = defaultdict(list)
    for file in directory.glob("*.txt"):
        for line in file.read_text().splitlines():
            part, begin, end = line.split()
            spans[part].append((float(begin), float(end)))
    begins = sorted(begin for begin, _ in spans["driver.rollout"])
    ends = sorted(end for _, end in spans["driver.finish"])[1:]  # the first is of the state before any step
    # The last step evaluates as well.
    return [
        {
            "step": [(first, last)],
            **{part: [span for span in found if first <= span[0] < last] for part, found in spans.items()},
        }
        for first, last in list(zip(begins, ends, strict=True))[WARM_UP:-1]
    ]


def summary(steps: Sequence[dict[str, list[Span]]], metrics: Sequence[dict[str, float]]) -> dict[str, object]:
    """Medians over the steps, in milliseconds."""
    parts: dict[str, list[float]] = defaultdict(list)
    for step in steps:
        for name, seconds in split(step).items():
            parts[name].append(1e3 * seconds)
    lengths = [m["rollout/response_len/mean"] for m in metrics if "rollout/response_len/mean" in m]
    return {"mean tokens": median(lengths), **{name: median(values) for name, values in parts.items()}}


def split(step: dict[str, list[Span]]) -> dict[str, float]:
    """Seconds of one step: the whole, the three things that are its purpose, and what the remainder is made of."""

    def total(part: str) -> float:
        return sum(end - begin for begin, end in step.get(part, []))

    def longest(part: str) -> float:
        return max((end - begin for begin, end in step.get(part, [])), default=0.0)

    whole = total("step")
    engines, training, publication = union(step["manager.engines"]), longest("trainer.train"), total("trainer.publish")
    first, last = step["manager.rollout"][0][0], step["manager.end"][0][1]
    parts = {
        # Before the first request, between requests, and what of the rewards came after the last answer.
        "prompts, rewards": total("manager.rollout") - engines,
        "batch": total("manager.batch"),
        "manager": last - first - total("manager.rollout") - total("manager.batch"),
        "call manager": total("driver.rollout") - (last - first),
        # The publication is called together with the training, and begins while the driver still hears of its end.
        "call trainers": total("driver.train") + total("driver.publish") - training - longest("trainer.connected"),
        "connections": longest("trainer.connected") - publication,
        # Samples and traces are written while the trainers work; what is left to wait for is in here.
        "files, metrics": total("driver.finish"),
    }
    overhead = whole - engines - training - publication
    return {
        "step": whole,
        "engines": engines,
        "training": training,
        "publication": publication,
        "overhead": overhead,
        **parts,
        "rest": overhead - sum(parts.values()),
    }


def union(spans: Iterable[Span]) -> float:
    """Seconds covered by at least one span."""
    covered, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered


def memory(samples: int, metrics: Sequence[dict[str, float]]) -> list[str]:
    """How far each memory figure of the run moved between the end of its first tenth and its end."""
    early, late = metrics[max(1, len(metrics) // 10)], metrics[-1]
    keys = [key for key in late if key.startswith("memory/") and key in early]
    return [f"{samples} samples, {key}: {early[key]:,.0f} at step {early['step']:.0f}, {late[key]:,.0f} at {late['step']:.0f}"
            for key in keys]  # fmt: skip


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[256], help=f"of a step, {GROUP_SIZE} to a prompt")
    parser.add_argument("--tokens", type=int, default=4, help="longest answer")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--cores", type=int, nargs="+", help="default: the last two that this process may use")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
