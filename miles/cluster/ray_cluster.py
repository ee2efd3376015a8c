"""Ray itself: start a private cluster, or join the one that RAY_ADDRESS names.

A cluster that we start listens on loopback only, asks every client for a token made for this run, keeps its files in a
directory of its own, and ends with the driver: a guardian process sees to it that a SIGKILL leaves nothing behind.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from . import guardian

logger = logging.getLogger(__name__)

_PREFIX = "miles-ray-"
#: Shared memory that the object store of a CPU run may take; a rollout's batches are a few MB.
_CPU_OBJECT_STORE_BYTES = 512 * 1024**2
#: For Ray to shut down in order.
_DISCONNECT_LIMIT_S = 30.0
#: For the guardian, which limits itself to `guardian.LIMIT_S` unless the kernel lets it wait.
_GUARDIAN_LIMIT_S = guardian.LIMIT_S + 10.0

_secured = False


def secure_environment() -> None:
    """Settings of a private cluster, inherited by every process it starts. Ray reads them when it is imported, so this
    must come before; a second call does nothing, nor does any where RAY_ADDRESS names a cluster.

    They replace what the environment holds: a token of the user's is another cluster's."""
    global _secured
    if _secured or os.environ.get("RAY_ADDRESS"):
        return
    _secured = True
    assert "ray" not in sys.modules, "ray was imported before its environment was set"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray's own switch for "this machine only": without it, Ray replaces 127.0.0.1 by the machine's address and binds to
    # all interfaces.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray would start a worker for each core ahead; actors with an environment of their own cannot use them.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")


@contextlib.contextmanager
def ray_cluster(*, has_gpu: bool, keep_open: Sequence[int] = ()) -> Iterator[None]:
    """A connected Ray inside the block, shut down after it. Joins RAY_ADDRESS if set, else starts a private cluster.

    `keep_open` are descriptors that the guardian of a private cluster holds as well, until all of the run has ended.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            _connect(address=address)
            yield
        finally:
            _disconnect()
        return

    secure_environment()

    _remove_leftovers()
    # Unix sockets below this directory allow about 100 characters: keep it short.
    directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    os.environ[guardian.MARK_VARIABLE] = mark = secrets.token_hex(16)
    watch = subprocess.Popen(
        [sys.executable, guardian.__file__, str(directory), mark, str(os.getpid())],
        stdin=subprocess.PIPE,
        # It must not find itself by its mark, nor die of the Ctrl-C that ends the driver.
        env=guardian.unmarked(),
        start_new_session=True,
        pass_fds=keep_open,
    )
    try:
        _connect(
            address="local",
            _node_ip_address="127.0.0.1",
            include_dashboard=False,
            object_store_memory=None if has_gpu else _CPU_OBJECT_STORE_BYTES,
            _temp_dir=str(directory),
        )
        yield
    finally:
        leaving = _disconnect()
        del os.environ[guardian.MARK_VARIABLE]
        try:
            watch.communicate(
                timeout=_GUARDIAN_LIMIT_S
            )  # it ends what a clean shutdown left, and removes the directory
        except subprocess.TimeoutExpired:
            logger.warning(
                "the guardian of %s was not done after %.0f s; it goes on by itself", directory, _GUARDIAN_LIMIT_S
            )
        leaving.join(_DISCONNECT_LIMIT_S)


def _disconnect() -> threading.Thread:
    """`ray.shutdown`, given up after a while: it waits without a limit for a raylet that is stopped."""
    import ray

    leaving = threading.Thread(target=ray.shutdown, name="ray shutdown", daemon=True)
    leaving.start()
    leaving.join(_DISCONNECT_LIMIT_S)
    if leaving.is_alive():
        logger.warning("Ray did not shut down within %.0f s; what is left of it is killed", _DISCONNECT_LIMIT_S)
        atexit.unregister(ray.shutdown)
    return leaving


def _connect(**options: Any) -> None:
    """`ray.init`, with the driver's SIGTERM handler left in its place: Ray's own would end the driver without a word."""
    import ray

    on_terminate = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    signal.signal(signal.SIGTERM, on_terminate)


def _remove_leftovers() -> None:
    """Deletes the directories of drivers that were killed before they could do it themselves."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        match = re.fullmatch(rf"{_PREFIX}(\d+)-.*", path.name)
        if match and not psutil.pid_exists(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)
