from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from miles.config import Resolution, resolve
from miles.config.platform import Platform

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": 24,
    "max_position_embeddings": 64,
}


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., str]:
    """Writes a directory with a config.json of these keys over the tiny Qwen3's; None removes a key."""

    def write(**changes: Any) -> str:
        directory = tmp_path / "model"
        directory.mkdir(exist_ok=True)
        merged = {k: v for k, v in {**QWEN3, **changes}.items() if v is not None}
        (directory / "config.json").write_text(json.dumps(merged))
        return str(directory)

    return write


@pytest.fixture
def launch(tmp_path: Path, write_checkpoint: Callable[..., str]) -> Callable[..., Resolution]:
    """`resolve` with everything that a run needs, and `words` after it."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"input": "1+1="}\n')
    base = [
        *("--hf-checkpoint", write_checkpoint(), "--prompt-data", str(prompts)),
        *("--num-rollout", "60", "--rollout-batch-size", "32", "--n-samples-per-prompt", "8"),
    ]

    def run(*words: str, platform: Platform | None = None) -> Resolution:
        return resolve([*base, *words], platform=platform or Platform())

    return run
