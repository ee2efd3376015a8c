"""How well train_async.py hides the shorter of generation and training behind the longer one.

    python benchmarks/async_overlap.py                     generation that takes as long as training
    python benchmarks/async_overlap.py --factor 0.5 1 2    and that takes half, and twice as long

The real drivers and trainers on the tiny task, beside an engine that is simulated: it answers after a fixed time and needs no
core for it (simulated_engine.py). First a run without any generation time says how long training takes; then both drivers
run with that time, or a multiple of it. Of each step, medians: the wall time, the longer of the two phases, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, THREAD_VARIABLES, median, pin, report

#: Steps until caches are warm.
WARM_UP = 3


def main() -> None:
    args = _parse()
    cores = pin(args.cores or sorted(os.sched_getaffinity(0))[-2:])
    for name in THREAD_VARIABLES:
        os.environ[name] = "1"
    training_s = median(column(run("train.py", 0.0, args), "perf/train_time"))
    rows = []
    for factor in args.factor:
        generation_s = factor * training_s
        for driver in ("train.py", "train_async.py"):
            steps = run(driver, generation_s, args)
            trained_s, wall_s = median(column(steps, "perf/train_time")), median(column(steps, "perf/step_time"))
            longer_s = max(trained_s, median(column(steps, "perf/generate_time")))
            rows.append(
                {
                    "driver": driver,
                    "generation s": generation_s,
                    "training s": trained_s,
                    "step s": wall_s,
                    "step / longer phase": wall_s / longer_s,
                    "bubble": median(column(steps, "perf/bubble_fraction")),
                }
            )
    settings = {"samples": args.samples, "tokens": args.tokens, "steps": args.steps, "cores": cores}
    report("drivers beside a simulated engine", rows, settings=settings, json_path=args.json)


def run(driver: str, generation_s: float, args: argparse.Namespace) -> list[dict[str, float]]:
    """The metrics of each counted step."""
    with tempfile.TemporaryDirectory(prefix="miles-async-") as directory:
        environment = {
            **os.environ,
            "DRIVER": driver,
            "MILES_PYTHON": sys.executable,
            "MILES_SIMULATED_S": str(generation_s),
            "MILES_SIMULATED_TOKENS": str(args.tokens),
        }
        command = ["bash", str(ROOT / "scripts/run_qwen3_grpo.sh"), "--run-dir", f"{directory}/run", "--no-report"]
        command += ["--custom-generate-function-path", f"{ROOT}/benchmarks/simulated_engine.py:generate"]
        command += [
            "--rm-type",
            "random",
            "--num-rollout",
            str(args.steps),
            "--rollout-batch-size",
            str(args.samples // 8),
        ]
        command += ["--rollout-max-response-len", str(args.tokens)]
        command += ["--eval-config", "unset", "--eval-interval", "unset"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=directory)
        if done.returncode:
            raise SystemExit(f"the run of {driver} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in (Path(directory) / "run/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "perf/train_time" in line][WARM_UP:-1]


def column(steps: list[dict[str, float]], key: str) -> list[float]:
    return [step[key] for step in steps]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, nargs="+", default=[1.0], help="generation in units of training time")
    parser.add_argument("--samples", type=int, default=256, help="of a rollout (default: 256)")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer (default: 32)")
    parser.add_argument("--steps", type=int, default=20, help="rollouts of each run (default: 20)")
    parser.add_argument("--cores", type=int, nargs="+", help="default: the last two")
    parser.add_argument("--json", help="write the figures there, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
