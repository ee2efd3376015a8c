"""A whole run with a real SGLang server, and what is refused before one starts."""

from __future__ import annotations

import dataclasses
import os

import pytest

from miles import engines
from miles.config import Config

from .harness import flags, train

SGLANG_VENV = os.environ.get("SGLANG_CPU_VENV")
pytestmark = [
    pytest.mark.skipif(SGLANG_VENV is None, reason="SGLANG_CPU_VENV names no environment with sglang"),
    pytest.mark.timeout(900),  # importing SGLang takes ten seconds on a quiet machine, and a minute on a busy one
]
PYTHON = f"{SGLANG_VENV}/bin/python"


def problems(**sglang_args: object) -> list[str]:
    config = Config()
    config = dataclasses.replace(
        config,
        cluster=dataclasses.replace(config.cluster, rollout_engine="sglang", rollout_engine_python=PYTHON),
        sglang=dataclasses.replace(config.sglang, sglang_args=sglang_args),
    )
    return [str(problem) for problem in engines.check(config)]


def test_the_installed_version_judges_the_engines_flags():
    assert problems(mem_fraction_static=0.5, disable_radix_cache=True) == []
    [typo] = problems(mem_fraction_statik=0.5)
    assert typo.startswith("--sglang-mem-fraction-statik, got 0.5: sglang 0.5.")
    assert "--sglang-mem-fraction-static" in typo
    [alias] = problems(tensor_parallel_size=2)
    assert alias.startswith("--sglang-tensor-parallel-size, got 2: it is SGLang's tp_size: Miles sets it itself")
    [value] = problems(max_running_requests="many")
    assert "max-running-requests" in value
    assert "invalid int value: 'many'" in value


def test_a_run_learns_with_sglang_and_its_log_probs_are_the_trainers(task, tmp_path):
    argv = flags(
        task,
        rollout_engine="sglang",
        rollout_engine_python=PYTHON,
        num_rollout=4,
        rollout_batch_size=32,
        n_samples_per_prompt=8,
        start_timeout=400,
    )
    run = train(argv, tmp_path / "run", timeout_s=550).check()
    rewards = run.series("rollout/raw_reward")
    assert len(rewards) == 4
    assert rewards[-1] > rewards[0] + 0.1
    assert max(run.series("train/train_rollout_logprob_abs_diff_max")) < 1e-4
