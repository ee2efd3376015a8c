"""scripts/models/*.sh against the released configurations, by two ways: our own derivation, and the published sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from miles.config import resolve
from miles.config.platform import Platform
from miles.errors import ConfigError

from .paths import MODEL_FILES, REPO, bash, model_args

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent / "released_configs").glob("*.json"))}

#: Parameters of the published models, embeddings counted once where they are tied.
PUBLISHED_PARAMETERS = {
    "qwen3-0.6B": 596_049_920,
    "qwen3-1.7B": 1_720_574_976,
    "qwen3-4B": 4_022_468_096,
    "qwen3-4B-2507": 4_022_468_096,
    "qwen3-8B": 8_190_735_360,
    "qwen3-14B": 14_768_307_200,
    "qwen3-32B": 32_762_123_264,
}


def place(directory: Path, name: str) -> list[str]:
    """A checkpoint directory with the released config.json, and the flags of a run on it."""
    (directory / "config.json").write_text(CONFIGS[name].read_text())
    prompts = directory / "prompts.jsonl"
    prompts.write_text('{"input": "1+1="}\n')
    return [
        *("--hf-checkpoint", str(directory), "--prompt-data", str(prompts), "--num-rollout", "1"),
        *("--rollout-batch-size", "1", "--n-samples-per-prompt", "2"),
    ]


def test_each_model_has_a_released_config() -> None:
    assert {file.stem for file in MODEL_FILES} == {*CONFIGS, "qwen3-tiny"}


@pytest.mark.parametrize("name", CONFIGS)
def test_flags_say_what_the_checkpoint_says(name: str, tmp_path: Path) -> None:
    words = place(tmp_path, name)
    derived = resolve(words, platform=Platform()).config.model
    given = resolve([*model_args(REPO / f"scripts/models/{name}.sh"), *words], platform=Platform()).config.model
    assert given == derived


@pytest.mark.parametrize(("name", "wrong"), [("qwen3-4B", "qwen3-8B"), ("qwen3-4B-2507", "qwen3-4B")])
def test_flags_of_another_model_are_refused(name: str, wrong: str, tmp_path: Path) -> None:
    words = [*model_args(REPO / f"scripts/models/{wrong}.sh"), *place(tmp_path, name)]
    with pytest.raises(ConfigError):
        resolve(words, platform=Platform())


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_shape_has_the_published_number_of_parameters(name: str, tmp_path: Path) -> None:
    words = [*place(tmp_path, name), *model_args(REPO / f"scripts/models/{name}.sh")]
    m = resolve(words, platform=Platform()).config.model
    attention = m.hidden_size * m.kv_channels * (2 * m.num_attention_heads + 2 * m.num_query_groups) + 2 * m.kv_channels
    layer = attention + 3 * m.hidden_size * m.ffn_hidden_size + 2 * m.hidden_size
    embeddings = m.vocab_size * m.hidden_size * (2 if m.untie_embeddings_and_output_weights else 1)
    assert m.num_layers * layer + embeddings + m.hidden_size == PUBLISHED_PARAMETERS[name]


def picked(directory: Path) -> str:
    source = 'source scripts/lib/venv.sh; source scripts/lib/qwen3.sh; PYTHON=$1; qwen3_model "$2"'
    run = bash("-euo", "pipefail", "-c", source, "test", sys.executable, str(directory))
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shape_picks_the_file(name: str, tmp_path: Path) -> None:
    place(tmp_path, name)
    assert picked(tmp_path) == name


def test_transformers_5_spelling_picks_the_same_file(tmp_path: Path) -> None:
    config = json.loads(CONFIGS["qwen3-4B-2507"].read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": float(config.pop("rope_theta"))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert picked(tmp_path) == "qwen3-4B-2507"


def test_an_unknown_shape_picks_no_file(tmp_path: Path) -> None:
    config = json.loads(CONFIGS["qwen3-4B"].read_text()) | {"num_hidden_layers": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert picked(tmp_path) == ""
