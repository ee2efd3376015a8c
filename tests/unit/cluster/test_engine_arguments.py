"""What an engine server is started with: the run's own flags and --sglang-*."""

from __future__ import annotations

from pathlib import Path

from miles.cluster.engine_group import _server_args
from miles.config import make_config


def test_the_runs_flags_reach_the_engine(tmp_path: Path) -> None:
    config = make_config(
        rollout_max_context_len=32, rollout_seed=7, deterministic_mode=True, sglang_args={"max_running_requests": 3}
    )
    assert _server_args(config) == {
        "context_length": 32,
        "random_seed": 7,
        "enable_deterministic_inference": True,
        "max_running_requests": 3,
    }


def test_the_context_holds_the_longest_evaluation(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("datasets: [{name: a, path: p, max_context_len: 48}, {name: b, path: p}]")
    flags = {"eval_config": str(tmp_path / "e.yaml"), "eval_interval": 1, "rollout_max_context_len": 32}
    assert _server_args(make_config(**flags))["context_length"] == 48
    assert _server_args(make_config(**flags, sglang_args={"context_length": 64}))["context_length"] == 64
