"""The rewards `ifeval` and `ifbench`."""

from __future__ import annotations

from miles.interfaces import Args
from miles.rollout.rewards.registry import register_reward
from miles.types import Sample

from .catalogue import bound_checks
from .language import identifier


def _verdicts(args: Args, sample: Sample, *, response: str) -> str:
    is_empty = not response.strip()
    verdicts = {name: not is_empty and check(response) for name, check in bound_checks(sample.metadata)}
    return ", ".join(f"{name} {'holds' if held else 'fails'}" for name, held in verdicts.items())


def follows(args: Args, sample: Sample, *, response: str) -> float:
    """1 when every instruction of the metadata holds for the response without its thoughts, else 0; an empty one is 0."""
    checks = bound_checks(sample.metadata)
    return float(bool(response.strip()) and all(check(response) for _, check in checks))


def _prepare(args: Args) -> None:
    identifier()


for _name in ("ifeval", "ifbench"):
    register_reward(
        _name,
        skips_thoughts=True,
        check_row=bound_checks,
        time_limit_s=5.0,
        timeout_reward=0.0,
        prepare=_prepare,
        reads=_verdicts,
    )(follows)
