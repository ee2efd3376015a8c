"""`--sglang-*` flags: which ones an engine honours, which have nothing to act on, which cannot be accepted.

With --rollout-engine sglang its own parser judges names and values. The embedded engine knows the names below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from .groups import Config
from .problem import Problem, suggestion

#: `honoured`: passed on. `hardware`: performance of a GPU server; the embedded engine has nothing that it could act on.
#: Any other text is why the flag is an error: it would change samples, or Miles itself sets it.
Effect: TypeAlias = str

_OURS = "Miles sets it itself"

#: What the embedded engine honours: name -> type, or the choices.
HONOURED: Mapping[str, type | tuple[str, ...]] = {
    "context_length": int,
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "enable_deterministic_inference": bool,
    "log_level": ("debug", "info", "warning", "error"),
    "max_running_requests": int,
    "max_total_tokens": int,
    "num_threads": int,
    "random_seed": int,
    "served_model_name": str,
}

#: Every engine argument that is known, and what becomes of it.
EMBEDDED_ENGINE_ARGS: Mapping[str, Effect] = {
    **dict.fromkeys(HONOURED, "honoured"),
    **dict.fromkeys(
        [
            "attention_backend",
            "chunked_prefill_size",
            "cuda_graph_bs",
            "cuda_graph_max_bs",
            "decode_attention_backend",
            "decode_log_interval",
            "disable_cuda_graph",
            "disable_cuda_graph_padding",
            "disable_custom_all_reduce",
            "disable_overlap_schedule",
            "disable_radix_cache",
            "enable_flashinfer_allreduce_fusion",
            "enable_memory_saver",
            "enable_metrics",
            "enable_mixed_chunk",
            "enable_nccl_nvls",
            "enable_p2p_check",
            "enable_symm_mem",
            "enable_torch_compile",
            "fp8_gemm_backend",
            "grammar_backend",
            "max_prefill_tokens",
            "max_queued_requests",
            "mem_fraction_static",
            "nccl_port",
            "num_continuous_decode_steps",
            "page_size",
            "prefill_attention_backend",
            "sampling_backend",
            "schedule_conservativeness",
            "schedule_policy",
            "sleep_on_idle",
            "stream_interval",
            "torch_compile_max_bs",
            "watchdog_timeout",
        ],
        "hardware",
    ),
    "api_key": _OURS + ", a new one for each run",
    "admin_api_key": _OURS + ", a new one for each run",
    "base_gpu_id": _OURS + " from the placement",
    "device": _OURS + " from the placement",
    "host": _OURS + ": engines listen on loopback",
    "model_path": _OURS + " from --hf-checkpoint",
    "nnodes": _OURS + " from --rollout-num-gpus-per-engine",
    "port": _OURS + ", a free one for each engine",
    "skip_tokenizer_init": _OURS,
    "tokenizer_path": _OURS + " from --hf-checkpoint",
    "tp_size": _OURS + " from --rollout-num-gpus-per-engine",
    "trust_remote_code": "code of a checkpoint is never run",
    "weight_version": _OURS + " with every weight update",
    "chat_template": "prompts are rendered before they reach the engine",
    "dp_size": "the embedded engine is one process; --rollout-num-gpus makes more engines",
    "ep_size": "the embedded engine has no mixture-of-experts models yet",
    "enable_dp_attention": "the embedded engine is one process",
    "enable_lora": "adapters are not built yet",
    "enable_return_routed_experts": "the embedded engine has no mixture-of-experts models yet",
    "json_model_override_args": "it would change the model under the trainer",
    "kv_cache_dtype": "it would change samples, and the embedded engine keeps its cache in the model's dtype",
    "load_format": "it would load other weights, and the embedded engine reads safetensors",
    "pp_size": "the embedded engine is one process",
    "preferred_sampling_params": "it would change samples; the ROLLOUT flags set sampling",
    "quantization": "it would change samples, and the embedded engine does not quantise",
    "rl_on_policy_target": "it would change log-probs, and the embedded engine has one path only",
    "speculative_algorithm": "the embedded engine does not speculate",
    "speculative_draft_model_path": "the embedded engine does not speculate",
    "speculative_eagle_topk": "the embedded engine does not speculate",
    "speculative_num_draft_tokens": "the embedded engine does not speculate",
    "speculative_num_steps": "the embedded engine does not speculate",
    "torchao_config": "it would change samples, and the embedded engine does not quantise",
}

#: SGLang's attention backends under which --enable-deterministic-inference works.
DETERMINISTIC_BACKENDS = ("fa3", "flashinfer", "triton")


def engine_flag(name: str) -> str:
    """`mem_fraction_static` -> `--sglang-mem-fraction-static`."""
    return "--sglang-" + name.replace("_", "-")


def check_engine_args(config: Config) -> Iterator[Problem]:
    """What is wrong with the `--sglang-*` flags for the engine that was chosen."""
    args = config.sglang.sglang_args
    if config.cluster.rollout_engine == "sglang":
        yield from _check_against_sglang(args)
        return
    known = [name for name, effect in EMBEDDED_ENGINE_ARGS.items() if effect in ("honoured", "hardware")]
    for name, value in args.items():
        effect = EMBEDDED_ENGINE_ARGS.get(name)
        if effect is None:
            fix = suggestion(name, known, otherwise=f"it honours {', '.join(HONOURED)}")
            yield Problem(engine_flag(name), value, "the embedded engine has no such argument", fix.replace("_", "-"))
        elif effect not in ("honoured", "hardware"):
            yield Problem(engine_flag(name), value, effect, "leave it out")
        elif effect == "honoured":
            yield from _check_value(name, value, HONOURED[name])


def _check_value(name: str, value: Any, wanted: type | tuple[str, ...]) -> Iterator[Problem]:
    if isinstance(wanted, tuple):
        if value not in wanted:
            yield Problem(engine_flag(name), value, "it is none of the choices", f"choose one of {', '.join(wanted)}")
    elif type(value) is not wanted and wanted is not str:
        text = "is a switch and takes no value" if wanted is bool else "takes a whole number"
        yield Problem(
            engine_flag(name), value, f"it {text}", f"write {engine_flag(name)}{'' if wanted is bool else ' N'}"
        )


def engine_server_args(config: Config) -> dict[str, Any]:
    """The `--sglang-*` arguments that the chosen engine is started with: for the embedded one those that it honours."""
    args = config.sglang.sglang_args
    if config.cluster.rollout_engine == "sglang":
        return dict(args)
    return {name: value for name, value in args.items() if name in HONOURED}


def engine_args_not_in_effect(config: Config) -> Iterator[tuple[str, Any]]:
    """(flag, value) of engine flags that the embedded engine has nothing to act on with."""
    if config.cluster.rollout_engine != "sglang":
        for name, value in config.sglang.sglang_args.items():
            if EMBEDDED_ENGINE_ARGS.get(name) == "hardware":
                yield engine_flag(name), value


def _check_against_sglang(args: Mapping[str, Any]) -> Iterator[Problem]:
    """What Miles sets itself. Whether SGLang knows the others, its own parser is asked by the engines room."""
    for name, value in args.items():
        if (why := refused_by_miles(name)) is not None:
            yield Problem(engine_flag(name), value, why, "leave it out")


def refused_by_miles(name: str) -> str | None:
    """Why an argument of a SGLang server is not the user's to give; None where it is."""
    if (effect := EMBEDDED_ENGINE_ARGS.get(name, "")).startswith(_OURS):
        return effect
    return _NOT_WITH_SGLANG.get(name)


#: Of the arguments that SGLang knows and the embedded engine may not.
_NOT_WITH_SGLANG: Mapping[str, str] = {
    "config": "a file could set what Miles sets itself",
    "dp_size": "weights reach one replica; --rollout-num-gpus makes more engines",
    "load_format": "it would load other weights than those of --hf-checkpoint",
    "pp_size": "engines of several GPUs are not built yet",
    "trust_remote_code": EMBEDDED_ENGINE_ARGS["trust_remote_code"],
}
