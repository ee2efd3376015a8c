"""rollout_batch_size * n_samples_per_prompt = global_batch_size * num_steps_per_rollout: every sample counts once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .problem import Problem

LAW = "--rollout-batch-size * --n-samples-per-prompt = --global-batch-size * --num-steps-per-rollout"


@dataclass(frozen=True)
class BatchSizes:
    """The four sizes; None is what is to be derived."""

    rollout_batch_size: int | None = None
    n_samples_per_prompt: int | None = None
    global_batch_size: int | None = None
    num_steps_per_rollout: int | None = None


def solve_batch_sizes(given: BatchSizes) -> BatchSizes | Problem:
    """All four sizes, or what is wrong.

    Three give the fourth. Of fewer, one sample per prompt is the default and then one optimizer step per rollout; where
    both groups and samples are known the step is the default.
    """
    sizes = given
    for name, value in vars(given).items():
        if value is not None and value < 1:
            return Problem("--" + name.replace("_", "-"), value, "it must be at least 1", "give a positive number")
    if _unknowns(sizes) > 1 and sizes.n_samples_per_prompt is None:
        sizes = replace(sizes, n_samples_per_prompt=1)
    if _unknowns(sizes) > 1 and sizes.num_steps_per_rollout is None:
        sizes = replace(sizes, num_steps_per_rollout=1)
    if _unknowns(sizes) > 1:
        return Problem(
            "batch sizes", _known(given), f"too few to derive the others by {LAW}", "give --rollout-batch-size"
        )
    return _fourth(sizes)


def _unknowns(sizes: BatchSizes) -> int:
    return sum(value is None for value in vars(sizes).values())


def _fourth(sizes: BatchSizes) -> BatchSizes | Problem:
    r, n, g, s = (
        sizes.rollout_batch_size,
        sizes.n_samples_per_prompt,
        sizes.global_batch_size,
        sizes.num_steps_per_rollout,
    )
    if r is not None and n is not None and g is not None and s is not None:
        if r * n == g * s:
            return sizes
        why = f"a rollout has {r} * {n} = {r * n} samples, its optimizer steps take {g} * {s} = {g * s} ({LAW})"
        return Problem("batch sizes", _known(sizes), why, "change one, or give three and let the fourth be derived")
    if r is not None and n is not None:
        total, known = r * n, g if g is not None else s
    else:
        assert g is not None
        assert s is not None
        total, known = g * s, r if r is not None else n
    assert known is not None
    missing = next(name for name, value in vars(sizes).items() if value is None)
    if total % known:
        flag = "--" + missing.replace("_", "-")
        why = f"{flag} would be {total} / {known}, not a whole number ({LAW})"
        return Problem("batch sizes", _known(sizes), why, f"choose sizes that divide, or give {flag}")
    return replace(sizes, **{missing: total // known})


def _known(sizes: BatchSizes) -> str:
    named = [f"--{name.replace('_', '-')} {value}" for name, value in vars(sizes).items() if value is not None]
    return ", ".join(named) or "none of the four"
