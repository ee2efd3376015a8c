"""A tiny random HF model of each family, and what docs/models.md says that it is checked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

VOCAB = 131
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": None,
}
#: Of Llama 3.1, but for a first context so short that the tests' positions reach every part of the curve.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def _qwen2(**options: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_SIZES | options))


def _qwen3(**options: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_SIZES | {"head_dim": 32} | options))


def _llama(**options: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_SIZES | options))


def _mistral(**options: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**_SIZES | {"sliding_window": None} | options))


def _qwen3_moe(**options: Any) -> PreTrainedModel:
    sizes = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES | sizes | {"norm_topk_prob": True} | options))


def _glm4(**options: Any) -> PreTrainedModel:
    return Glm4ForCausalLM(Glm4Config(**_SIZES | {"head_dim": 32} | options))


def _gpt_oss(**options: Any) -> PreTrainedModel:
    sizes = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7}
    rope = _YARN | {"truncate": False, "factor": 32.0}
    config = GptOssConfig(**_SIZES | sizes | {"rope_parameters": rope} | options)
    config._attn_implementation = "eager"
    return GptOssForCausalLM(config)


def _deepseek(**options: Any) -> PreTrainedModel:
    heads = {"num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 40, "v_head_dim": 12}
    heads |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "first_k_dense_replace": 1}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 48, "n_shared_experts": 2}
    groups = {"n_group": 4, "topk_group": 2}
    # The norms between latent projections have an epsilon of their own.
    norms = {"rms_norm_eps": 1e-3}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**_SIZES | heads | experts | groups | norms | options))


_DELTA = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
_SHARED = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 32,
}
_DEEPSEEK_YARN = _YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}
#: Case -> its model. The first word is the family.
CASES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2": lambda: _qwen2(),
    "qwen2 tied": lambda: _qwen2(tie_word_embeddings=True),
    "qwen2 window": lambda: _qwen2(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: _qwen3(),
    "qwen3 tied": lambda: _qwen3(tie_word_embeddings=True),
    "qwen3 yarn": lambda: _qwen3(rope_parameters=_YARN),
    "llama": lambda: _llama(),
    "llama 3.1": lambda: _llama(rope_parameters=_LLAMA3),
    "llama 3.2 tied": lambda: _llama(rope_parameters=_LLAMA3, tie_word_embeddings=True, head_dim=32),
    "llama linear": lambda: _llama(rope_parameters=_LINEAR),
    "mistral": lambda: _mistral(head_dim=32),
    "mistral window": lambda: _mistral(sliding_window=7, head_dim=8),
    "qwen3_moe": lambda: _qwen3_moe(),
    "qwen3_moe some layers": lambda: _qwen3_moe(
        num_hidden_layers=3, decoder_sparse_step=2, norm_topk_prob=False, tie_word_embeddings=True
    ),
    "glm4": lambda: _glm4(),
    "glm4 tied, no biases": lambda: _glm4(attention_bias=False, tie_word_embeddings=True),
    "gpt_oss": lambda: _gpt_oss(),
    "deepseek_v3": lambda: _deepseek(rope_parameters=_DEEPSEEK_YARN),
    "deepseek_v3 whole queries": lambda: _deepseek(q_lora_rank=None, rope_interleave=False, n_shared_experts=1),
    "qwen3_next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**_SIZES | _DELTA | _SHARED)),
    "qwen3_5_text": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_SIZES | _DELTA)),
    "qwen3_5_moe_text": lambda: Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**_SIZES | _DELTA | _SHARED)),
    "kimi_k2": lambda: _deepseek(rope_parameters=_DEEPSEEK_YARN | {"mscale": 1.0}, n_group=1, topk_group=1),
}


def make_model(case: str, seed: int = 0) -> PreTrainedModel:
    """fp32, with weights that are nowhere trivial: norms off 1, biases off 0."""
    torch.manual_seed(seed)
    model = CASES[case]().float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                # Where norms count from zero this is off 1 as well.
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(("A_log", "dt_bias")):
                parameter.uniform_(-2, 1)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
            elif name.endswith("sinks"):
                parameter.uniform_(-1, 2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.3, 0.3)
    return model


def save_model(case: str, directory: Path) -> PreTrainedModel:
    model = make_model(case)
    model.save_pretrained(directory)
    if case == "kimi_k2":
        # transformers has no such class: the released files are of DeepSeek-V3's under another name, in the older spelling.
        file = directory / "config.json"
        config = json.loads(file.read_text()) | {"model_type": "kimi_k2"}
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
        file.write_text(json.dumps(config))
    return model
