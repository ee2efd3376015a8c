"""config.json -> MODEL flags, against the shapes that the families' own model code has."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from miles.config import Resolution, make_config
from miles.config.derive import FREE_MODEL_FLAGS
from miles.config.fields import fields
from miles.config.hf import FAMILIES, PLANNED_FAMILIES, model_values
from miles.config.layer_pattern import repeated
from miles.errors import ConfigError

from .refusal import refused

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
            {"model_type": "mixtral"},
            "model_type of d, got mixtral: this family is not built yet; train one of ",
        ),
        (
            {"quantization_config": {"quant_method": "mxfp4"}},
            "d/config.json, got quantization_config mxfp4: weights are read as they are; convert them to bf16 first",
        ),
        ({"model_type": "qwen3_moe"}, "d/config.json, got no 'num_local_experts': a qwen3_moe model needs it"),
        ({"model_type": "qwen3_moe", "num_experts": 2.0}, "got num_experts 2.0: it must be a whole number above 0"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": ["1"]}, "mlp_only_layers ['1']: it must be a list of numbers"),
        (
            {"model_type": "qwen4"},
            "model_type of d, got 'qwen4': there is no such family here (known: ",
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


_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"moe_layer_freq": "[1]*3", "moe_router_pre_softmax": True, "num_experts": 8, "moe_ffn_hidden_size": 32}),
        ({"norm_topk_prob": True}, {"moe_router_pre_softmax": False, "moe_router_topk": 2}),
        ({"decoder_sparse_step": 2}, {"moe_layer_freq": "[0]*1+[1]*1+[0]*1"}),
        ({"mlp_only_layers": [0]}, {"moe_layer_freq": "[0]*1+[1]*2"}),
    ],
)
def test_experts(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    values = model_values(BASE | {"model_type": "qwen3_moe"} | _MOE | changes, where="d")
    assert expected.items() <= values.items()


_COMPLETE = {
    "qwen3_moe": BASE | {"model_type": "qwen3_moe", "sliding_window": 8, "use_sliding_window": True} | _MOE,
    "glm4": BASE | {"model_type": "glm4"},
    "gpt_oss": BASE | {"model_type": "gpt_oss", "num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": BASE
    | {"model_type": "deepseek_v3", "q_lora_rank": 12, "kv_lora_rank": 8, "v_head_dim": 8, "qk_nope_head_dim": 16}
    | {"qk_rope_head_dim": 4, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 4}
    | {
        "moe_intermediate_size": 32,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
    }
    | {"rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}},
}


_COMPLETE["qwen3_next"] = (
    BASE | {"model_type": "qwen3_next", "num_hidden_layers": 8, "shared_expert_intermediate_size": 24} | _MOE
)


def test_linear_attention() -> None:
    values = model_values(_COMPLETE["qwen3_next"], where="d")
    assert values["linear_attention_freq"] == "[1]*3+[0]*1+[1]*3+[0]*1"
    assert (values["kv_channels"], values["rotary_percent"]) == (256, 0.25)
    assert values["moe_shared_expert_gate"]
    assert values["spec"] == ("miles_plugins.models.qwen3_5", "get_qwen3_5_spec")
    text = BASE | {"model_type": "qwen3_5_text", "layer_types": ["linear_attention"] * 3}
    whole = model_values({"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": True}, where="d")
    assert whole == model_values(text | {"tie_word_embeddings": True}, where="d")
    for broken, message in ((None, "text_config None"), (text | {"hidden_size": "64"}, "hidden_size '64'")):
        with pytest.raises(ConfigError, match=message):
            model_values({"model_type": "qwen3_5", "text_config": broken}, where="d")
    dense = model_values(BASE | {"model_type": "qwen3_5_text", "layer_types": ["linear_attention"] * 3}, where="d")
    assert dense["linear_attention_freq"] == "[1]*3"
    assert "num_experts" not in dense
    with pytest.raises(
        ConfigError, match="layer_types linear_attention, sliding_attention: 3 layers of full and linear"
    ):
        model_values(
            BASE | {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "sliding_attention"]}, where="d"
        )


@pytest.mark.parametrize("kind", ["deepseek_v3", "kimi_k2"])
def test_latent_attention(kind: str) -> None:
    config = _COMPLETE["deepseek_v3"] | {"model_type": kind}
    values = model_values(config, where="d")
    assert (values["kv_channels"], values["qk_pos_emb_head_dim"], values["num_query_groups"]) == (16, 4, 2)
    assert values["moe_layer_freq"] == "[0]*1+[1]*2"
    assert values["moe_shared_expert_intermediate_size"] == 64
    assert (values["moe_router_num_groups"], values["moe_router_group_topk"]) == (4, 2)
    assert "moe_router_num_groups" not in model_values(config | {"n_group": 1, "topk_group": 1}, where="d")
    assert values["moe_router_dtype"] == "fp32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func softmax: only sigmoid is built"),
        ({"topk_method": "greedy"}, "topk_method greedy: only noaux_tc is built"),
        ({"norm_topk_prob": False}, "norm_topk_prob False"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ({"topk_group": 1}, "num_experts_per_tok 4 and topk_group 1: groups are chosen by their best two experts"),
        ({"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}, "num_experts_per_tok 1"),
        ({"attention_bias": True}, "attention_bias True: biases of latent attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config fp8"),
    ],
)
def test_routing_that_megatron_does_otherwise_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_values(_COMPLETE["deepseek_v3"] | changes, where="d")
    assert message in str(caught.value)


def test_families_with_parts_of_their_own() -> None:
    glm, oss = (model_values(_COMPLETE[kind], where="d") for kind in ("glm4", "gpt_oss"))
    assert (glm["rotary_percent"], glm["rotary_interleaved"], glm["add_qkv_bias"]) == (0.5, True, True)
    assert glm["post_self_attn_layernorm"]
    assert glm["post_mlp_layernorm"]
    assert (oss["window_size"], oss["window_attn_skip_freq"]) == ((127, 0), "[1]*1+[0]*1+[1]*1")
    assert (oss["softmax_type"], oss["disable_bias_linear"], oss["quick_geglu"]) == ("learnable", False, True)


@pytest.mark.parametrize("kind", list(_COMPLETE))
def test_every_flag_of_a_shape_is_compared_with_the_checkpoint(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_COMPLETE[kind]))
    shape = model_values(_COMPLETE[kind], where="d")
    for name, field in fields().items():
        if field.group != "model" or name in FREE_MODEL_FLAGS:
            continue
        other: Any
        if field.kind == "switch":
            other = not shape.get(name, False)
        elif field.kind == "list":
            other = (5, 0)
        elif field.kind == "json":
            other = {"rope_type": "linear", "factor": 3.0}
        elif field.choices:
            other = next(choice for choice in field.choices if choice != shape.get(name))
        else:
            pattern = repeated([1, 0, *[0] * (shape["num_layers"] - 2)])
            other = {int: 77, float: 0.77, str: pattern}[field.type]
        with pytest.raises(ConfigError, match=rf"{field.flag}, got .*config\.json (says|describes)"):
            make_config(hf_checkpoint=str(tmp_path), **{name: other})


def test_a_pattern_may_be_written_in_several_ways(tmp_path: Path) -> None:
    config = BASE | {"model_type": "qwen3_moe"} | _MOE | {"mlp_only_layers": [0]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert make_config(hf_checkpoint=str(tmp_path), moe_layer_freq="[0,1,1]").model.moe_layer_freq == "[0,1,1]"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"moe_aux_loss_coeff": 0.1}, "--moe-aux-loss-coeff, got 0.1: no loss is balanced by it"),
        (
            {"moe_aux_loss_coeff": 0.1, "moe_router_load_balancing_type": "seq_aux_loss"},
            "--moe-aux-loss-coeff, got 0.1: sequences are packed",
        ),
        ({"moe_aux_loss_coeff": -1.0, "moe_router_load_balancing_type": "aux_loss"}, "--moe-aux-loss-coeff, got -1"),
        (
            {"moe_router_bias_update_rate": 0.1},
            "--moe-router-bias-update-rate, got 0.1: the model's router has no bias",
        ),
    ],
)
def test_flags_of_experts(flags: dict[str, Any], line: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_COMPLETE["qwen3_moe"]))
    refused({"hf_checkpoint": str(tmp_path), **flags}, line)


@pytest.mark.parametrize(
    ("kind", "flags", "line"),
    [
        ("qwen3_next", {"context_parallel_size": 2}, "--context-parallel-size, got 2: the state of linear attention"),
        (
            "qwen3_next",
            {"linear_num_key_heads": 16, "tensor_model_parallel_size": 32},
            "--tensor-model-parallel-size, got 32: the model has 16 key heads of linear attention, and 16 / 32",
        ),
        ("gpt_oss", {"expert_tensor_parallel_size": 2}, "--expert-tensor-parallel-size, got 2: each rank of an expert"),
    ],
)
def test_what_ranks_cannot_share(kind: str, flags: dict[str, Any], line: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_COMPLETE[kind]))
    with pytest.raises(ConfigError) as caught:
        make_config(hf_checkpoint=str(tmp_path), actor_num_gpus_per_node=32, **flags)
    assert any(text.startswith(line) for text in str(caught.value).splitlines())


@pytest.mark.parametrize("kind", list(_COMPLETE))
def test_any_value_of_any_key_is_read_or_refused(kind: str) -> None:
    config, more = (
        _COMPLETE[kind],
        ("layer_types", "rope_scaling", "quantization_config", "norm_topk_prob", "swiglu_limit"),
    )
    values = [
        None,
        "x",
        -1,
        0,
        1.5,
        10**400,
        float("nan"),
        True,
        [],
        ["x"],
        [1],
        {},
        {"rope_type": "yarn", "factor": "x"},
    ]
    for key in {*config, *more} - {"model_type"}:
        for value in values:
            with contextlib.suppress(ConfigError):
                model_values(config | {key: value}, where="d")


def test_a_dense_model_has_no_flags_of_experts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"model_type": "qwen3"}))
    line = "--moe-router-dtype, got fp64: the model has no experts"
    refused({"hf_checkpoint": str(tmp_path), "moe_router_dtype": "fp64"}, line)


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
