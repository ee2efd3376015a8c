"""Rules of the MODEL flags between themselves; what contradicts a checkpoint is found in `derive`."""

from __future__ import annotations

from collections.abc import Iterator

from .derive import PATTERN_FLAGS
from .fields import fields, flatten
from .layer_pattern import listed
from .problem import Problem
from .rule import Facts, Rule


def patterns_are_of_the_layers(facts: Facts) -> Iterator[Problem]:
    values = flatten(facts.config)
    layers = values["num_layers"]
    for name in sorted(PATTERN_FLAGS):
        text = values[name]
        if text is None:
            continue
        try:
            pattern = listed(text)
        except ValueError as error:
            yield Problem(fields()[name].flag, text, str(error), "write such a list, or a number")
            continue
        if isinstance(pattern, int) and pattern < 1:
            yield Problem(fields()[name].flag, text, "every N-th layer is meant", "give 1 or more")
        if isinstance(pattern, list) and layers is not None and len(pattern) != layers:
            yield Problem(fields()[name].flag, text, f"it lists {len(pattern)} layers", f"list all {layers}")


def window_is_before_a_token(facts: Facts) -> Iterator[Problem]:
    window = facts.config.model.window_size
    if window is not None and (len(window) != 2 or window[0] < 0 or window[1] != 0):
        got, why = " ".join(map(str, window)), "it takes the tokens seen before a token, and 0 after it"
        yield Problem("--window-size", got, why, "write --window-size 4095 0 for a window of 4096")


MODEL_RULES: tuple[Rule, ...] = (patterns_are_of_the_layers, window_is_before_a_token)
