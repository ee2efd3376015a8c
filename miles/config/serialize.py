"""`Config` as JSON: what config.json of a run holds and how processes hand the configuration on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .fields import build_config, coerce_all, fields, flatten, group_types
from .groups import Config
from .problem import Problem, raise_if, suggestion


def config_to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """{group: {field: value}}, JSON-ready and lossless: tuples become lists."""
    document: dict[str, dict[str, Any]] = {group: {} for group in group_types()}
    for name, value in flatten(config).items():
        document[fields()[name].group][name] = list(value) if isinstance(value, tuple) else value
    return document


def config_from_dict(document: Mapping[str, Mapping[str, Any]]) -> Config:
    """The inverse of `config_to_dict`; nothing is derived or checked again. Raises `ConfigError` for what does not fit."""
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for group, content in document.items():
        if group not in group_types():
            fix = suggestion(group, group_types(), otherwise=f"the groups are {', '.join(group_types())}")
            problems.append(Problem("config", f"group {group!r}", "there is no such group", fix))
            continue
        for name, value in content.items():
            if name in fields() and fields()[name].group != group:
                problems.append(
                    Problem(f"config {group}", name, f"it belongs to {fields()[name].group}", "move it there")
                )
            values[name] = value
    typed, wrong = coerce_all(values, where="config ")
    raise_if([*problems, *wrong])
    return build_config(typed)
