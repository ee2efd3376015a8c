"""The same run on other layouts: two data-parallel ranks, two engines, colocated; and each half alone."""

from __future__ import annotations

import pytest

from .harness import flags, train


@pytest.mark.timeout(400)
def test_two_ranks_and_two_engines_train_as_one_of_each(task, tmp_path):
    common = {"deterministic_mode": True, "num_rollout": 3, "check_weight_update_equal": True}
    one = train(flags(task, **common), tmp_path / "one").check()
    two = train(
        flags(task, **common, actor_num_gpus_per_node=2, rollout_num_gpus=2, balance_data=True), tmp_path / "two"
    ).check()
    colocated = train(
        flags(task, **common, actor_num_gpus_per_node=2, colocate=True, micro_batch_size=3), tmp_path / "colocated"
    ).check()

    assert [s["tokens"] for s in one.samples(0)] == [s["tokens"] for s in two.samples(0)], (
        "which engine must not matter"
    )
    for other in (two, colocated):
        # Rollouts after the first come from weights that differ by float rounding, hence only the first is compared.
        for key in ("train/loss", "train/pg_loss", "train/grad_norm", "train/entropy", "rollout/raw_reward"):
            assert other.series(key)[0] == pytest.approx(one.series(key)[0], rel=1e-5, abs=1e-7), key
        assert max(other.series("train/train_rollout_logprob_abs_diff_max")) < 1e-5


def test_half_a_run_alone_and_replayed(task, tmp_path):
    data = str(tmp_path / "kept" / "{rollout_id}.jsonl")
    rollout = train(
        flags(task, debug_rollout_only=True, num_rollout=2, save_debug_rollout_data=data), tmp_path / "rollout"
    ).check()
    assert "train/loss" not in rollout.metrics[-1]
    replay = train(flags(task, load_debug_rollout_data=data, num_rollout=2), tmp_path / "replay").check()
    assert len(replay.series("train/loss")) == 2
    assert replay.samples(1) == rollout.samples(1)
    assert replay.series("train/train_rollout_logprob_abs_diff_max")[0] < 1e-5
