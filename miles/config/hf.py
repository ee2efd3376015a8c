"""config.json of a Hugging Face checkpoint -> the MODEL flags, without importing transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miles.errors import ConfigError

from .families import FAMILIES, HfConfig, Unsupported
from .problem import shown, suggestion

#: Mixture-of-experts and other families that are known and not built yet.
PLANNED_FAMILIES = frozenset(
    [
        "mixtral",
        "qwen2_moe",
        "deepseek_v2",
        "llama4",
        "olmoe",
        "phimoe",
        "minimax",
        "minimax_m2",
        "ernie4_5_moe",
        "dots1",
        "hunyuan_v1_moe",
        "granitemoe",
        "jamba",
    ]
)


def read_hf_config(directory: str) -> dict[str, Any]:
    """The checkpoint's config.json. Raises `ConfigError` when it is not there or not JSON."""
    path = Path(directory) / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"--hf-checkpoint, got {directory}: there is no config.json in it; give a local Hugging Face directory "
            f"(`hf download ORG/MODEL --local-dir DIR`)"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"--hf-checkpoint, got {directory}: {path} cannot be read ({error}); download it again"
        ) from None
    if not isinstance(document, dict):
        raise ConfigError(f"--hf-checkpoint, got {directory}: {path} holds no object; download it again")
    return document


def model_values(hf: HfConfig, *, where: str) -> dict[str, Any]:
    """The MODEL flags that `hf` determines, by field name. `where` names the checkpoint in errors.

    Raises `ConfigError` for an unknown family, a missing key, or a feature that the model code does not have.
    """
    kind = hf.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        if str(kind) in PLANNED_FAMILIES:
            raise ConfigError(f"model_type of {where}, got {kind}: this family is not built yet; train one of {known}")
        fix = suggestion(str(kind), FAMILIES, otherwise=f"the known ones are {known}")
        raise ConfigError(
            f"model_type of {where}, got {shown(kind)}: there is no such family here (known: {known}); {fix}"
        )
    for described in (hf, hf.get("text_config")):
        if isinstance(described, Mapping):
            _check_kinds(described, where)
    # null says as much as nothing, but where it says that there is no such part.
    said = {name: value for name, value in hf.items() if value is not None or name in _SAYS_NONE}
    try:
        return family(said)
    except KeyError as error:
        raise ConfigError(
            f"{where}/config.json, got no {error}: a {kind} model needs it; download the checkpoint again"
        ) from None
    except Unsupported as error:
        raise ConfigError(f"{where}/config.json, got {error}; choose a checkpoint without it") from None


_SIZES = (
    "num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings",
)  # fmt: skip
#: Those that a family may not have, or may have as null.
_MORE_SIZES = (
    "num_key_value_heads", "head_dim", "sliding_window", "max_window_layers", "original_max_position_embeddings",
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step",
    "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads",
    "linear_num_value_heads", "full_attention_interval", "shared_expert_intermediate_size",
    "n_routed_experts", "n_shared_experts", "n_group", "topk_group", "moe_layer_freq", "num_nextn_predict_layers",
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "first_k_dense_replace",
)  # fmt: skip
_SAYS_NONE = ("sliding_window", "head_dim", "q_lora_rank", "text_config")
_MAY_BE_0 = ("n_shared_experts", "num_nextn_predict_layers", "first_k_dense_replace", "sliding_window")
_NUMBERS = ("routed_scaling_factor", "rms_norm_eps", "rope_theta", "partial_rotary_factor")


def _check_kinds(hf: HfConfig, where: str) -> None:
    """Raises `ConfigError` for the first key that does not hold what its name says. None counts as not there."""
    rope = [hf.get("rope_parameters"), hf.get("rope_scaling")]
    numbers = [(name, values.get(name)) for values in (hf, *rope) if isinstance(values, Mapping) for name in _NUMBERS]
    wanted: list[tuple[str, Any, bool, str]] = [
        *(
            (name, v, type(v) is int and (0 < v < 2**31 or (v == 0 and name in _MAY_BE_0)), "a whole number above 0")
            for name in (*_SIZES, *_MORE_SIZES)
            if (v := hf.get(name)) is not None or (name in hf and name in _SIZES)
        ),
        *(
            (name, v, type(v) in (int, float) and 0 < v < 1e30, "a number above 0")
            for name, v in numbers
            if v is not None
        ),
        *(
            (name, v, isinstance(v, Mapping), "an object")
            for name in ("rope_parameters", "rope_scaling")
            if (v := hf.get(name)) is not None
        ),
        *(
            (name, v, isinstance(v, list) and all(isinstance(item, str) for item in v), "a list of names")
            for name in ("layer_types",)
            if (v := hf.get(name)) is not None
        ),
        *(
            (name, v, isinstance(v, list) and all(type(item) is int for item in v), "a list of numbers of layers")
            for name in ("mlp_only_layers",)
            if (v := hf.get(name)) is not None
        ),
    ]
    for name, value, fits, kind in wanted:
        if not fits:
            raise ConfigError(f"{where}/config.json, got {name} {shown(value)}: it must be {kind}; download it again")
