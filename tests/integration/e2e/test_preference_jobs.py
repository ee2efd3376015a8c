"""Preference jobs as a user runs them: no engine for a data set, engines and rewards online; the same resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .harness import check_continues_exactly, flags, train

#: What flags() gives for engines and rewards.
LEFT_OUT = dict.fromkeys(("rm_type", "n_samples_per_prompt", "rollout_max_response_len", "label_key"))


def _judged(task: Path, path: Path) -> Path:
    """Right answers, and such as a careless teacher gives."""
    rows = []
    for number, line in enumerate((task / "train.jsonl").read_text().splitlines()[:48]):
        problem = json.loads(line)
        right = number % 2 == 0
        answer = problem["label"] if right else str((int(problem["label"]) + 90) % 100)
        rows.append({"prompt": problem["prompt"], "completion": answer, "label": right})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.timeout(400)
def test_kto_learns_and_continues_exactly(task: Path, tmp_path: Path) -> None:
    """The job that looks at most beyond its rows: a reference, and a baseline of mismatched answers, on two ranks."""
    data = _judged(task, tmp_path / "rows.jsonl")

    argv = flags(
        task,
        **LEFT_OUT,
        loss_type="kto",
        prompt_data=data,
        deterministic_mode=True,
        num_rollout=4,
        rollout_batch_size=16,
        num_steps_per_rollout=2,
        actor_num_gpus_per_node=2,
        save=tmp_path / "ckpt",
        save_interval=2,
        save_hf=str(tmp_path / "hf-{rollout_id}"),
        eval_interval=2,
        eval_prompt_data=["held", data],
    )
    whole = train(argv, tmp_path / "whole-run").check()
    assert not list((whole.run_dir / "logs").glob("engine*"))
    losses = whole.series("eval/held/loss")
    assert len(losses) == 3
    assert losses[0] == pytest.approx(0.5), "the policy is the reference"
    assert losses[-1] < 0.49
    assert whole.series("eval/held/reward_chosen")[-1] > whole.series("eval/held/reward_rejected")[-1]

    check_continues_exactly(whole, argv, tmp_path, iteration=2)


@pytest.mark.timeout(300)
def test_online_pairs_are_the_best_and_the_worst_of_a_prompt_and_continue_exactly(task: Path, tmp_path: Path) -> None:
    argv = flags(
        task,
        loss_type="dpo",
        online_preferences=True,
        deterministic_mode=True,
        num_rollout=3,
        lr=1e-3,
        ref_update_interval=1,
        save=tmp_path / "ckpt",
        save_interval=2,
        save_hf=str(tmp_path / "hf-{rollout_id}"),
    )
    run = train(argv, tmp_path / "run").check()
    for rollout_id, pairs in enumerate(run.series("rollout/pairs")):
        groups: dict[int, set[float]] = {}
        for sample in run.samples(rollout_id):
            groups.setdefault(sample["group_index"], set()).add(sample["reward"])
        assert pairs == sum(len(rewards) == 2 for rewards in groups.values())
    losses = run.series("train/loss")
    assert losses == pytest.approx([0.6931] * len(losses), abs=1e-3), (
        "--ref-update-interval 1: the policy is the reference"
    )
    assert run.series("train/grad_norm")[0] > 0
    assert {"rollout/raw_reward", "train/reward_accuracy"} <= {key for line in run.metrics for key in line}
    check_continues_exactly(run, argv, tmp_path, iteration=2)


@pytest.mark.timeout(300)
def test_precomputed_reference_log_probs_change_nothing(task: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()[:12]]
    pairs = [{"prompt": row["prompt"], "chosen": row["label"], "rejected": "1" + row["label"]} for row in rows]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    shared = {"loss_type": "dpo", "prompt_data": data, "num_rollout": 2, "rollout_batch_size": 8, "eval_interval": 2}
    argv = flags(task, **LEFT_OUT, **shared, eval_prompt_data=["held", f"{data}@[:4]"])
    each_step = train(argv, tmp_path / "each").check()
    kept = tmp_path / "kept"
    before = train([*argv, "--precompute-ref-log-probs", "--ref-log-probs-dir", str(kept)], tmp_path / "before").check()
    assert list(kept.glob("part-*.npz"))
    assert each_step.series("perf/ref_log_probs_time")
    assert not before.series("perf/ref_log_probs_time")
    for key in ("train/loss", "train/reward_margin", "train/grad_norm", "eval/held/loss", "eval/held/reward_margin"):
        assert before.series(key) == pytest.approx(each_step.series(key), rel=1e-5, abs=1e-7), key
