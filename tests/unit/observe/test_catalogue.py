"""docs/metrics.md: every key that the sources can log is in it, and every key in it is one that they can log."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles.observe.catalogue import GROUPS, METRICS, describe, markdown

ROOT = Path(__file__).parents[3]

#: These read keys, and produce none.
READERS = ("observe/catalogue.py", "observe/display.py", "observe/report", "observe/trackers", "config")
#: Functions of miles.algo that make one metric.
MAKERS = {"mean", "total", "largest", "mean_metric"}
KEY = re.compile(r"(train|rollout|eval|perf|memory)/[^ :;]+")


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / "miles").rglob("*.py")):
        name = path.relative_to(ROOT / "miles").as_posix()
        if not name.startswith(READERS):
            yield path, ast.parse(path.read_text())


def text_of(node: ast.AST) -> str | None:
    """A string, with `*` for each part that is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
    return None


def written_keys(tree: ast.Module) -> Iterator[str]:
    """Texts that stand as the key of a dict literal or of an assigned item: what a producer of metrics writes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys = [(key, value) for key, value in zip(node.keys, node.values, strict=True) if key is not None]
        elif isinstance(node, ast.DictComp):
            keys = [(node.key, node.value)]
        elif isinstance(node, ast.Assign):
            keys = [(t.slice, node.value) for t in node.targets if isinstance(t, ast.Subscript)]
        else:
            continue
        for key, value in keys:
            if (text := text_of(key)) is None:
                continue
            makes_one = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in MAKERS
            if KEY.fullmatch(text) and text not in ("train/*", "perf/*_time"):
                yield text
            elif makes_one and "*" not in text and text not in ("ess_w", "ess_w2", "total_weight"):
                yield f"train/{text}"


def test_every_key_in_the_sources_is_documented() -> None:
    missing = {
        f"{path.relative_to(ROOT)}: {key}"
        for path, tree in sources()
        for key in written_keys(tree)
        if describe(key.replace("*", "x")) is None
    }
    assert not missing, "add them to miles/observe/catalogue.py"


@pytest.mark.parametrize("key", [metric.key for metric in METRICS])
def test_every_documented_key_is_in_the_sources(key: str) -> None:
    pattern = re.sub(r"<[^>]+>", "*", key)
    names = {pattern, re.sub(r"^train/|^perf/|^eval/", "", pattern), re.sub(r"^perf/(.*)_time$", r"\1", pattern)}
    for _, tree in sources():
        for node in ast.walk(tree):
            text = text_of(node)
            if text is None:
                continue
            tail = text.lstrip("*")
            if text in names or (text.startswith("*") and len(tail) > 4 and pattern.endswith(tail)):
                return
    raise AssertionError(f"{key} is logged nowhere; take it out of miles/observe/catalogue.py")


def test_metrics_md_is_up_to_date() -> None:
    written = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert written == markdown(), "run `python -m miles.observe.catalogue`"


def test_a_key_is_described_once() -> None:
    keys = [metric.key for group in GROUPS for metric in group.metrics]
    assert len(set(keys)) == len(keys)
    assert describe("eval/math_500/pass@4").key == "eval/<dataset>/pass@<k>"
    assert describe("eval/math_500").key == "eval/<dataset>"
    assert describe("rollout/dropped/zero_std_0").key == "rollout/dropped/<reason>"
    assert describe("train/los") is None
