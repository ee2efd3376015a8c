"""The directory that a run needs, made once, whole or not at all.

    DIR/model/        a Hugging Face checkpoint (safetensors) with tokenizer and chat template
    DIR/train.jsonl   7,588 rows {"prompt": messages, "label": "75"}
    DIR/test.jsonl    512 rows of problems that no training row has
    DIR/eval.yaml     for --eval-config: `addition` (T=1, 4 samples) and `addition_greedy` (T=0) on test.jsonl
    DIR/DONE          the hash of the recipe that made it

It grows under the name DIR.making and is renamed when complete, so a making that was killed leaves nothing that looks
finished. A lock keeps two makings apart. A directory that another recipe made is replaced; one that is not ours is left
alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .problems import Problem, split_problems

_MARKER = "DONE"


@dataclass(frozen=True)
class Recipe:
    """All that decides what is made, besides the code."""

    seed: int = 0
    """Of the base model; the problems and their split are always the same."""
    sft: dict[str, Any] = field(default_factory=dict)
    """Overrides of the fields of `SftSpec`."""

    def digest(self) -> str:
        """Changes with any value and with any line of the code that makes the model or the data."""
        hasher = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for name in ("base_model.py", "making.py", "muon.py", "problems.py", "sft.py"):
            hasher.update(Path(__file__).with_name(name).read_bytes())
        return hasher.hexdigest()


def is_made(directory: Path, recipe: Recipe) -> bool:
    """Whether `directory` is complete and of this recipe. Cheap: imports no torch."""
    marker = directory / _MARKER
    return marker.is_file() and marker.read_text().strip() == recipe.digest()


def make(
    directory: Path,
    recipe: Recipe,
    *,
    num_threads: int = 1,
    on_step: Callable[[int, float], None] | None = None,
) -> bool:
    """Makes `directory` unless it is there already; returns whether it had to. Safe to call from several processes.

    The same recipe gives the same bytes on one machine with one `num_threads`. Raises `FileExistsError` where
    `directory` holds something that was not made here.
    """
    directory = directory.absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _lock(directory.with_name(directory.name + ".lock")):
        fresh = not is_made(directory, recipe)
        if fresh:
            _refuse_to_replace_what_is_not_ours(directory)
            unfinished = directory.with_name(directory.name + ".making")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            _fill(unfinished, recipe, num_threads, on_step)
            shutil.rmtree(directory, ignore_errors=True)
            unfinished.rename(directory)
        _write(
            directory / "eval.yaml", _eval_config(directory)
        )  # holds the absolute path: the directory may have moved
    return fresh


def _fill(directory: Path, recipe: Recipe, num_threads: int, on_step: Callable[[int, float], None] | None) -> None:
    import torch

    from .base_model import build_model, build_tokenizer
    from .sft import SftSpec, train

    torch.set_num_threads(num_threads)
    train_problems, test_problems = split_problems()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=recipe.seed)
    train(model, tokenizer, train_problems, SftSpec(**recipe.sft), seed=recipe.seed, on_step=on_step)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    _write(directory / "train.jsonl", _jsonl(train_problems))
    _write(directory / "test.jsonl", _jsonl(test_problems))
    _write(directory / _MARKER, recipe.digest() + "\n")


def _refuse_to_replace_what_is_not_ours(directory: Path) -> None:
    if directory.exists() and not (directory / _MARKER).is_file() and any(directory.iterdir()):
        raise FileExistsError(
            f"directory of the tiny task, got {directory}: it holds files that were not made by this tool; "
            f"name another directory or empty this one"
        )


def _jsonl(problems: Iterable[Problem]) -> str:
    return "".join(json.dumps(problem.as_row()) + "\n" for problem in problems)


def _eval_config(directory: Path) -> str:
    path = json.dumps(str(directory / "test.jsonl"))  # a JSON string is a YAML string
    return (
        "# Held-out problems are scored by exact match, whatever reward the run trains on.\n"
        "defaults: {rm_type: exact, custom_rm_path: null}\n"
        "datasets:\n"
        f"- {{name: addition, path: {path}, temperature: 1.0, n_samples_per_eval_prompt: 4}}\n"
        f"- {{name: addition_greedy, path: {path}, temperature: 0.0, n_samples_per_eval_prompt: 1}}\n"
    )


def _write(path: Path, text: str) -> None:
    """Whole or not at all, also for a reader that looks meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Waits for another making of the same directory; the kernel frees the lock of a process that died."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
