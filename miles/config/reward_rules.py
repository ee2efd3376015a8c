"""Flags of the built-in rewards. What a reward needs is checked where it is known which ones are used: in the rollout room."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .problem import Problem
from .rule import Facts, Range, Rule, needs

REWARD_RANGES: dict[str, Range] = {
    **dict.fromkeys(["cosine_max_len", "soft_max_length", "soft_cache_length"], Range(1)),
    **dict.fromkeys(
        [f"cosine_{end}_len_value_{kind}" for end in ("min", "max") for kind in ("correct", "wrong")],
        Range(-float("inf")),
    ),
    # Every n-gram of a response is held at once.
    "repetition_n_grams": Range(1, 64),
    "repetition_max_penalty": Range(-float("inf"), 0),
}


def format_pattern_is_a_regex(facts: Facts) -> Iterator[Problem]:
    pattern = facts.config.rollout.format_pattern
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        yield Problem("--format-pattern", pattern, f"it is no regular expression of Python: {error}", "mend it")


def rm_model_needs_its_reward(facts: Facts) -> Iterator[Problem]:
    """Rows may name it themselves where nothing else does; an evaluation too."""
    flags = facts.config.rollout
    names = [name.strip().removeprefix("boxed_") for name in (flags.rm_type or "reward_model").split(",")]
    is_read = "reward_model" in names or facts.config.eval.eval_config is not None
    why = f"--rm-type {flags.rm_type} asks no model"
    yield from needs(facts, ("rm_model",), unless=is_read, why=why, fix="take --rm-type reward_model, or leave it out")


REWARD_RULES: tuple[Rule, ...] = (format_pattern_is_a_regex, rm_model_needs_its_reward)
