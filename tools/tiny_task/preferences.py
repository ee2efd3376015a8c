"""Preferences over answers to the additions: the right one is chosen, the one without carries rejected.

    DIR/pairs.jsonl, DIR/pairs_test.jsonl        {"prompt": messages, "chosen": "75", "rejected": "65"}
    DIR/judged.jsonl, DIR/judged_test.jsonl      {"prompt": messages, "completion": "65", "label": false}

Only problems with a carry are asked: in the others the careless teacher is right. Training and test problems are those of the
task. Every problem is judged once, half of them with the right answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .problems import Problem, split_problems


def write_preferences(directory: Path) -> None:
    """Writes the four files; the same bytes on every call."""
    for problems, end in zip(split_problems(), ("", "_test"), strict=True):
        carrying = [problem for problem in problems if problem.answer != problem.careless_answer]
        _write(directory / f"pairs{end}.jsonl", _lines([_pair(problem) for problem in carrying]))
        judged = [_judged(problem, is_right=number % 2 == 0) for number, problem in enumerate(carrying)]
        _write(directory / f"judged{end}.jsonl", _lines(judged))


def _pair(problem: Problem) -> dict[str, Any]:
    return {"prompt": problem.as_row()["prompt"], "chosen": problem.answer, "rejected": problem.careless_answer}


def _judged(problem: Problem, *, is_right: bool) -> dict[str, Any]:
    answer = problem.answer if is_right else problem.careless_answer
    return {"prompt": problem.as_row()["prompt"], "completion": answer, "label": is_right}


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write(path: Path, text: str) -> None:
    """Whole or not at all, also for a reader that looks meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
