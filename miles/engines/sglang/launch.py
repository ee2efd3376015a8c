"""A SGLang server as a process of its own; see `serve.py` for what it runs, and `..launch` for its life.

launch_sglang(...) -> EngineProcess(url): once GET /health says that the model is loaded and warmed up
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from miles.engines.launch import EngineProcess, flags, start_server
from miles.errors import EngineError

logger = logging.getLogger(__name__)

_PORT = re.compile(rb"^miles-engine port=(\d+)\s*$", re.MULTILINE)
_ANSWER_LIMIT_S = 3.0

#: SGLang picks ports for its own processes and binds them later: somebody may have taken one meanwhile.
_TRIES = 3
_PORT_TAKEN = re.compile(rb"EADDRINUSE|address already in use", re.IGNORECASE)

#: What SGLang needs to run without a GPU. The cache holds tokens enough for a small model's rollout and little memory.
CPU_ARGUMENTS: Mapping[str, object] = {
    "attention_backend": "torch_native",
    "disable_overlap_schedule": True,
    "dtype": "float32",
    "max_total_tokens": 65536,
    "sampling_backend": "pytorch",
    "sleep_on_idle": True,
}
_CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": ""}

_ENVIRONMENT = {
    # Else GET /health is a generation, which takes a second, and does not end while generation is paused.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


async def launch_sglang(
    *,
    name: str,
    model_path: str,
    token: str,
    log_path: Path,
    python: str | None = None,
    env: Mapping[str, str] | None = None,
    server_args: Mapping[str, object] | None = None,
    start_timeout_s: float = 600.0,
    device: str = "cuda",
    tp_size: int = 1,
) -> EngineProcess:
    """Starts one server on a free loopback port and returns once it serves. Start several with `asyncio.gather`.

    `python` is an interpreter that has sglang; ours by default. `server_args` are SGLang's by name and win over the defaults
    for a CPU. Raises `EngineError` with the last lines of its log when it ends or is not up in time.
    """
    arguments: dict[str, object] = {"model_path": model_path, "port": 0, "device": device, "tp_size": tp_size}
    environment = dict(_ENVIRONMENT)
    if device == "cpu":
        arguments |= CPU_ARGUMENTS
        environment |= _CPU_ENVIRONMENT
    arguments |= server_args or {}
    script = Path(__file__).with_name("serve.py")
    command = [python or sys.executable, str(script), *flags(arguments)]
    until = time.monotonic() + start_timeout_s
    for attempt in range(1, _TRIES + 1):
        begin = log_path.stat().st_size if log_path.exists() else 0
        try:
            return await start_server(
                name,
                command,
                token=token,
                log_path=log_path,
                env={**environment, **(env or {})},
                ready=_ready,
                start_timeout_s=until - time.monotonic(),
            )
        except EngineError:
            if attempt == _TRIES or time.monotonic() >= until or not _port_was_taken(log_path, begin):
                raise
            logger.warning("engine %s found one of its ports taken; started again", name)
    raise AssertionError("unreachable")


def _port_was_taken(log_path: Path, begin: int) -> bool:
    """What the server said since `begin` is why it ended."""
    with open(log_path, "rb") as log:
        log.seek(begin)
        return _PORT_TAKEN.search(log.read()) is not None


def _ready(output: bytes) -> str | None:
    found = _PORT.findall(output)
    if not found:
        return None
    host = f"127.0.0.1:{int(found[-1])}"
    connection = http.client.HTTPConnection(host, timeout=_ANSWER_LIMIT_S)
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
        connection.request("GET", "/health")
        if connection.getresponse().status == http.client.OK:
            return f"http://{host}"
    return None
