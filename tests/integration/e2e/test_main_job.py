"""The main job as the README gives it: it learns, and with a random reward it does not."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.unit.observe.report.test_report import data_of

from .harness import REPO, Finished, environment


def recipe(tmp_path, *arguments: str) -> Finished:
    done = subprocess.run(
        ["bash", str(REPO / "scripts" / "run_qwen3_grpo.sh"), "--run-dir", str(tmp_path / "run"), *arguments],
        cwd=REPO,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        stdin=subprocess.DEVNULL,
    )
    return Finished(done.returncode, done.stdout, tmp_path / "run").check()


@pytest.mark.timeout(520)
def test_the_main_job_learns(task, tmp_path):
    run = recipe(tmp_path, "--seed", os.environ.get("MILES_TEST_SEED", "1234"))
    sampled, greedy = run.series("eval/addition"), run.series("eval/addition_greedy")
    assert 0.40 <= sampled[0] <= 0.60
    assert sampled[1] - sampled[0] > 0.2, "20 rollouts are enough to tell the control below from it"
    assert sampled[-1] >= 0.93
    assert greedy[-1] >= 0.98
    # Every sample came from the engine with the trainer's own numbers, and on policy the first ratio is 1.
    assert max(run.series("train/train_rollout_logprob_abs_diff_max")) < 1e-4
    assert all(abs(ratio - 1) < 1e-6 for ratio in run.series("train/ratio_first"))
    # Rows without a gradient are left out, but for every tenth step, which scores all.
    skipped = run.series("train/rows_skipped")
    assert sum(skipped) > 0
    assert set(skipped[9::10]) == {0.0}
    versions = {v for s in run.samples(59) for v in s["weight_versions"]}
    assert versions == {"59"}
    assert "before and after" in run.output
    _check_report(run)


def _check_report(run: Finished) -> None:
    """Complete, with both sides' log-probs of the same tokens."""
    report = data_of((run.run_dir / "report.html").read_bytes())["runs"][0]
    assert report["state"]["outcome"] == "finished"
    assert report["curves"]["steps"] == list(range(61))
    traced = [sample for sample in report["samples"] if sample["set"] == "train"]
    assert len(traced) >= 10 * 8
    assert all(len(s["tokens"]) == s["length"] == len(s["rollout"]) for s in traced)
    compared = [sample for sample in traced if "train" in sample]
    assert {sample["index"] for sample in traced if sample["advantage"]} <= {sample["index"] for sample in compared}
    assert 0 < max(sample["gap"] for sample in compared) < 1e-4
    for sample in traced:
        assert "".join(sample["tokens"]).startswith(sample["response"])


@pytest.mark.timeout(520)
def test_a_random_reward_teaches_nothing(task, tmp_path):
    run = recipe(tmp_path, "--rm-type", "random", "--num-rollout", "20", "--lr-decay-iters", "60")
    sampled = run.series("eval/addition")
    assert sampled[-1] - sampled[0] <= 0.05
