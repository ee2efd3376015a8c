"""`--sglang-*` flags: honoured, without effect here, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from miles.config import Resolution, engine_server_args
from miles.config.engine_args import DETERMINISTIC_BACKENDS, EMBEDDED_ENGINE_ARGS, HONOURED
from miles.errors import ConfigError

Launch = Callable[..., Resolution]


def test_honoured_arguments_reach_the_engine_and_hardware_ones_are_listed(launch: Launch) -> None:
    r = launch(*["--sglang-context-length", "48", "--sglang-mem-fraction-static", "0.7", "--sglang-disable-cuda-graph"])
    assert r.config.sglang.sglang_args == {"context_length": 48, "mem_fraction_static": 0.7, "disable_cuda_graph": True}
    assert engine_server_args(r.config) == {"context_length": 48}
    assert r.config.rollout.rollout_max_context_len == 48, "the engine's limit is the context"
    assert [str(item) for item in r.not_in_effect] == [
        "--sglang-mem-fraction-static 0.7 (the embedded engine has nothing like it)",
        "--sglang-disable-cuda-graph true (the embedded engine has nothing like it)",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "--sglang-tp-size 2",
            "--sglang-tp-size, got 2: Miles sets it itself from --rollout-num-gpus-per-engine; leave",
        ),
        ("--sglang-quantization fp8", "--sglang-quantization, got fp8: it would change samples"),
        (
            "--sglang-speculative-algorithm EAGLE",
            "--sglang-speculative-algorithm, got EAGLE: the embedded engine does not",
        ),
        (
            "--sglang-mem-fraction-statik 0.7",
            "--sglang-mem-fraction-statik, got 0.7: the embedded engine has no such argument; did you mean mem-fraction-static?",
        ),
        ("--sglang-dtype fp8", "--sglang-dtype, got fp8: it is none of the choices; choose one of auto, float32"),
        ("--sglang-context-length long", "--sglang-context-length, got long: it takes a whole number"),
        (
            "--sglang-enable-deterministic-inference 1",
            "--sglang-enable-deterministic-inference, got 1: it is a switch and takes no value",
        ),
    ],
)
def test_refused(launch: Launch, words: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        launch(*words.split())
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_tables_agree() -> None:
    assert {name for name, effect in EMBEDDED_ENGINE_ARGS.items() if effect == "honoured"} == set(HONOURED)
    assert all(re.fullmatch("[a-z0-9_]+", name) for name in EMBEDDED_ENGINE_ARGS)
    assert "torch_native" not in DETERMINISTIC_BACKENDS, "it ignores sampling seeds"


def test_the_sglang_engine_takes_arguments_as_they_are(launch: Launch) -> None:
    config = launch("--rollout-engine", "sglang", "--sglang-mem-fraction-static", "0.7").config
    assert engine_server_args(config) == {"mem_fraction_static": 0.7}
