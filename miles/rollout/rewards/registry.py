"""Rewards by name: what --rm-type and `metadata["rm_type"]` choose from.

    @register_reward("exact", needs_label=True, inline=True)
    def exact(args, sample, *, response): ...

A rule takes what a reward hook takes, `(args, sample)`, and of these keywords the ones it names: `response` (the text
to grade: the sample's, or the last box under a `boxed_` prefix), `seed` (63-bit, of this sample's reward), `timeout_s`.
One's own rules are registered by a module given as --plugin.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from miles.errors import ConfigError
from miles.interfaces import Args
from miles.types import Sample

from .boxed import last_box

BOXED = "boxed_"


@dataclass(frozen=True)
class Rule:
    """One registered reward."""

    name: str
    function: Callable[..., Any]
    """Sync or async; returns float or dict."""
    needs_label: bool = False
    needs_url: bool = False
    inline: bool = False
    """Cheap and safe: runs in the manager's event loop (async where it waits). Others run in a killable worker."""
    reads_box: bool = False
    """Looks for the box itself, so that the boxed_ prefix changes nothing."""
    quick: Callable[[Sample], float | None] | None = None
    """Decides what it can within microseconds, else None; saves the way to a worker."""
    time_limit_s: float | None = None
    """Tighter than --rm-timeout, for rules that are quick when they are not stuck."""
    timeout_reward: float | None = None
    """The score of an answer that cannot be checked in time; None counts it as a failure of the sample."""


_rules: dict[str, Rule] = {}


def register_reward(name: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `function` becomes the reward `name`. Options are the fields of `Rule`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        known = _rules.get(name)
        if known is not None and known.function.__module__ != function.__module__:
            raise ConfigError(
                f"reward {name!r}, got a second registration by {function.__module__}: "
                f"{known.function.__module__} has that name; choose another"
            )
        if name.startswith(BOXED):
            raise ConfigError(
                f"reward {name!r}, got the prefix {BOXED!r}: it makes variants of other rewards; rename it"
            )
        _rules[name] = Rule(name, function, **options)
        return function

    return register


def names() -> list[str]:
    """The registered rewards, without boxed_ variants."""
    return sorted(_rules)


def find(rm_type: str) -> Rule:
    """The rule behind a reward type, also with the boxed_ prefix. Raises `ConfigError` with the nearest name."""
    base = rm_type.removeprefix(BOXED) if isinstance(rm_type, str) else rm_type
    if base in _rules:
        return _rules[base]
    near = difflib.get_close_matches(str(base), _rules, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names())}"
    raise ConfigError(f"reward type, got {rm_type!r}: no reward has this name; {hint}")


def graded_text(rm_type: str, sample: Sample) -> str:
    """What a rule grades: the response, or the content of its last box ("" without one) under the boxed_ prefix."""
    if rm_type.startswith(BOXED) and not find(rm_type).reads_box:
        return last_box(sample.response) or ""
    return sample.response


def call(function: Callable[..., Any], args: Args, subject: Any, **offered: Any) -> Any:
    """`function(args, subject)` with those of the offered keywords that it can take."""
    parameters = inspect.signature(function).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        offered = {k: v for k, v in offered.items() if k in parameters}
    return function(args, subject, **offered)
