"""A reward of one's own: graded arithmetic.

A wrong sum that has most digits right scores between 0 and 1, so that a group in which nobody is right can still learn
from who was closest. Returns a dict; `--reward-key score` says which entry trains, and all of them are kept with the
samples.
"""

from __future__ import annotations

from typing import Any

from miles.utils.types import Sample

#: What a wrong answer with all but one digit right could reach; below 1, so that being right always pays most.
MAX_PARTIAL = 0.5


async def score(args: Any, sample: Sample, **kwargs: Any) -> dict[str, float]:
    """`score` in [0, 1]; `correct` 0 or 1; `digits`, the share of the label's digits at their places."""
    answer, label = sample.response.strip(), str(sample.label).strip()
    correct = float(answer == label)
    # From the right, so that units are compared with units.
    same = sum(a == b for a, b in zip(reversed(answer), reversed(label), strict=False))
    digits = same / max(len(answer), len(label), 1)
    return {"score": correct or MAX_PARTIAL * digits, "correct": correct, "digits": digits}
