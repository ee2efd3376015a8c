"""What a run will do, against numbers worked by hand."""

from __future__ import annotations

import pytest

from miles.config import budget_table, derive_num_rollout, make_config
from miles.errors import ConfigError


def test_rows() -> None:
    config = make_config(
        num_rollout=60,
        rollout_batch_size=32,
        n_samples_per_prompt=8,
        num_steps_per_rollout=2,
        actor_num_gpus_per_node=2,
        micro_batch_size=10,
        rollout_max_prompt_len=6,
        rollout_max_response_len=4,
        rollout_max_context_len=16,
    )
    assert budget_table(config, num_prompts=960) == [
        ("prompts", "32 per rollout, 1,920 in 60 rollouts (2.00 passes over 960)"),
        ("samples", "256 per rollout, 15,360 in 60 rollouts, 8 per prompt"),
        ("tokens", "at most 2,560 per rollout, 153,600 in 60 rollouts, 10 per sample"),
        ("optimizer steps", "2 per rollout, 120 in 60 rollouts, 128 samples each"),
        # 128 samples over 2 ranks are 64 rows, in sevens of 10
        ("micro-batches per rank", "at most 14 per rollout, 840 in 60 rollouts"),
    ]


def test_dynamic_micro_batches() -> None:
    lengths = {"rollout_max_prompt_len": 6, "rollout_max_response_len": 4, "rollout_max_context_len": 16}
    flags = {"rollout_batch_size": 10, "use_dynamic_batch_size": True, **lengths}
    # 10 rows of 10 tokens, three to a budget of 35
    assert (
        dict(budget_table(make_config(max_tokens_per_gpu=35, **flags)))["micro-batches per rank"]
        == "at most 4 per rollout"
    )
    # a budget below one row still takes one
    assert (
        dict(budget_table(make_config(max_tokens_per_gpu=5, **flags)))["micro-batches per rank"]
        == "at most 10 per rollout"
    )


def test_epochs_become_rollouts() -> None:
    config = make_config(num_epoch=3, rollout_batch_size=32, num_steps_per_rollout=1)
    assert config.rollout.num_rollout is None
    derived = derive_num_rollout(config, 100)
    assert derived.rollout.num_rollout == 9
    assert derived.optimizer.lr_decay_iters == 9
    assert derive_num_rollout(make_config(num_rollout=4), 100).rollout.num_rollout == 4
    with pytest.raises(ConfigError, match="--num-epoch, got 3: 10 prompts a pass do not fill one rollout"):
        derive_num_rollout(config, 10)
