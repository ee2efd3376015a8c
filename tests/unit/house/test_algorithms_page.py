"""docs/algorithms.md: a row for every registered part, with a function that exists, flags that exist and the function's source."""

from __future__ import annotations

import importlib
import re

import pytest

from miles.algo import advantage_estimators, aggregations, surrogates
from miles.algo.corrections import corrections
from miles.algo.preference import pair_losses
from miles.config import make_config
from miles.config.fields import fields

from .paths import REPO

PAGE = (REPO / "docs" / "algorithms.md").read_text()
SECTIONS = {
    "Advantages": advantage_estimators,
    "Policy losses": surrogates,
    "Aggregation": aggregations,
    "Off-policy corrections": corrections,
    "Losses of pairs": pair_losses,
}


def rows(section: str) -> dict[str, list[str]]:
    """Name -> the other cells, of the table below a heading."""
    text = PAGE.partition(f"\n## {section}")[2].partition("\n## ")[0]
    table = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in text.splitlines() if line.startswith("| `")]
    return {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in table}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_part_has_its_row(section: str) -> None:
    found = rows(section)
    assert set(found) == set(SECTIONS[section])
    for name, (function, flags, source, when, *_) in found.items():
        module, _, attribute = function.strip("`").partition(".")
        part = getattr(importlib.import_module(f"miles.algo.{module}"), attribute)
        assert SECTIONS[section].get(name) is part, name
        for flag in re.findall(r"`--([\w-]+)`", flags):
            assert flag.replace("-", "_") in fields(), flag
        for paper in re.findall(r"\d{4}\.\d{5}|https://\S+", source):
            assert paper in (part.__doc__ or "") or paper in (REPO / f"miles/algo/{module}.py").read_text(), (
                name,
                paper,
            )
        assert when, name


def test_flags_of_the_page_exist() -> None:
    known = {field.flag for field in fields().values()} | {"--num-rollout"}
    assert set(re.findall(r"(?<![\w-])(--[a-z][\w-]+)", PAGE)) <= known


def test_recipes_of_the_first_table_resolve() -> None:
    """As far as flags without files go."""
    make_config(disable_grpo_std_normalization=True, loss_aggregation="constant")
    make_config(calculate_per_token_loss=True, eps_clip_high=0.28, overlong_filtering=True)
    make_config(advantage_estimator="gspo", eps_clip=3e-4, eps_clip_high=4e-4)
    make_config(advantage_estimator="ppo", critic_lr=1e-5)
    make_config(advantage_estimator="reinforce_plus_plus", kl_coef=0.001)
    make_config(advantage_estimator="gdpo", reward_weights={"correct": 1, "format": 0.2})


def test_the_plugin_of_the_page_works() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    namespace: dict[str, object] = {}
    try:
        exec(code, namespace)  # our own page
        assert surrogates.get("reinforce") is namespace["reinforce"]
        assert advantage_estimators.get("sign") is namespace["sign"]
    finally:
        surrogates._parts.pop("reinforce", None)
        advantage_estimators._parts.pop("sign", None)
