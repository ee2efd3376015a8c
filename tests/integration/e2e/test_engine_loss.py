"""Engines that are killed or stopped in the middle of a run: it goes on, and only time differs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .harness import Finished, flags, train

RUN = {
    "num_rollout": 4,
    "rollout_batch_size": 4,
    "deterministic_mode": True,
    "save_interval": 2,
    "update_weight_buffer_size": 40_000,
    "max_engine_restarts": 9,
    "heartbeat_timeout": 3,
    "eval_interval": 2,
    "n_samples_per_eval_prompt": 1,
    "plugin": Path(__file__).with_name("plugin_engine_loss.py"),
}


def run(task: Path, directory: Path, losses: str, **overrides: object) -> Finished:
    few = directory / "few.jsonl"
    directory.mkdir(parents=True)
    few.write_text("".join((task / "test.jsonl").read_text().splitlines(keepends=True)[:8]))
    os.environ.update(ENGINE_LOSS=losses, ENGINE_LOSS_DIR=str(directory))
    saves = {"save": directory / "save", "save_hf": directory / "hf_{rollout_id}"}
    argv = flags(task, **RUN, **saves, eval_prompt_data=["few", str(few)], **overrides)
    return train(argv, directory / "run", timeout_s=280).check()


@pytest.fixture(scope="module")
def untouched(task, tmp_path_factory) -> Finished:
    return run(task, tmp_path_factory.mktemp("untouched") / "x", "")


def same(one: Finished, other: Finished) -> None:
    for i in range(RUN["num_rollout"]):
        assert one.samples(i) == other.samples(i)

    def timeless(metrics):
        return [{k: v for k, v in line.items() if not k.startswith(("perf/", "memory/"))} for line in metrics]

    assert timeless(one.metrics) == timeless(other.metrics)
    weights = [load_file(f.run_dir.parent / "hf_3" / "model.safetensors") for f in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_one_engine_lost_in_every_phase(task, tmp_path, untouched):
    losses = "generation.2:SIGKILL:server,train.0:SIGKILL:server,sync.2:SIGKILL:server,generation.9:SIGSTOP:server"
    done = run(task, tmp_path / "x", losses)
    same(done, untouched)
    assert sum(done.series("perf/engine_restarts")) == len(losses.split(",")), done.output
    assert "got its end (signal SIGKILL)" in done.output
    assert "it is stopped by a signal" in done.output


def test_one_of_two_engines_lost_and_an_actor(task, tmp_path, untouched):
    losses = "generation.1:SIGKILL:server,sync.2:SIGSTOP:server,generation.13:SIGKILL:actor"
    done = run(task, tmp_path / "x", losses, rollout_num_gpus=2)
    same(done, untouched)
    assert sum(done.series("perf/engine_restarts")) == 3, done.output
