"""PPO through train.py: the critic's rollouts, its metrics, its export."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from .harness import flags, train


@pytest.mark.timeout(300)
def test_a_critic_is_trained_beside_the_actor(task, tmp_path):
    run = train(
        flags(
            task,
            advantage_estimator="ppo",
            num_rollout=3,
            num_critic_only_steps=1,
            kl_coef=0.01,
            save=tmp_path / "ckpt",
            critic_save=tmp_path / "critic",
        ),
        tmp_path / "run",
    ).check()
    assert len(run.series("train/value_loss")) == 3
    assert run.series("train/value")[0] == 0
    assert run.series("train/global_step") == [0, 1, 2]
    assert len(run.series("train/pg_loss")) == 2
    critic = load_file(tmp_path / "critic" / "model.safetensors")
    assert critic["score.weight"].any()
    assert "lm_head.weight" not in critic
    assert (tmp_path / "ckpt" / "iter_0000003" / "critic").is_dir()
