"""Rewards by name: what --rm-type and `metadata["rm_type"]` choose from.

    @register_reward("exact", needs_label=True, inline=True)
    def exact(args, sample, *, response): ...

A rule takes what a reward hook takes, `(args, sample)`, and of these keywords the ones it names: `response` (the text
to grade: the sample's, or the last box under a `boxed_` prefix), `boxed` (whether there was that prefix), `seed`
(63-bit, of this sample's reward), `timeout_s`. One's own rules are registered by a module given as --plugin.

A reward type is a name, a name with the prefix, or several with commas: `math,format` gives {"math": 1.0, "format": 0.0}.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from miles.errors import ConfigError, HookError
from miles.interfaces import Args
from miles.types import Sample

from .boxed import last_box
from .thinking import after_thinking

BOXED = "boxed_"


@dataclass(frozen=True)
class Rule:
    """One registered reward."""

    name: str
    function: Callable[..., Any]
    """Sync or async; returns float or dict."""
    needs_label: bool = False
    label_from: str | None = None
    """Key of a row's metadata that takes the label's place."""
    needs_url: bool = False
    inline: bool = False
    """Cheap and safe: runs in the manager's event loop (async where it waits). Others run in a killable worker."""
    reads_box: bool = False
    """Looks for the box itself, so that the boxed_ prefix changes nothing."""
    skips_thoughts: bool = False
    """Grades what follows the last `</think>`; thoughts that never end are no answer."""
    quick: Callable[[Sample], float | None] | None = None
    """Decides what it can within microseconds, else None; saves the way to a worker."""
    time_limit_s: float | None = None
    """Tighter than --rm-timeout, for rules that are quick when they are not stuck."""
    timeout_reward: float | Callable[[Args, Sample], Any] | None = None
    """The score of an answer that cannot be checked in time; None counts it as a failure of the sample."""
    entries: tuple[str, ...] = ()
    """The numbers of a reward that is a dict; the first is what it counts for among several rewards."""
    modules: tuple[str, ...] = ()
    """Slow to import: workers do it at their start, so that the first answer does not pay for it out of its limit."""
    prepare: Callable[[Args], None] | None = None
    """What workers do at their start besides, where the configuration uses the rule."""
    lacks: Callable[[Args], tuple[str, str, str] | None] = lambda args: None
    """What the flags leave open that the rule needs: (flag, why, fix)."""
    check_row: Callable[[Mapping[str, Any]], object] = lambda metadata: None
    """Raises `DataError` for a row's metadata that the rule cannot score by."""
    reads: Callable[..., str | None] | None = None
    """What it takes for the answer, for the try-out command: `(args, sample)` and keywords as the rule itself."""


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


def split(rm_type: str) -> list[str]:
    """The names that a reward type holds; one, unless there are commas.

    >>> split("math, boxed_exact")
    ['math', 'boxed_exact']
    """
    return [name.strip() for name in rm_type.split(",")] if isinstance(rm_type, str) else [rm_type]


def find_all(rm_type: str) -> list[Rule]:
    """The rules behind a reward type. Raises `ConfigError` for the first name that there is not."""
    return [find(name) for name in split(rm_type)]


def entries(rm_type: str) -> list[str]:
    """The numbers by name that the reward type gives; none where it gives a plain number."""
    parts = split(rm_type)
    if len(parts) == 1:
        return list(find(rm_type).entries)
    return [entry for name in parts for entry in (name, *(f"{name}/{key}" for key in find(name).entries[1:]))]


def combine(rewards: dict[str, Any]) -> dict[str, Any]:
    """One dict out of the rewards of several names: `dapo` is that reward's first entry, `dapo/acc` another of them.

    Raises `HookError` for a reward without the entries that its rule names.
    """
    combined: dict[str, Any] = {}
    for name, reward in rewards.items():
        if not isinstance(reward, dict):
            combined[name] = reward
            continue
        known = find(name).entries
        first = known[0] if known else next(iter(reward), None)
        if first not in reward:
            raise HookError(
                f"reward {name}, got a dict with keys {sorted(map(str, reward))}: beside others it counts by its entry "
                f"{first!r}; return that entry"
            )
        combined[name] = reward[first]
        combined |= {f"{name}/{key}": value for key, value in reward.items() if key != first}
    return combined


def graded_text(rm_type: str, sample: Sample) -> str:
    """What a rule grades: the response, without its thoughts where the rule skips them; under the boxed_ prefix the content
    of the last box in that ("" without one)."""
    rule = find(rm_type)
    text = after_thinking(sample, sample.response) if rule.skips_thoughts else sample.response
    return last_box(text) or "" if rm_type.startswith(BOXED) and not rule.reads_box else text


def offered(rm_type: str, sample: Sample, **more: Any) -> dict[str, Any]:
    """The keywords that a rule may take."""
    return {"response": graded_text(rm_type, sample), "boxed": rm_type.startswith(BOXED), **more}


def call(function: Callable[..., Any], args: Args, subject: Any, **offered: Any) -> Any:
    """`function(args, subject)` with those of the offered keywords that it can take."""
    taken = (_keywords if isinstance(function, Hashable) else _keywords.__wrapped__)(function)
    return function(args, subject, **(offered if taken is None else {k: v for k, v in offered.items() if k in taken}))


@functools.cache  # asked for every sample
def _keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names that it takes; None where it takes any."""
    parameters = inspect.signature(function).parameters
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return None if any_name else frozenset(parameters)
