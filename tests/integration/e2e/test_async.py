"""train_async.py: one step ahead, off-policy by exactly one version, and as exact as train.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .harness import check_continues_exactly, flags, train

DRIVER = "train_async.py"


def argv(task: Path, tmp_path: Path, **more: Any) -> list[str]:
    return flags(
        task,
        deterministic_mode=True,
        num_rollout=5,
        save=tmp_path / "ckpt",
        save_interval=3,
        save_hf=str(tmp_path / "hf-{rollout_id}"),
        over_sampling_batch_size=12,
        eval_interval=5,
        eval_prompt_data=["addition", f"{task / 'test.jsonl'}@[:32]"],
        **more,
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("accounts", ["use_rollout_logprobs", "keep_old_actor"])
def test_rollouts_are_one_version_behind_and_continue_exactly(task: Path, tmp_path: Path, accounts: str) -> None:
    given = {"keep_old_actor": True} if accounts == "keep_old_actor" else {}
    asked = argv(task, tmp_path, **given)
    run = train(asked, tmp_path / "run", driver=DRIVER).check()
    for rollout_id in range(5):
        made_by = {version for sample in run.samples(rollout_id) for version in sample["weight_versions"]}
        assert made_by == {str(max(rollout_id - 1, 0))}
    assert run.series("rollout/weight_lag/max") == run.series("rollout/weight_lag/mean") == [0, 1, 1, 1, 1]
    # The ratio is to the policy that answered, which the trained one has left by a step.
    first, *later = run.series("train/ratio_first")
    assert first == pytest.approx(1, abs=1e-6)
    assert all(abs(ratio - 1) > 1e-5 for ratio in later)
    assert len(run.series("perf/rollout_ahead_time")) == 4
    if accounts == "keep_old_actor":
        gaps = run.series("train/train_rollout_logprob_abs_diff_max")
        assert max(gaps) < 1e-4, "old log-probs are of the weights that answered"
    else:
        assert (tmp_path / "ckpt" / "iter_0000003" / "rollout_ahead.jsonl").is_file()
        assert not (tmp_path / "ckpt" / "iter_0000005" / "rollout_ahead.jsonl").exists()
    check_continues_exactly(run, asked, tmp_path, iteration=3, driver=DRIVER)


@pytest.mark.timeout(200)
def test_either_driver_continues_a_checkpoint_of_the_other(task: Path, tmp_path: Path) -> None:
    """Nothing that was generated is lost: train.py trains on the rollout that was made ahead."""
    asked = [*argv(task, tmp_path), "--load", str(tmp_path / "ckpt")]
    ahead = train([*asked, "--debug-exit-after-rollout", "3"], tmp_path / "first", driver=DRIVER).check()
    on_time = train([*asked, "--num-rollout", "4"], tmp_path / "second").check()
    assert on_time.samples(3) == ahead.samples(3)
    assert on_time.series("rollout/weight_lag/max") == [1]
    back = train(
        [*asked, "--num-rollout", "6", "--lr-decay-style", "constant"], tmp_path / "third", driver=DRIVER
    ).check()
    assert back.series("rollout/weight_lag/max") == [0, 1]


def test_what_cannot_be_ahead_is_refused(task: Path, tmp_path: Path) -> None:
    for more, says in (
        ({"colocate": True}, "--colocate: train_async.py generates while it trains"),
        ({"rollouts_ahead": 0}, "--rollouts-ahead, got 0: train_async.py generates 1 ahead"),
        ({"keep_old_actor": True, "use_rollout_logprobs": True}, "--keep-old-actor: --use-rollout-logprobs takes"),
    ):
        run = train(argv(task, tmp_path, **more), tmp_path / "run", driver=DRIVER)
        assert run.returncode == 2
        assert says in run.output
