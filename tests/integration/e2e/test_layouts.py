"""The same run on other layouts: two data-parallel ranks, two engines, one model on two ranks, colocated; each half alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from miles.observe.report import TraceFiles

from .harness import flags, train

HANGING_TRACKER = """
import sys, time
if "miles.observe.trackers" in sys.orig_argv:
    import tensorboard.summary.writer.event_file_writer as writer
    writer.EventFileWriter.close = lambda self: time.sleep(600)
"""


@pytest.mark.timeout(400)
def test_two_ranks_and_two_engines_train_as_one_of_each(task, tmp_path):
    common = {
        "deterministic_mode": True,
        "num_rollout": 2,
        "check_weight_update_equal": True,
        "update_weight_buffer_size": 600_000,
    }
    one = train(flags(task, **common), tmp_path / "one").check()
    two = train(
        flags(task, **common, actor_num_gpus_per_node=2, rollout_num_gpus=2, balance_data=True), tmp_path / "two"
    ).check()
    sharing = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    colocated = train(
        flags(task, **common, **sharing, actor_num_gpus_per_node=2, colocate=True, micro_batch_size=3),
        tmp_path / "colocated",
    ).check()

    assert [s["tokens"] for s in one.samples(0)] == [s["tokens"] for s in two.samples(0)], (
        "which engine must not matter"
    )
    assert min(one.series("perf/update_weights_check_time")) > 0
    bucket_bytes = [
        a / b
        for a, b in zip(*map(one.series, ("perf/update_weights_bytes", "perf/update_weights_buckets")), strict=True)
    ]
    assert max(bucket_bytes) <= 600_000
    for other in (two, colocated):
        # Rollouts after the first come from weights that differ by float rounding, hence only the first is compared.
        for key in ("train/loss", "train/pg_loss", "train/grad_norm", "train/entropy", "rollout/raw_reward"):
            assert other.series(key)[0] == pytest.approx(one.series(key)[0], rel=1e-5, abs=1e-7), key
        assert max(other.series("train/train_rollout_logprob_abs_diff_max")) < 1e-5


def test_half_a_run_alone_and_replayed(task, tmp_path, monkeypatch):
    """With a plugin whose reward scores; every process of ours but the engines imports it."""
    data = str(tmp_path / "kept" / "{rollout_id}.jsonl")
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setenv("PLUGIN_MARKS", str(marks))
    common = {"plugin": Path(__file__).with_name("plugin_marks.py"), "rm_type": "digits", "num_rollout": 2}

    def importers() -> dict[str, int]:
        """How many processes of each kind imported the plugin since the last call."""
        lines = [(path.read_text(), path.unlink())[0] for path in marks.iterdir()]
        kinds = ("train.py", "RolloutManagerActor", "TrainerActor", "rewards.worker")
        return {kind: sum(kind in line for line in lines) for kind in kinds}

    rollout = train(
        flags(
            task,
            **common,
            debug_rollout_only=True,
            save_debug_rollout_data=data,
            rm_num_workers=1,
            no_report=True,
            report_samples=0,
        ),
        tmp_path / "rollout",
    ).check()
    assert "train/loss" not in rollout.metrics[-1]
    assert not (rollout.run_dir / "report.html").exists()
    assert list((rollout.run_dir / "trace").glob("rollout_*")) == []
    for s in rollout.samples(0):
        hits = [a == b for a, b in zip(s["response"].strip(), s["label"], strict=False)]
        assert s["reward"] == pytest.approx(sum(hits) / len(s["label"]))
    assert importers() == {"train.py": 1, "RolloutManagerActor": 1, "TrainerActor": 0, "rewards.worker": 1}
    # A tracker that never ends costs its limit, once.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HANGING_TRACKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    hanging = {"use_tensorboard": True, "tracker_close_timeout": 1}
    replay = train(
        flags(task, **common, load_debug_rollout_data=data, report_samples=1, **hanging), tmp_path / "replay"
    ).check()
    assert "not finished 1 s after the end of the run: given up" in replay.output
    assert (replay.run_dir / "report.html").exists()
    assert len(TraceFiles.of(replay.run_dir).read(1)) == 1
    assert importers() == {"train.py": 1, "RolloutManagerActor": 1, "TrainerActor": 1, "rewards.worker": 0}
    assert len(replay.series("train/loss")) == 2
    assert replay.samples(1) == rollout.samples(1)
    assert replay.series("train/train_rollout_logprob_abs_diff_max")[0] < 1e-5
