"""Starts the engine: `python -m miles.engines.embedded --model-path DIR --port 0`.

    options -> weights on the device -> decode thread -> HTTP -> "miles-engine ready url=http://127.0.0.1:PORT" on stdout

Exit status: 0 on SIGTERM or SIGINT, 1 when the decode thread cannot go on, 2 for options or a checkpoint that cannot work.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import torch
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from miles.errors import ConfigError, UserError

from .cache import EXTENT_STEP, KVCache
from .model import DecoderModel
from .model_config import DTYPE_NAMES, DTYPES, ModelConfig
from .options import TOKEN_VARIABLE, EngineOptions, parse_options
from .requests import Limits
from .scheduler import Scheduler, SchedulerLimits, default_max_total_tokens, fixed_rows
from .server import EngineInfo, EngineServer
from .text import Tokenizer
from .weights import Parameters, WeightState

logger = logging.getLogger("miles.engines.embedded")

#: How long a shutdown waits for the step in progress.
SHUTDOWN_LIMIT_S = 5.0


class Engine:
    """A loaded model with its scheduler and HTTP server, in this process."""

    def __init__(self, options: EngineOptions, token: str) -> None:
        """Loads everything; starts nothing. Raises `UserError` for what cannot work."""
        began = time.perf_counter()
        device = _device(options.device)
        if device.type == "cpu":
            torch.set_num_threads(options.num_threads)
        directory = Path(options.model_path)
        config = ModelConfig.from_directory(directory)
        dtype = _dtype(options.dtype, device, config)
        tokenizer = None if options.skip_tokenizer_init else Tokenizer(directory)
        parameters = Parameters(config, device, dtype)
        parameters.load_directory(directory)

        limits = _limits(options, config, device, dtype)
        model = DecoderModel(config, parameters, limits.context_length)
        eos = config.eos_token_ids
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            eos |= {tokenizer.eos_token_id}
        self._stopped: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._exit_status = 0
        self.scheduler = Scheduler(
            model,
            WeightState(parameters, options.weight_version),
            limits,
            tokenizer=tokenizer,
            eos_token_ids=eos,
            on_fatal=self._on_fatal,
        )
        self.info = EngineInfo(
            options=options,
            config=config,
            limits=Limits(
                vocab_size=config.vocab_size,
                context_length=limits.context_length,
                max_total_tokens=limits.max_total_tokens,
                encode=None if tokenizer is None else tokenizer.encode,
            ),
            device=str(device),
            dtype=DTYPE_NAMES[dtype],
            num_parameter_bytes=parameters.num_bytes,
        )
        self._server = EngineServer(self.scheduler, tokenizer, self.info, token)
        self._options = options
        logger.info(
            "%s: %.1f MB of weights on %s as %s in %.2f s; %d rows, %d KV tokens, context %d",
            options.model_path,
            parameters.num_bytes / 1e6,
            device,
            DTYPE_NAMES[dtype],
            time.perf_counter() - began,
            limits.max_running_requests,
            limits.max_total_tokens,
            limits.context_length,
        )

    async def serve(self) -> int:
        """Serves until SIGTERM, SIGINT or a failure; returns the exit status."""
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stopped.set)
        # A handler whose client has gone is cancelled, so that its rows are aborted.
        runner = web.AppRunner(self._server.application(), handler_cancellation=True, access_log=None)
        await runner.setup()
        listener = _listen(self._options.host, self._options.port)
        self.scheduler.start()
        await web.SockSite(runner, listener, shutdown_timeout=SHUTDOWN_LIMIT_S).start()
        host, port = listener.getsockname()[:2]
        print(f"miles-engine ready url=http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        await self._stopped.wait()
        # The decode thread answers what it holds; only then may the connections close.
        await asyncio.to_thread(self.scheduler.stop, SHUTDOWN_LIMIT_S)
        await runner.cleanup()
        return self._exit_status

    def _on_fatal(self, error: BaseException) -> None:
        self._exit_status = 1
        if self._loop is not None and self._stopped is not None:
            self._loop.call_soon_threadsafe(self._stopped.set)


def _without_clients_traceback(record: logging.LogRecord) -> bool:
    """What a client did wrong (broken HTTP, a connection dropped) is one line in the log: the stack is aiohttp's, not ours."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, (HttpProcessingError, web.RequestPayloadError, ConnectionError)):
        reason = " ".join(str(error).split())[:200]
        record.msg, record.args = f"dropped a connection: {type(error).__name__}: {reason}", ()
        record.exc_info = None
    return True


def main() -> int:
    """Entry point; returns the exit status."""
    try:
        options = parse_options(sys.argv[1:])
    except UserError as error:
        return _refuse(error)
    logging.basicConfig(
        level=options.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("aiohttp.server").addFilter(_without_clients_traceback)
    if options.exit_with_parent:
        threading.Thread(target=_exit_at_end_of_stdin, name="parent-watch", daemon=True).start()
    try:
        return asyncio.run(Engine(options, _token(options)).serve())
    except (UserError, OSError) as error:
        return _refuse(error)


def _refuse(error: Exception) -> int:
    print(f"miles-engine: {error}", file=sys.stderr, flush=True)
    return 2


def _token(options: EngineOptions) -> str:
    token = options.api_key or os.environ.get(TOKEN_VARIABLE)
    if not token:
        token = secrets.token_urlsafe(32)
        print(f"miles-engine token={token}", file=sys.stderr, flush=True)
    return token


def _exit_at_end_of_stdin() -> None:
    while os.read(0, 4096):
        pass
    # The parent is gone, even by SIGKILL: nothing is left to answer to, and a step in progress must not hold us.
    os._exit(0)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device, got {name!r}: unknown; give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device, got {name!r}: only cpu and cuda are served; give one of them")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device, got {name!r}: torch sees no GPU; give cpu, or install a CUDA build of torch")
    return device


def _dtype(name: str, device: torch.device, config: ModelConfig) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    return config.dtype if device.type == "cuda" else torch.float32


def _limits(options: EngineOptions, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> SchedulerLimits:
    """Sizes that fit each other: context length, KV tokens and rows."""
    context_length = options.context_length or config.max_position_embeddings
    if context_length > config.max_position_embeddings:
        raise ConfigError(
            f"--context-length, got {context_length}: the model has {config.max_position_embeddings} positions; lower it"
        )
    rows = options.max_running_requests or (128 if options.enable_deterministic_inference else 256)
    max_total_tokens = options.max_total_tokens or default_max_total_tokens(
        KVCache.bytes_per_token(config, dtype), device
    )
    max_total_tokens = max_total_tokens // EXTENT_STEP * EXTENT_STEP
    if max_total_tokens < EXTENT_STEP:
        raise ConfigError(f"--max-total-tokens, got {options.max_total_tokens}: give at least {EXTENT_STEP}")
    if options.enable_deterministic_inference:
        # Every row owns its place for good, so a row's share of the cache bounds its length.
        share = max_total_tokens // fixed_rows(rows) // EXTENT_STEP * EXTENT_STEP
        if share < min(context_length, EXTENT_STEP) or (options.context_length and share < options.context_length):
            raise ConfigError(
                f"--max-running-requests, got {rows}: with deterministic inference each row owns "
                f"{share} of {max_total_tokens} KV tokens, and {context_length} are needed; lower --max-running-requests "
                "or --context-length, or raise --max-total-tokens"
            )
        if share < context_length:
            logger.warning(
                "context length is %d instead of %d: each row's share of the KV cache", share, context_length
            )
            context_length = share
    return SchedulerLimits(
        max_running_requests=rows,
        max_total_tokens=max_total_tokens,
        context_length=context_length,
        deterministic=options.enable_deterministic_inference,
        random_seed=options.random_seed,
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ConfigError(f"--port, got {host}:{port}: cannot be bound ({error.strerror}); use --port 0") from error
    listener.listen(1024)
    return listener


if __name__ == "__main__":
    sys.exit(main())
