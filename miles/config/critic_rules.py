"""What the critic's flags demand: each acts only in PPO, and none is ignored."""

from __future__ import annotations

from collections.abc import Iterator

from .fields import fields, show
from .groups import Config
from .problem import Problem
from .rule import Facts, Range, Rule, needs

_CRITIC_FLAGS = (
    *("lambd", "value_clip", "num_critic_only_steps", "critic_load", "critic_save"),
    *("critic_lr", "critic_lr_warmup_iters", "critic_num_nodes", "critic_num_gpus_per_node"),
)

CRITIC_RANGES: dict[str, Range] = {
    "lambd": Range(0, 1),
    "value_clip": Range(0, open_low=True),
    **dict.fromkeys(["num_critic_only_steps", "critic_lr", "critic_lr_warmup_iters"], Range(0)),
}


def uses_critic(config: Config) -> bool:
    return config.grpo.advantage_estimator == "ppo"


def critic_flags_need_ppo(facts: Facts) -> Iterator[Problem]:
    estimator = facts.config.grpo.advantage_estimator
    why = f"--advantage-estimator {estimator} has no critic"
    fix = "add --advantage-estimator ppo, or leave it out"
    yield from needs(facts, _CRITIC_FLAGS, unless=uses_critic(facts.config), why=why, fix=fix)


def critic_shares_the_actors_ranks(facts: Facts) -> Iterator[Problem]:
    cluster = facts.config.cluster
    if not uses_critic(facts.config):
        return
    for name, actors in (
        ("critic_num_nodes", cluster.actor_num_nodes),
        ("critic_num_gpus_per_node", cluster.actor_num_gpus_per_node),
    ):
        given, actor_flag = getattr(cluster, name), fields()[name.replace("critic", "actor")].flag
        if given != actors:
            why = f"the critic shares the actor's ranks, and {actor_flag} is {actors}"
            yield Problem(fields()[name].flag, given, why, "give the same, or leave it out")


def critic_steps_leave_some_to_the_actor(facts: Facts) -> Iterator[Problem]:
    alone, length = facts.config.grpo.num_critic_only_steps, facts.config.rollout.num_rollout
    if length is not None and alone >= length > 0 and uses_critic(facts.config):
        why = f"the run has --num-rollout {length}, so the actor would never be trained"
        yield Problem("--num-critic-only-steps", alone, why, f"give less than {length}")


def critic_rate_goes_down(facts: Facts) -> Iterator[Problem]:
    optimizer = facts.config.optimizer
    if "critic_lr" in facts.given and optimizer.critic_lr is not None and optimizer.min_lr > optimizer.critic_lr:
        why = f"it is below --min-lr {show(optimizer.min_lr)}, so the rate would rise"
        yield Problem("--critic-lr", show(optimizer.critic_lr), why, "raise it, or lower --min-lr")


def critic_warm_up_ends_before_decay(facts: Facts) -> Iterator[Problem]:
    optimizer, rollout = facts.config.optimizer, facts.config.rollout
    decay, warmup = optimizer.lr_decay_iters, optimizer.critic_lr_warmup_iters
    if decay is None or not uses_critic(facts.config):
        return
    decay += facts.config.grpo.num_critic_only_steps * (rollout.num_steps_per_rollout or 1)
    if warmup >= decay:
        why = f"the critic's schedule ends after {decay} optimizer steps, before the warm-up does"
        yield Problem("--critic-lr-warmup-iters", warmup, why, f"give less than {decay}")


CRITIC_RULES: tuple[Rule, ...] = (
    critic_flags_need_ppo,
    critic_shares_the_actors_ranks,
    critic_steps_leave_some_to_the_actor,
    critic_rate_goes_down,
    critic_warm_up_ends_before_decay,
)
