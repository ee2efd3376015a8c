"""config.json -> MODEL flags, against the shapes that the families' own model code has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from miles.config import Resolution, make_config
from miles.config.hf import FAMILIES, PLANNED_FAMILIES, model_values
from miles.errors import ConfigError

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            BASE | {"model_type": "qwen2", "tie_word_embeddings": True},
            {
                "add_qkv_bias": True,
                "qk_layernorm": False,
                "kv_channels": 8,
                "untie_embeddings_and_output_weights": False,
            },
        ),
        (
            BASE | {"model_type": "qwen3", "head_dim": 16},
            {
                "add_qkv_bias": False,
                "qk_layernorm": True,
                "kv_channels": 16,
                "untie_embeddings_and_output_weights": True,
            },
        ),
        (BASE | {"model_type": "llama"}, {"add_qkv_bias": False, "qk_layernorm": False, "rotary_base": 500000}),
        (BASE | {"model_type": "mistral", "sliding_window": None}, {"kv_channels": 8, "norm_epsilon": 1e-5}),
        (
            {k: v for k, v in BASE.items() if k != "num_key_value_heads"} | {"model_type": "llama"},
            {"num_query_groups": 8, "group_query_attention": False},
        ),
    ],
    ids=lambda value: value.get("model_type", "") if isinstance(value, dict) else "",
)
def test_families(config: dict[str, Any], expected: dict[str, Any]) -> None:
    values = model_values(config, where="d")
    assert expected.items() <= values.items()
    assert (values["num_layers"], values["hidden_size"], values["ffn_hidden_size"]) == (3, 64, 96)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "default"}},
    ],
)
def test_rope_is_read_in_the_old_and_the_new_form(rope: dict[str, Any]) -> None:
    config = {k: v for k, v in BASE.items() if k != "rope_theta"} | {"model_type": "qwen3"} | rope
    values = model_values(config, where="d")
    assert (values["rotary_base"], values["rotary_percent"]) == (1000000, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "yarn"}}, "d/config.json, got no 'factor': a llama model needs it"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "factor 4 of rope_scaling: scaling yarn needs another"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor 0 of rope_scaling"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "rope_scaling of type dynamic: of scaled rotary embeddings",
        ),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "rope_parameters of type longrope"),
        ({"hidden_act": "gelu"}, "d/config.json, got hidden_act gelu: only the gated SiLU MLP is built"),
        ({"attention_bias": True}, "attention_bias True: biases of attention are not built"),
        ({"mlp_bias": True}, "mlp_bias True: biases of the MLP are not built"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            "layer_types sliding_attention: sliding_window does not say how wide the window is",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"]},
            "layer_types chunked_attention",
        ),
        (
            {"model_type": "qwen3_moe"},
            "model_type of d, got qwen3_moe: this family is not built yet; train one of llama",
        ),
        (
            {"model_type": "qwen4"},
            "model_type of d, got 'qwen4': there is no such family here (known: llama, mistral, qwen2",
        ),
        ({"vocab_size": None}, "d/config.json, got no 'vocab_size': a llama model needs it"),
        ({"rope_theta": 1.5}, "rope_theta 1.5: --rotary-base is a whole number"),
    ],
)
def test_what_the_model_code_could_not_compute_is_refused(changes: dict[str, Any], message: str) -> None:
    config = {k: v for k, v in (BASE | {"model_type": "llama"} | changes).items() if v is not None}
    with pytest.raises(ConfigError) as caught:
        model_values(config, where="d")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "window", "layers"),
    [
        ({"model_type": "mistral"}, (4095, 0), None),
        ({"model_type": "mistral", "sliding_window": 8}, (7, 0), None),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            (7, 0),
            "[0]*1+[1]*2",
        ),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8}, None, None),
    ],
)
def test_windows(changes: dict[str, Any], window: tuple[int, int] | None, layers: str | None) -> None:
    values = model_values(BASE | changes, where="d")
    assert (values.get("window_size"), values.get("window_attn_skip_freq")) == (window, layers)


def test_scalings_are_whole() -> None:
    """What a file leaves out of its scaling is filled in with what the model's own code means by that."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "attention_factor": None}
    values = model_values(BASE | {"model_type": "llama", "rope_scaling": scaling}, where="d")
    assert values["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.0,
        "mscale_all_dim": 0.0,
        "attention_factor": 0.0,
        "truncate": True,
    }


def test_planned_families_are_not_built_ones() -> None:
    assert not PLANNED_FAMILIES & set(FAMILIES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hidden-size", "64"], "--hidden-size, got 64: {d}/config.json says 128"),
        (["--no-swiglu"], "--swiglu, got false: {d}/config.json says true"),
        (["--norm-epsilon", "1e-5"], "--norm-epsilon, got 1e-05: {d}/config.json says 1e-06"),
        (
            ["--max-position-embeddings", "65"],
            "--max-position-embeddings, got 65: {d}/config.json says that the model knows 64",
        ),
        (["--normalization", "LayerNorm"], "--normalization, got LayerNorm: {d}/config.json says RMSNorm"),
        (["--window-size", "7", "0"], "--window-size, got 7 0: {d}/config.json describes a qwen3 model without it"),
        (
            ["--rope-scaling", '{"rope_type": "linear"}'],
            '--rope-scaling, got {{"rope_type": "linear"}}: {d}/config.json desc',
        ),
        (["--window-size", "7", "1"], "--window-size, got 7 1: it takes the tokens seen before a token"),
        (["--window-attn-skip-freq", "[1]*3"], "--window-attn-skip-freq, got [1]*3: it lists 3 layers; list all 2"),
        (["--window-attn-skip-freq", "0"], "--window-attn-skip-freq, got 0: every N-th layer is meant"),
        (["--window-attn-skip-freq", "f()"], "--window-attn-skip-freq, got f(): it is neither a number nor a list"),
    ],
)
def test_a_contradiction_names_both_values(
    launch: Callable[..., Resolution], tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        launch(*words)
    assert message.format(d=tmp_path / "model") in str(caught.value)


def test_flags_that_agree_or_are_free_are_taken(launch: Callable[..., Resolution]) -> None:
    model = "--num-layers 2 --hidden-size 128 --swiglu --norm-epsilon 0.000001 --rotary-base 1000000 --qk-layernorm"
    free = "--seq-length 60 --max-position-embeddings 60 --make-vocab-size-divisible-by 8"
    config = launch(*model.split(), *free.split()).config
    assert (config.model.seq_length, config.model.max_position_embeddings) == (60, 60)
    assert config.rollout.rollout_max_context_len == 60
    assert config.model.make_vocab_size_divisible_by == 8


def test_a_checkpoint_that_is_not_local(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no config.json in it; give a local Hugging Face directory"):
        make_config(hf_checkpoint=str(tmp_path / "Qwen"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        make_config(hf_checkpoint=str(tmp_path))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
def test_what_transformers_writes_is_what_is_read(kind: str, tmp_path: Path) -> None:
    """Files of the installed transformers, defaults left out as it leaves them out."""
    from transformers import AutoConfig

    extra = {"sliding_window": None} if kind == "mistral" else {}
    hf = AutoConfig.for_model(kind, num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=90, **extra)
    hf.save_pretrained(tmp_path)
    model = make_config(hf_checkpoint=str(tmp_path)).model
    assert (model.num_layers, model.hidden_size, model.vocab_size) == (2, 64, 90)
    assert model.num_query_groups == hf.num_key_value_heads
    assert model.kv_channels == (getattr(hf, "head_dim", None) or 16)
    assert model.norm_epsilon == hf.rms_norm_eps
    assert model.untie_embeddings_and_output_weights is not hf.tie_word_embeddings
    assert model.rotary_base == hf.rope_parameters["rope_theta"]
