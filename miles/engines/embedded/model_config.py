"""What the forward pass must know of a checkpoint. Consumes config.json (either spelling of transformers 4 and 5)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from miles.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

SUPPORTED_MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    model_type: str
    architectures: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position_embeddings: int
    tied: bool
    """The output head is the embedding; the checkpoint has no `lm_head.weight`."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: torch.dtype
    """The checkpoint's own."""
    rope_theta: float
    rope_type: str
    eos_token_ids: frozenset[int]
    directory: Path
    expert_layers: frozenset[int] = frozenset()
    """Layers whose MLP is a mixture of experts."""
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    """Width of one expert."""
    normalised_scores: bool = False
    """Scores of a token's experts sum to 1."""

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Reads config.json and generation_config.json.

        Raises `CheckpointError` for a missing file and for anything that the forward pass does not compute.
        """
        raw = _read_json(directory / "config.json")
        model_type = str(raw.get("model_type"))
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise CheckpointError(
                f"model_type of {directory}, got {model_type!r}: the embedded engine computes "
                f"{', '.join(SUPPORTED_MODEL_TYPES)}; use --rollout-engine sglang for other models"
            )
        _refuse_sliding_window(raw, directory)
        if (act := raw.get("hidden_act", "silu")) != "silu":
            raise CheckpointError(f"hidden_act of {directory}, got {act!r}: only silu is computed; use another engine")
        try:
            hidden_size, num_heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
            rope = raw.get("rope_parameters") or {
                "rope_theta": raw.get("rope_theta", 10000.0),
                **(raw.get("rope_scaling") or {}),
            }
            if rope.get("partial_rotary_factor", 1.0) != 1.0:
                raise CheckpointError(
                    f"partial_rotary_factor of {directory}, got {rope['partial_rotary_factor']}: "
                    "only whole heads are rotated; use another engine"
                )
            attention_bias = bool(raw.get("attention_bias", False))
            default_head_dim = 128 if model_type == "qwen3" else hidden_size // num_heads
            return cls(
                model_type=model_type,
                architectures=tuple(raw.get("architectures") or ()),
                vocab_size=int(raw["vocab_size"]),
                hidden_size=hidden_size,
                intermediate_size=int(raw["intermediate_size"]),
                num_layers=int(raw["num_hidden_layers"]),
                num_heads=num_heads,
                num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
                head_dim=int(raw.get("head_dim") or default_head_dim),
                norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
                tied=bool(raw.get("tie_word_embeddings", False)),
                qkv_bias=model_type == "qwen2" or attention_bias,
                o_bias=model_type in ("llama", "qwen3", "qwen3_moe") and attention_bias,
                mlp_bias=bool(raw.get("mlp_bias", False)),
                qk_norm=model_type in ("qwen3", "qwen3_moe"),
                dtype=_checkpoint_dtype(raw, directory),
                rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
                rope_type=str(rope.get("rope_type") or rope.get("type") or "default"),
                eos_token_ids=_eos_token_ids(raw, directory),
                directory=directory,
                **_experts(raw),
            )
        except KeyError as error:
            raise CheckpointError(
                f"config.json of {directory}, got no {error.args[0]!r}: the model's shape is unknown; add the field"
            ) from error

    def inverse_frequencies(self, length: int) -> tuple[torch.Tensor, float]:
        """RoPE's inverse frequencies `[head_dim / 2]` (f32) and its attention scaling, for positions below `length`.

        Scaled variants (linear, llama3, yarn, longrope) are transformers' own functions, imported only where needed.
        """
        if self.rope_type == "default":
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
            return 1.0 / (self.rope_theta**exponents), 1.0
        if self.rope_type == "dynamic":
            raise CheckpointError(
                f"rope_type of {self.directory}, got 'dynamic': its frequencies change with the length of each row; "
                "use a static variant such as yarn"
            )
        from transformers import AutoConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if self.rope_type not in ROPE_INIT_FUNCTIONS:
            raise CheckpointError(f"rope_type of {self.directory}, got {self.rope_type!r}: unknown; check config.json")
        config = AutoConfig.from_pretrained(str(self.directory), local_files_only=True)
        frequencies, scaling = ROPE_INIT_FUNCTIONS[self.rope_type](config, torch.device("cpu"), seq_len=length)
        return frequencies.float(), float(scaling)


def _experts(raw: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of experts; nothing where the model has none. Raises KeyError."""
    if raw["model_type"] != "qwen3_moe":
        return {}
    every, dense = int(raw.get("decoder_sparse_step") or 1), set(raw.get("mlp_only_layers") or ())
    layers = range(int(raw["num_hidden_layers"]))
    return {
        "expert_layers": frozenset(i for i in layers if i not in dense and (i + 1) % every == 0),
        "num_experts": int(raw["num_experts"] if "num_experts" in raw else raw["num_local_experts"]),
        "experts_per_token": int(raw["num_experts_per_tok"]),
        "expert_size": int(raw["moe_intermediate_size"]),
        "normalised_scores": bool(raw.get("norm_topk_prob", False)),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"--model-path, got {str(path.parent)!r}: there is no {path.name}; give the directory of an HF checkpoint"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}, got a file that is not JSON ({error}): repair the file") from error


def _refuse_sliding_window(raw: dict[str, Any], directory: Path) -> None:
    mistral_window = raw.get("model_type") == "mistral" and raw.get("sliding_window", 4096) is not None
    if mistral_window or raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or ()):
        raise CheckpointError(
            f"sliding_window of {directory}, got {raw.get('sliding_window')}: only full attention is computed; "
            "use another engine"
        )


def _checkpoint_dtype(raw: dict[str, Any], directory: Path) -> torch.dtype:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"dtype of {directory}, got {name!r}: only {', '.join(DTYPES)} are computed; convert it")
    return DTYPES[name]


def _eos_token_ids(raw: dict[str, Any], directory: Path) -> frozenset[int]:
    """Union of both files, as SGLang has it: chat models often name the end of a turn in the second one only."""
    found: set[int] = set()
    generation = directory / "generation_config.json"
    for source in (raw, _read_json(generation) if generation.exists() else {}):
        value = source.get("eos_token_id")
        found.update([] if value is None else [value] if isinstance(value, int) else value)
    return frozenset(found)
