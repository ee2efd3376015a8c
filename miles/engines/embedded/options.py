"""The engine's command line, in SGLang's words. Consumes argv, produces frozen `EngineOptions`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from miles.errors import ConfigError

#: Where the engine's token is looked for. Other users cannot read another process's environment.
TOKEN_VARIABLE = "MILES_ENGINE_TOKEN"


@dataclass(frozen=True)
class EngineOptions:
    """An inference server that speaks SGLang's HTTP protocol."""

    model_path: str
    """Directory of a Hugging Face checkpoint: config.json, *.safetensors, tokenizer.json."""
    host: str = "127.0.0.1"
    """Address to bind. Whatever it is, requests need the token."""
    port: int = 30000
    """Port to bind; 0 picks a free one. The ready line on stdout names it."""
    api_key: str | None = None
    """Bearer token that requests must carry. Default: $MILES_ENGINE_TOKEN, else one is made and printed on stderr."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`; `auto` is cuda where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; `auto` is float32 on a CPU and the checkpoint's own on a GPU."""
    random_seed: int | None = None
    """Seeds the rows that bring no sampling_seed of their own, in order of arrival. Default: fresh randomness."""
    context_length: int | None = None
    """Longest prompt plus answer, in tokens. Default: the model's max_position_embeddings."""
    max_running_requests: int | None = None
    """Rows decoded together; further ones queue. Default: 256; 128 with deterministic inference, which pays for all always."""
    max_total_tokens: int | None = None
    """KV-cache size in tokens (rows x longest row). Default: a quarter of the free memory on a CPU, 70 % on a GPU."""
    enable_deterministic_inference: bool = False
    """A row's tokens and log-probs are bitwise independent of its neighbours and of the order of arrival."""
    served_model_name: str | None = None
    """Name in /v1/models. Default: the model path."""
    weight_version: str = "default"
    """Version that the weights on disk are reported as."""
    num_threads: int = 1
    """Threads of torch on a CPU."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Level of the log on stderr."""
    skip_tokenizer_init: bool = False
    """Load no tokenizer: token ids in, token ids out; `text`, `stop` and `stop_regex` are refused."""
    exit_with_parent: bool = False
    """Exit when stdin reaches its end: the launcher holds the pipe, so the engine outlives no parent."""

    def __post_init__(self) -> None:
        for name, least in (("max_running_requests", 1), ("num_threads", 1), ("port", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')}, got {value}: too small; give at least {least}")
        for name in ("context_length", "max_total_tokens"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ConfigError(f"--{name.replace('_', '-')}, got {value}: no room for a prompt; give at least 2")


def parse_options(argv: Sequence[str]) -> EngineOptions:
    """Parses `argv` (without the program's name). Exits 2 with a suggestion on an unknown flag, as tyro does."""
    return tyro.cli(
        Annotated[EngineOptions, tyro.conf.FlagCreatePairsOff],
        prog="python -m miles.engines.embedded",
        args=list(argv),
    )
