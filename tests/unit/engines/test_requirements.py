"""`miles.engines.check`: what cannot work is found before any process starts; the package itself imports nothing heavy."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from miles import engines
from miles.config import Config


def with_flags(group: str, **flags) -> Config:
    config = Config()
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **flags)})


def test_the_defaults_are_fine():
    assert engines.check(Config()) == []


@pytest.mark.parametrize(
    ("group", "flags", "text"),
    [
        (
            "cluster",
            {"rollout_engine": "sglang"},
            f"--rollout-engine, got sglang: {sys.executable} has no sglang; install",
        ),
        ("cluster", {"rollout_engine_python": "python3"}, "--rollout-engine-python, got python3: the embedded engine"),
        ("sglang", {"rollout_num_gpus_per_engine": 2}, "--rollout-num-gpus-per-engine, got 2: "),
        ("model", {"rotary_percent": 0.5}, "--rotary-percent, got 0.5: "),
        ("model", {"window_size": (4095, 0)}, "--rollout-engine, got embedded: it computes full attention"),
        (
            "ckpt",
            {"model_name": "gpt_oss"},
            "--rollout-engine, got embedded: it computes qwen2, qwen3, qwen3_moe, llama, mistral",
        ),
        ("sglang", {"sglang_server_concurrency": 0}, "--sglang-server-concurrency, got 0: "),
        ("sglang", {"sglang_request_timeout": 0.0}, "--sglang-request-timeout, got 0.0: "),
        ("cluster", {"update_weight_buffer_size": 0}, "--update-weight-buffer-size, got 0: "),
    ],
)
def test_problems(group, flags, text):
    [problem] = engines.check(with_flags(group, **flags))
    assert str(problem).startswith(text)


def test_a_run_without_engines_has_none_of_these_problems():
    config = with_flags("cluster", rollout_engine="sglang")
    config = dataclasses.replace(config, debug=dataclasses.replace(config.debug, debug_train_only=True))
    assert engines.check(config) == []


def test_experts_are_not_bitwise_repeatable():
    config = with_flags("model", num_experts=8)
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, deterministic_mode=True))
    [problem] = engines.check(config)
    assert str(problem).startswith("--deterministic-mode, got True: what the embedded engine computes of a row depends")


def test_families_of_the_embedded_engine_are_those_that_its_model_reads():
    from miles.engines.embedded.model_config import SUPPORTED_MODEL_TYPES
    from miles.engines.requirements import EMBEDDED_KINDS

    assert EMBEDDED_KINDS == SUPPORTED_MODEL_TYPES


def test_importing_the_package_is_light():
    code = (
        "import sys, miles.engines; print([m for m in ('torch', 'aiohttp', 'rich', 'tyro', 'ray') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
