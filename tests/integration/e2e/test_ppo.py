"""PPO through train.py: the critic's rollouts, its metrics, its export, and its continuation."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from .harness import check_continues_exactly, flags, train


@pytest.mark.timeout(300)
def test_a_critic_is_trained_beside_the_actor_and_continued(task: Path, tmp_path: Path) -> None:
    argv = flags(
        task,
        advantage_estimator="ppo",
        deterministic_mode=True,
        num_rollout=4,
        num_critic_only_steps=1,
        kl_coef=0.01,
        save=tmp_path / "ckpt",
        save_interval=2,
        save_hf=str(tmp_path / "hf-{rollout_id}"),
        critic_save=tmp_path / "critic",
    )
    run = train(argv, tmp_path / "run").check()
    assert len(run.series("train/value_loss")) == 4
    assert run.series("train/value")[0] == 0
    assert run.series("train/global_step") == [0, 1, 2, 3]
    assert len(run.series("train/pg_loss")) == 3
    critic = load_file(tmp_path / "critic" / "model.safetensors")
    assert critic["score.weight"].any()
    assert "lm_head.weight" not in critic
    assert (tmp_path / "ckpt" / "iter_0000004" / "critic").is_dir()
    check_continues_exactly(run, argv, tmp_path, iteration=2)
