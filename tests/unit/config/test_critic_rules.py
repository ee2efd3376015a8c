"""The critic's flags: each is refused where it would do nothing, and what defaults PPO brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miles.config import make_config
from miles.config.critic_rules import _CRITIC_FLAGS
from miles.errors import ConfigError

STEPS = {"rollout_batch_size": 4, "n_samples_per_prompt": 4, "num_steps_per_rollout": 2, "num_rollout": 5}
VALUES: dict[str, Any] = {
    **{"lambd": 0.9, "value_clip": 0.1, "num_critic_only_steps": 1, "critic_load": "dir", "critic_save": "dir"},
    **{"critic_lr": 1e-5, "critic_lr_warmup_iters": 2, "critic_num_nodes": 1, "critic_num_gpus_per_node": 1},
}


@pytest.mark.parametrize("name", _CRITIC_FLAGS)
def test_a_flag_of_the_critic_needs_one(name: str) -> None:
    flag = "--" + name.replace("_", "-")
    save = {"save": "there"} if name == "critic_save" else {}
    with pytest.raises(ConfigError, match=f"{flag}, got .*: --advantage-estimator grpo has no critic; add"):
        make_config(**{name: VALUES[name]}, **save)
    make_config(advantage_estimator="ppo", **{name: VALUES[name]}, **save)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            {"critic_num_nodes": 2},
            "--critic-num-nodes, got 2: the critic shares the actor's ranks, and --actor-num-nodes is 1",
        ),
        (
            {"critic_num_gpus_per_node": 1, "actor_num_gpus_per_node": 2},
            "--critic-num-gpus-per-node, got 1: the critic shares the actor's ranks, and --actor-num-gpus-per-node is 2",
        ),
        ({"num_critic_only_steps": 5, **STEPS}, "--num-critic-only-steps, got 5: the run has --num-rollout 5"),
        (
            {"critic_lr": 1e-6, "lr": 1e-4, "min_lr": 1e-5, "lr_decay_style": "linear"},
            "--critic-lr, got 1e-06: it is below --min-lr 1e-05",
        ),
        (
            {"critic_lr_warmup_iters": 10, **STEPS},
            "--critic-lr-warmup-iters, got 10: the critic's schedule ends after 10",
        ),
        ({"critic_save": "dir"}, "--critic-save, got dir: without --save no checkpoint is written"),
        ({"lambd": 1.5}, "--lambd, got 1.5: it must be at least 0 and at most 1"),
        ({"value_clip": 0.0}, "--value-clip, got 0: it must be more than 0"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_a_critic_cannot_do_is_refused(flags: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(advantage_estimator="ppo", **flags)
    assert str(caught.value).splitlines()[0].replace(f"{Path.cwd()}/", "").startswith(line)


def test_what_ppo_brings() -> None:
    config = make_config(advantage_estimator="ppo", lr=3e-5, gamma=0.99, actor_num_gpus_per_node=2, **STEPS)
    assert config.grpo.normalize_advantages
    assert (config.grpo.lambd, config.grpo.value_clip) == (1.0, 0.2)
    assert config.optimizer.critic_lr == 3e-5
    assert (config.cluster.critic_num_nodes, config.cluster.critic_num_gpus_per_node) == (1, 2)
    assert config.optimizer.lr_decay_iters == 10
    assert make_config().optimizer.critic_lr is None


def test_the_actors_schedule_is_shorter_by_what_the_critic_trains_alone() -> None:
    config = make_config(advantage_estimator="ppo", num_critic_only_steps=2, critic_lr_warmup_iters=9, **STEPS)
    assert config.optimizer.lr_decay_iters == 6
