"""A tiny random HF model of each family, and the table of docs/models.md: `python -m tests.unit.trainers.families` writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
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
from transformers.models.qwen3_5 import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)
from transformers.models.qwen3_5_moe import (
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
)

from miles.engines.requirements import EMBEDDED_KINDS

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


def _glm4_moe(**options: Any) -> PreTrainedModel:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "first_k_dense_replace": 1}
    return Glm4MoeForCausalLM(Glm4MoeConfig(**_SIZES | experts | {"head_dim": 32} | options))


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
_VISION: dict[str, Any] = {
    "vision_config": {
        **{"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4},
        **{"spatial_merge_size": 1, "temporal_patch_size": 1, "out_hidden_size": 64, "num_position_embeddings": 16},
    },
    **{"image_token_id": VOCAB, "video_token_id": VOCAB + 1},
    **{"vision_start_token_id": VOCAB + 2, "vision_end_token_id": VOCAB + 3},
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
    "glm4_moe": lambda: _glm4_moe(use_qk_norm=True, attention_bias=True, routed_scaling_factor=1.5),
    "glm4_moe plain": lambda: _glm4_moe(),
    "gpt_oss": lambda: _gpt_oss(),
    "deepseek_v3": lambda: _deepseek(rope_parameters=_DEEPSEEK_YARN),
    "deepseek_v3 whole queries": lambda: _deepseek(q_lora_rank=None, rope_interleave=False, n_shared_experts=1),
    "qwen3_next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**_SIZES | _DELTA | _SHARED)),
    "qwen3_5_text": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_SIZES | _DELTA)),
    "qwen3_5_moe_text": lambda: Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**_SIZES | _DELTA | _SHARED)),
    "qwen3_5": lambda: Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=_SIZES | _DELTA, **_VISION)),
    "qwen3_5_moe": lambda: Qwen3_5MoeForConditionalGeneration(
        Qwen3_5MoeConfig(text_config=_SIZES | _DELTA | _SHARED, **_VISION)
    ),
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


@dataclass(frozen=True)
class Family:
    """A row of the table."""

    name: str
    kinds: tuple[str, ...]
    """`model_type` of config.json."""
    cases: tuple[str, ...]
    parts: str
    """What it has beside the decoder that all share."""


FAMILIES: tuple[Family, ...] = (
    Family("Qwen2, Qwen2.5", ("qwen2",), ("qwen2", "qwen2 tied", "qwen2 window"), "biases of Q, K, V; sliding windows"),
    Family("Qwen3", ("qwen3",), ("qwen3", "qwen3 tied", "qwen3 yarn"), "norms of heads; RoPE scaled by YaRN"),
    Family(
        "Llama 2, 3.1, 3.2",
        ("llama",),
        ("llama", "llama 3.1", "llama 3.2 tied", "llama linear"),
        "RoPE scaled as in Llama 3.1, or linearly",
    ),
    Family("Mistral", ("mistral",), ("mistral", "mistral window"), "sliding windows"),
    Family(
        "Qwen3-MoE",
        ("qwen3_moe",),
        ("qwen3_moe", "qwen3_moe some layers"),
        "experts in all or some layers; scores normalised or not",
    ),
    Family(
        "GLM-4",
        ("glm4",),
        ("glm4", "glm4 tied, no biases"),
        "norms after attention and MLP; half of a head rotates, in neighbouring pairs",
    ),
    Family(
        "GLM-4.5, 4.6, 4.7",
        ("glm4_moe",),
        ("glm4_moe", "glm4_moe plain"),
        "half of a head rotates; experts as in DeepSeek-V3; biases of Q, K, V and norms of heads, where the file says so",
    ),
    Family(
        "GPT-OSS",
        ("gpt_oss",),
        ("gpt_oss",),
        "attention sinks; windows in every other layer; biases everywhere; bounded gates; experts in one tensor; YaRN",
    ),
    Family(
        "DeepSeek-V3, -R1",
        ("deepseek_v3",),
        ("deepseek_v3", "deepseek_v3 whole queries"),
        "latent attention; sigmoid router with bias, in groups; shared experts; first layers dense; YaRN",
    ),
    Family("Kimi K2", ("kimi_k2",), ("kimi_k2",), "DeepSeek-V3's under another name, without groups"),
    Family(
        "Qwen3-Next",
        ("qwen3_next",),
        ("qwen3_next",),
        "gated delta nets; gated attention; norms from zero; experts with a gated shared one",
    ),
    Family(
        "Qwen3.5",
        ("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text"),
        ("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text"),
        "the same, dense or with experts; the text model of files with a vision tower",
    ),
)
#: Cases that go through a trainer's steps, checkpoints and exports.
TRAINED = ("qwen3_moe", "glm4", "gpt_oss", "deepseek_v3", "qwen3_5")
#: Kinds that other tests train on.
_TRAINED_ELSEWHERE = ("qwen2", "qwen3", "llama")


def table() -> str:
    """Markdown."""
    lines = [
        "| family | `model_type` | what it has of its own | logits, gradients | tensors back | trained, continued | embedded engine |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        trained = set(TRAINED + _TRAINED_ELSEWHERE) & {*family.cases, *family.kinds}
        served = "yes" if set(family.kinds) <= set(EMBEDDED_KINDS) else "no"
        cells = (
            family.name,
            ", ".join(f"`{kind}`" for kind in family.kinds),
            family.parts,
            f"1e-5, 1e-4 ({len(family.cases)})",
            "bitwise",
            "yes" if trained else "no",
            served,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_PAGE = Path(__file__).parents[3] / "docs" / "models.md"
_HEAD = "| family |"


def page_with_table() -> str:
    """docs/models.md with the table as it should be."""
    text = _PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(_HEAD)
    after = rest.partition("\n\n")[2]
    return f"{before}{table()}\n{after}"


if __name__ == "__main__":
    _PAGE.write_text(page_with_table(), encoding="utf-8")
