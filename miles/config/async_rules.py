"""What generating ahead (train_async.py) demands, and what it brings along."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .jobs import find_job, job_of
from .problem import Problem
from .rule import Facts, Rule

#: Flags that say how a loss accounts for older weights.
_ACCOUNTS = ("use_rollout_logprobs", "keep_old_actor", "use_tis", "off_policy_correction", "custom_tis_function_path")


def accounts_for_lag(values: dict[str, Any]) -> bool:
    """Whether the old policy of a run that generates ahead is the one that made the rollout, or nothing asks for an old one."""
    job = find_job(values["loss_type"], online=values["online_preferences"])
    return (
        not values["rollouts_ahead"]
        or not job.rewards
        or job.preference is not None
        or values["policy_loss"] == "dppo"
        or any(values[name] for name in _ACCOUNTS)
    )


def ahead_has_engines_of_its_own(facts: Facts) -> Iterator[Problem]:
    if not facts.config.rollout.rollouts_ahead:
        return
    if facts.config.cluster.colocate:
        why = "train_async.py generates while it trains, so engines and trainers cannot share devices"
        yield Problem("--colocate", None, why, "leave it out (--no-colocate), or run train.py")
    if not job_of(facts.config).engines:
        why = "it starts no engine, so there is nothing to generate ahead"
        yield Problem("--loss-type", facts.config.grpo.loss_type, why, "run train.py")


def one_old_policy(facts: Facts) -> Iterator[Problem]:
    grpo = facts.config.grpo
    if grpo.keep_old_actor and grpo.use_rollout_logprobs:
        why = "--use-rollout-logprobs takes the engine's log-probs as the old policy's"
        yield Problem("--keep-old-actor", None, why, "give one of the two")


ASYNC_RULES: tuple[Rule, ...] = (ahead_has_engines_of_its_own, one_old_policy)
