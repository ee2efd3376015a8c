"""Makes the tiny base model and the addition task, or scores a checkpoint on the task's held-out problems.

    python tools/make_tiny_task.py DIR                     make DIR/model, DIR/train.jsonl, DIR/test.jsonl, unless there
    python tools/make_tiny_task.py DIR --preferences       and DIR/pairs.jsonl, DIR/judged.jsonl, with held-out ones beside
    python tools/make_tiny_task.py DIR --evaluate          score DIR/model
    python tools/make_tiny_task.py DIR --evaluate MODEL    score another Hugging Face checkpoint, such as a trained one

What the task is, and what it can show: tools/tiny_task/__init__.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from tiny_task.making import Recipe, is_made, make
from tiny_task.preferences import write_preferences


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where model and prompts are kept")
    parser.add_argument("--seed", type=int, default=0, help="seed of the base model (default: 0)")
    parser.add_argument("--preferences", action="store_true", help="also write pairs of answers and judged answers")
    parser.add_argument("--steps", type=int, help="supervised steps; fewer than the recipe's make a worse model")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads (default: 1; on a shared machine two often take longer)"
    )
    parser.add_argument(
        "--evaluate",
        nargs="?",
        const=True,
        default=False,
        metavar="MODEL",
        help="print sampled and greedy accuracy of MODEL (default: DIR/model) by plain Hugging Face generation",
    )
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    recipe = Recipe(seed=args.seed, sft={} if args.steps is None else {"steps": args.steps})
    try:
        if args.evaluate is False:
            _make(args.directory, recipe, args.threads)
            if args.preferences:
                write_preferences(args.directory)
        else:
            _evaluate(args.directory, None if args.evaluate is True else Path(args.evaluate), args.threads)
    except (FileExistsError, FileNotFoundError) as error:
        sys.exit(f"make_tiny_task: {error}")


def _make(directory: Path, recipe: Recipe, num_threads: int) -> None:
    if not is_made(directory, recipe):
        print(f"making the tiny base model and the addition task in {directory}", flush=True)
    started = time.perf_counter()

    def report(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"  step {step:4d}   loss {loss:.3f}   {time.perf_counter() - started:5.1f} s", flush=True)

    if make(directory, recipe, num_threads=num_threads, on_step=report):
        print(f"made {directory} in {time.perf_counter() - started:.1f} s", flush=True)


def _evaluate(directory: Path, model: Path | None, num_threads: int) -> None:
    import torch
    from tiny_task.accuracy import measure

    model, prompts = model or directory / "model", directory / "test.jsonl"
    for path in (model / "config.json", prompts):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; make it with: python tools/make_tiny_task.py {directory}")
    torch.set_num_threads(num_threads)
    print(f"{model}: {measure(model, prompts)}", flush=True)


if __name__ == "__main__":
    main()
