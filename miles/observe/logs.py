"""One log file per process, native output included: what gloo or NCCL print before they abort is what one looks for."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from pathlib import Path

FORMAT = "%(asctime)s.%(msecs)03d %(levelname).1s %(process)d %(name)s: %(message)s"


def open_process_log(logs: Path, name: str, *, level: int = logging.INFO) -> Path:
    """Sends this process's logging, stdout and stderr to `logs/<name>.log` (appended) and returns the path.

    Fatal signals dump every thread's Python stack there as well.
    """
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"{name}.log"
    stream = open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(FORMAT, "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "asyncio", "urllib3", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    faulthandler.enable(stream)
    return path


def tail(path: Path, lines: int = 20, max_bytes: int = 64 * 1024) -> str:
    """The last lines of a log, or a remark that there is none; never raises, since it is called while failing."""
    try:
        with open(path, "rb") as f:
            f.seek(0, os.SEEK_END)
            f.seek(max(0, f.tell() - max_bytes))
            text = f.read().decode("utf-8", "replace")
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join(text.splitlines()[-lines:])
