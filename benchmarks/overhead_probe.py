"""The `--plugin` with which overhead.py looks into a run: notes when parts of a step begin and end, in every process.

Each process appends lines `part begin end` (seconds of the system-wide monotonic clock) to a file of its own in
$MILES_OVERHEAD_DIR. One note costs a few microseconds. Nothing is changed but the names below, which are wrapped.
"""

from __future__ import annotations

import functools
import inspect
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_file = (Path(os.environ["MILES_OVERHEAD_DIR"]) / f"{os.getpid()}.txt").open("a", buffering=1)


def note(part: str, begin: float) -> None:
    _file.write(f"{part} {begin!r} {time.monotonic()!r}\n")


def watch(owner: Any, name: str, part: str) -> None:
    """Wraps `owner.name`, a function or a coroutine function, so that each call is noted as `part`."""
    inner: Callable[..., Any] = getattr(owner, name)
    if inspect.iscoroutinefunction(inner):

        @functools.wraps(inner)
        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            begin = time.monotonic()
            try:
                return await inner(*args, **kwargs)
            finally:
                note(part, begin)

    else:

        @functools.wraps(inner)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            begin = time.monotonic()
            try:
                return inner(*args, **kwargs)
            finally:
                note(part, begin)

    setattr(owner, name, wrapped)


def watch_all() -> None:
    from miles.cluster import rollout_manager, trainer_group
    from miles.cluster.app import App
    from miles.engines.pool import EnginePool
    from miles.rollout.rollout import Rollout
    from miles.trainers.megatron.trainer import MegatronTrainer

    for owner, name, part in (
        (App, "generate", "driver.rollout"),
        (App, "train", "driver.train"),
        (App, "publish_weights", "driver.publish"),
        (App, "finish_step", "driver.finish"),
        (Rollout, "generate", "manager.rollout"),
        (EnginePool, "generate", "manager.engines"),
        (rollout_manager, "build_batches", "manager.batch"),
        (rollout_manager, "choose_samples", "manager.end"),  # all but the last lines of the call
        (MegatronTrainer, "train", "trainer.train"),
        (trainer_group, "_publish", "trainer.connected"),
        (trainer_group, "publish", "trainer.publish"),
    ):
        watch(owner, name, part)


watch_all()
