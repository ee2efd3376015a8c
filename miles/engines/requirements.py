"""What the configuration must fulfil for the engines to start and serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles.config import Config, Problem


def check(config: Config) -> list[Problem]:
    """All problems that this room can find before any process starts."""
    # Here, not above: the embedded engine's process imports this package and has no use for the configuration.
    from miles.config import Problem

    problems: list[Problem] = []
    if config.debug.debug_train_only:
        return problems
    flags = config.sglang
    if config.cluster.rollout_engine == "sglang":
        problems.append(
            Problem(
                "--rollout-engine",
                "sglang",
                "SGLang servers are not built yet",
                "use --rollout-engine embedded, which speaks the same protocol",
            )
        )
    if flags.rollout_num_gpus_per_engine != 1:
        problems.append(
            Problem(
                "--rollout-num-gpus-per-engine",
                flags.rollout_num_gpus_per_engine,
                "the embedded engine is one process on one device",
                "leave it at 1; --rollout-num-gpus makes more engines",
            )
        )
    if config.model.rotary_percent not in (None, 1.0):
        problems.append(
            Problem(
                "--rotary-percent",
                config.model.rotary_percent,
                "the embedded engine rotates whole heads",
                "choose a checkpoint without partial_rotary_factor",
            )
        )
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
