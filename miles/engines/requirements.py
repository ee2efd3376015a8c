"""What the configuration must fulfil for the engines to start and serve."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles.config import Config, Problem


#: What the embedded engine computes; `embedded.model_config` says it again, with torch.
EMBEDDED_KINDS = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral")


def check(config: Config) -> list[Problem]:
    """All problems that this room can find before any process starts."""
    # Here, not above: the embedded engine's process imports this package and has no use for the configuration.
    from miles.config import Problem

    problems: list[Problem] = []
    if config.debug.debug_train_only:
        return problems
    flags = config.sglang
    problems += _check_sglang(config) if config.cluster.rollout_engine == "sglang" else _check_embedded(config)
    if flags.sglang_server_concurrency < 1:
        problems.append(
            Problem(
                "--sglang-server-concurrency",
                flags.sglang_server_concurrency,
                "an engine takes at least one sample",
                "give a positive number",
            )
        )
    if not flags.sglang_request_timeout > 0:
        problems.append(
            Problem(
                "--sglang-request-timeout",
                flags.sglang_request_timeout,
                "no request can end in that time",
                "give seconds above 0",
            )
        )
    if config.cluster.update_weight_buffer_size < 1:
        problems.append(
            Problem(
                "--update-weight-buffer-size",
                config.cluster.update_weight_buffer_size,
                "a bucket must hold something",
                "give bytes above 0, such as the default of 512 MiB",
            )
        )
    return problems


def _check_embedded(config: Config) -> Iterator[Problem]:
    from miles.config import Problem

    if config.sglang.rollout_num_gpus_per_engine != 1:
        yield Problem(
            "--rollout-num-gpus-per-engine",
            config.sglang.rollout_num_gpus_per_engine,
            "the embedded engine is one process on one device",
            "leave it at 1; --rollout-num-gpus makes more engines",
        )
    if (kind := config.ckpt.model_name) is not None and kind not in EMBEDDED_KINDS:
        yield Problem(
            "--rollout-engine",
            "embedded",
            f"it computes {', '.join(EMBEDDED_KINDS)} models, and this one is {kind}",
            "add --rollout-engine sglang, or train without engines",
        )
    if config.model.num_experts is not None and config.cluster.deterministic_mode:
        yield Problem(
            "--deterministic-mode",
            True,
            "what the embedded engine computes of a row depends in its last bits on how many rows go to the same expert",
            "leave it out, or train a dense model",
        )
    if config.model.window_size is not None:
        yield Problem(
            "--rollout-engine",
            "embedded",
            "it computes full attention, and the model has a sliding window",
            "add --rollout-engine sglang, or choose a checkpoint without a window",
        )
    if config.model.rotary_percent not in (None, 1.0):
        yield Problem(
            "--rotary-percent",
            config.model.rotary_percent,
            "the embedded engine rotates whole heads",
            "choose a checkpoint without partial_rotary_factor",
        )
    if config.cluster.rollout_engine_python is not None:
        yield Problem(
            "--rollout-engine-python",
            config.cluster.rollout_engine_python,
            "the embedded engine runs under the interpreter of Miles",
            "leave it out, or add --rollout-engine sglang",
        )


def _check_sglang(config: Config) -> Iterator[Problem]:
    """Of the engine arguments: SGLang's own parser is asked."""
    from miles.config import Problem, engine_flag, refused_by_miles, suggestion

    from .launch import flags
    from .sglang import ask

    if config.sglang.rollout_num_gpus_per_engine != 1:
        yield Problem(
            "--rollout-num-gpus-per-engine",
            config.sglang.rollout_num_gpus_per_engine,
            "engines of several GPUs are not built yet",
            "leave it at 1; --rollout-num-gpus makes more engines",
        )
    if config.debug.check_weight_update_equal:
        yield Problem(
            "--check-weight-update-equal",
            True,
            "SGLang has no checksums of single tensors of the checkpoint",
            "leave it out, or use --rollout-engine embedded",
        )
    python = config.cluster.rollout_engine_python
    args = config.sglang.sglang_args
    fix = "install sglang there, or name an interpreter that has it with --rollout-engine-python"
    try:
        verdict = ask(list(flags(args)), python)
    except OSError as error:
        yield Problem("--rollout-engine-python", python, f"it does not tell SGLang's arguments ({error})", fix)
        return
    if verdict is None:
        yield Problem("--rollout-engine", "sglang", f"{python or sys.executable} has no sglang", fix)
        return
    known = ["--sglang-" + option.removeprefix("--") for option in verdict.options if option.startswith("--")]
    for flag in verdict.unknown:
        name = flag.removeprefix("--").replace("-", "_")
        yield Problem(
            engine_flag(name),
            args.get(name),
            f"sglang {verdict.version} has no such argument",
            suggestion(engine_flag(name), known, otherwise="see `python -m sglang.launch_server --help`"),
        )
    for name, value in args.items():
        # Under another name: the names themselves were looked at with all flags.
        other = verdict.options.get("--" + name.replace("_", "-"), name)
        if other != name and (why := refused_by_miles(other)) is not None:
            yield Problem(engine_flag(name), value, f"it is SGLang's {other}: {why}", "leave it out")
    if verdict.error is not None:
        yield Problem(
            "--sglang-*", " ".join(flags(args)), f"sglang {verdict.version} says: {verdict.error}", "mend that value"
        )
