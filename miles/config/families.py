"""One function for each family of models: its config.json -> the MODEL flags.

What the model code could not compute exactly (other activations, biases elsewhere, unknown scalings of RoPE) is refused here
by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .layer_pattern import repeated
from .problem import shown

HfConfig = Mapping[str, Any]
Family = Callable[[HfConfig], dict[str, Any]]

#: model_type -> MODEL values.
FAMILIES: dict[str, Family] = {}


class Unsupported(Exception):
    """`<key> <value>: <why>`"""


def _family(*names: str) -> Callable[[Family], Family]:
    def register(function: Family) -> Family:
        FAMILIES.update(dict.fromkeys(names, function))
        return function

    return register


@_family("llama")
def _llama(hf: HfConfig) -> dict[str, Any]:
    _refuse(hf, "attention_bias", False, "biases of attention are not built for this family")
    _refuse(hf, "mlp_bias", False, "biases of the MLP are not built")
    return _decoder(hf)


@_family("mistral")
def _mistral(hf: HfConfig) -> dict[str, Any]:
    # Where the file says nothing, the model's code has a window of 4096.
    width = hf.get("sliding_window", 4096)
    kind = "full_attention" if width is None else "sliding_attention"
    return _decoder(hf) | _window(width, [kind] * hf["num_hidden_layers"])


@_family("qwen2")
def _qwen2(hf: HfConfig) -> dict[str, Any]:
    return _decoder(hf) | _qwen_window(hf) | {"add_qkv_bias": True}


@_family("qwen3")
def _qwen3(hf: HfConfig) -> dict[str, Any]:
    _refuse(hf, "attention_bias", False, "biases of attention are not built for this family")
    # Qwen3's class default; released files always write it.
    head_dim = hf.get("head_dim", 128) or hf["hidden_size"] // hf["num_attention_heads"]
    return _decoder(hf) | _qwen_window(hf) | {"qk_layernorm": True, "kv_channels": head_dim}


@_family("qwen3_moe")
def _qwen3_moe(hf: HfConfig) -> dict[str, Any]:
    return _qwen3({"head_dim": None, **hf}) | _softmax_experts(hf)


def _softmax_experts(hf: HfConfig) -> dict[str, Any]:
    """Experts chosen by softmax, in the layers that the Qwen files say."""
    sparse, dense = hf.get("decoder_sparse_step") or 1, set(hf.get("mlp_only_layers") or ())
    layers = [int(i not in dense and (i + 1) % sparse == 0) for i in range(hf["num_hidden_layers"])]
    return {
        "num_experts": hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"],
        "moe_layer_freq": repeated(layers),
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
    }


@_family("glm4")
def _glm4(hf: HfConfig) -> dict[str, Any]:
    return _decoder(hf, rotary_percent=0.5) | {
        "add_qkv_bias": bool(hf.get("attention_bias", True)),
        "kv_channels": hf.get("head_dim") or 128,
        "rotary_interleaved": True,
        "post_self_attn_layernorm": True,
        "post_mlp_layernorm": True,
    }


@_family("glm4_moe")
def _glm4_moe(hf: HfConfig) -> dict[str, Any]:
    return (
        _decoder(hf, rotary_percent=0.5)
        | _grouped_experts(hf)
        | {
            "add_qkv_bias": bool(hf.get("attention_bias", False)),
            "qk_layernorm": bool(hf.get("use_qk_norm", False)),
        }
    )


@_family("gpt_oss")
def _gpt_oss(hf: HfConfig) -> dict[str, Any]:
    _refuse(hf, "attention_bias", True, "its attention has biases")
    _refuse(hf, "swiglu_limit", 7.0, "its MLP is bounded by 7")
    kinds = ("sliding_attention", "full_attention")
    layers = hf.get("layer_types") or [kinds[i % 2] for i in range(hf["num_hidden_layers"])]
    return (
        _decoder(hf)
        | _window(hf.get("sliding_window", 128), layers)
        | {
            "kv_channels": hf.get("head_dim") or 64,
            "disable_bias_linear": False,
            "swiglu": False,
            "quick_geglu": True,
            "activation_func_clamp_value": 7.0,
            "glu_linear_offset": 1.0,
            "softmax_type": "learnable",
            "num_experts": hf["num_local_experts"],
            "moe_layer_freq": repeated([1] * hf["num_hidden_layers"]),
            "moe_ffn_hidden_size": hf["intermediate_size"],
            "moe_router_topk": hf["num_experts_per_tok"],
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": False,
        }
    )


@_family("deepseek_v3", "kimi_k2")
def _deepseek_v3(hf: HfConfig) -> dict[str, Any]:
    _refuse(hf, "attention_bias", False, "biases of latent attention are not built")
    # The embedded head dimension of the file is that of the part that rotates.
    values = _decoder({**hf, "head_dim": hf["qk_nope_head_dim"]})
    return (
        values
        | _grouped_experts(hf)
        | {
            "rotary_interleaved": hf.get("rope_interleave", True),
            "multi_latent_attention": True,
            "q_lora_rank": hf.get("q_lora_rank"),
            "kv_lora_rank": hf["kv_lora_rank"],
            "qk_head_dim": hf["qk_nope_head_dim"],
            "qk_pos_emb_head_dim": hf["qk_rope_head_dim"],
            "v_head_dim": hf["v_head_dim"],
        }
    )


@_family("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
def _qwen3_5(hf: HfConfig) -> dict[str, Any]:
    _refuse(hf, "attention_bias", False, "biases of attention are not built for this family")
    layers, every = hf["num_hidden_layers"], hf.get("full_attention_interval") or 4
    kinds = hf.get("layer_types") or [
        "linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)
    ]
    other = set(kinds) - {"full_attention", "linear_attention"}
    if other or len(kinds) != layers:
        raise Unsupported(f"layer_types {', '.join(kinds)}: {layers} layers of full and linear attention are built")
    values = {
        **_decoder({"intermediate_size": hf.get("moe_intermediate_size"), **hf}, rotary_percent=0.25),
        "kv_channels": hf.get("head_dim") or 256,
        "qk_layernorm": True,
        "apply_layernorm_1p": True,
        "attention_output_gate": True,
        "linear_attention_freq": repeated([int(kind == "linear_attention") for kind in kinds]),
        "linear_conv_kernel_dim": hf.get("linear_conv_kernel_dim", 4),
        "linear_key_head_dim": hf.get("linear_key_head_dim", 128),
        "linear_value_head_dim": hf.get("linear_value_head_dim", 128),
        "linear_num_key_heads": hf.get("linear_num_key_heads", 16),
        "linear_num_value_heads": hf.get("linear_num_value_heads", 32),
        "spec": ("miles_plugins.models.qwen3_5", "get_qwen3_5_spec"),
    }
    if hf["model_type"] == "qwen3_5_text":
        return values
    _refuse(hf, "norm_topk_prob", True, "only normalised scores are built for this family")
    return (
        values
        | _softmax_experts(hf)
        | {
            "moe_router_pre_softmax": False,
            "moe_shared_expert_intermediate_size": hf["shared_expert_intermediate_size"],
            "moe_shared_expert_gate": True,
        }
    )


@_family("qwen3_5", "qwen3_5_moe")
def _qwen3_5_with_vision(hf: HfConfig) -> dict[str, Any]:
    """The text model of a file that also has a vision tower."""
    text = hf["text_config"]
    if not isinstance(text, Mapping):
        raise Unsupported(f"text_config {_plain(text)}: it describes the text model")
    tied = hf.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    shared = {"quantization_config": hf.get("quantization_config"), "tie_word_embeddings": tied}
    return _qwen3_5(
        {**{name: v for name, v in text.items() if v is not None}, **shared, "model_type": f"{hf['model_type']}_text"}
    )


def _grouped_experts(hf: HfConfig) -> dict[str, Any]:
    """Experts of DeepSeek-V3 and GLM-4.5: chosen by sigmoid and bias within some groups, beside shared ones, after a few dense layers."""
    for key, allowed in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("norm_topk_prob", True)):
        _refuse(hf, key, allowed, f"only {allowed} is built")
    _refuse(hf, "moe_layer_freq", 1, "only experts in each layer after the first are built")
    layers, dense, topk = hf["num_hidden_layers"], hf["first_k_dense_replace"] or 0, hf["num_experts_per_tok"]
    groups, of_groups = hf["n_group"] or 1, hf["topk_group"] or 1
    if of_groups < groups and topk // of_groups != 2:
        raise Unsupported(
            f"num_experts_per_tok {topk} and topk_group {of_groups}: groups are chosen by their best two experts, and "
            "megatron looks at num_experts_per_tok / topk_group of them"
        )
    if topk == 1:
        raise Unsupported("num_experts_per_tok 1: the score of a single expert is not normalised")
    limited = {"moe_router_num_groups": groups, "moe_router_group_topk": of_groups} if of_groups < groups else {}
    return limited | {
        "num_experts": hf["n_routed_experts"],
        "moe_layer_freq": repeated([int(i >= dense) for i in range(layers)]),
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": hf["moe_intermediate_size"] * (hf.get("n_shared_experts") or 1),
        "moe_router_topk": topk,
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": float(hf["routed_scaling_factor"]),
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
    }


def _decoder(hf: HfConfig, *, rotary_percent: float = 1.0) -> dict[str, Any]:
    """What the families share: pre-norm, RoPE, grouped-query attention, gated SiLU, no biases."""
    if (quantised := hf.get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise Unsupported(
            f"quantization_config {_plain(method)}: weights are read as they are; convert them to bf16 first"
        )
    _refuse(hf, "hidden_act", "silu", "only the gated SiLU MLP is built")
    heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
    kv_heads = hf.get("num_key_value_heads") or heads
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hidden,
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": kv_heads < heads,
        "num_query_groups": kv_heads,
        "kv_channels": hf.get("head_dim") or hidden // heads,
        "qk_layernorm": False,
        "swiglu": True,
        "normalization": "RMSNorm",
        "norm_epsilon": float(hf.get("rms_norm_eps", 1e-6)),
        "use_rotary_position_embeddings": True,
        **_rope(hf, rotary_percent),
        "disable_bias_linear": True,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": not hf.get("tie_word_embeddings", False),
        "vocab_size": hf["vocab_size"],
        "max_position_embeddings": hf["max_position_embeddings"],
    }


#: Scalings of RoPE -> the numbers that each is made of; those with a default may be left out.
_SCALINGS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "linear": {"factor": None},
    "llama3": {
        "factor": None,
        "low_freq_factor": None,
        "high_freq_factor": None,
        "original_max_position_embeddings": None,
    },
    "yarn": {
        "factor": None,
        "original_max_position_embeddings": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.0,
        "mscale_all_dim": 0.0,
        "attention_factor": 0.0,
        "truncate": True,
    },
}


def _rope(hf: HfConfig, percent: float) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`, older ones `rope_theta` and `rope_scaling`. percent: where neither says."""
    parameters: HfConfig = hf.get("rope_parameters") or {}
    scaling: HfConfig = hf.get("rope_scaling") or {}
    theta: Any = parameters.get("rope_theta", hf.get("rope_theta", 10000.0))
    theta = float(theta)
    if theta != int(theta):
        raise Unsupported(f"rope_theta {theta}: --rotary-base is a whole number")
    share: Any = parameters.get("partial_rotary_factor", hf.get("partial_rotary_factor", percent))
    values: dict[str, Any] = {"rotary_base": int(theta), "rotary_percent": float(share)}
    for key, given in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        kind = given.get("rope_type", given.get("type", "default"))
        if kind == "default":
            continue
        wanted = _SCALINGS.get(str(kind))
        if wanted is None:
            known = ", ".join(name for name in _SCALINGS if name != "default")
            raise Unsupported(f"{key} of type {_plain(kind)}: of scaled rotary embeddings {known} are built")
        found: dict[str, Any] = {"rope_type": kind}
        for name, default in wanted.items():
            value = given.get(name)
            if value is None:
                value = _default_of_scaling(hf, name) if default is None else default
            if not _fits_scaling(value, like=default):
                raise Unsupported(f"{name} {_plain(value)} of {key}: scaling {kind} needs another value there")
            found[name] = value
        values["rope_scaling"] = found
    return values


def _fits_scaling(value: Any, *, like: Any) -> bool:
    if isinstance(like, bool):
        return isinstance(value, bool)
    return type(value) in (int, float) and math.isfinite(value) and (value > 0 or (value == 0 and like is not None))


def _default_of_scaling(hf: HfConfig, name: str) -> Any:
    """What a file that leaves a number of its scaling out means by that. Raises KeyError."""
    if name == "original_max_position_embeddings":
        return hf.get(name) or hf["max_position_embeddings"]
    raise KeyError(name)


def _qwen_window(hf: HfConfig) -> dict[str, Any]:
    kinds = hf.get("layer_types")
    if kinds is None:
        first = hf.get("max_window_layers", 28) if hf.get("use_sliding_window") else hf["num_hidden_layers"]
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(hf["num_hidden_layers"])]
    return _window(hf.get("sliding_window") if hf.get("use_sliding_window") else None, kinds)


def _window(width: int | None, kinds: list[str]) -> dict[str, Any]:
    """Attention to the last `width` tokens, a token itself among them, in the layers that `kinds` calls sliding."""
    other = set(kinds) - {"full_attention", "sliding_attention"}
    if other:
        raise Unsupported(f"layer_types {', '.join(sorted(other))}: only full and sliding attention are built here")
    sliding = [int(kind == "sliding_attention") for kind in kinds]
    if not any(sliding):
        return {}
    if width is None:
        raise Unsupported("layer_types sliding_attention: sliding_window does not say how wide the window is")
    values: dict[str, Any] = {"window_size": (width - 1, 0)}
    return values if all(sliding) else values | {"window_attn_skip_freq": repeated(sliding)}


def _refuse(hf: HfConfig, key: str, allowed: Any, why: str) -> None:
    value = hf.get(key, allowed)
    if value != allowed:
        raise Unsupported(f"{key} {_plain(value)}: {why}")


def _plain(value: Any) -> str:
    return value[:100] if isinstance(value, str) else shown(value)
