"""What every actor of a run has: no silent restarts, and a lane of its own for looking in while it is busy."""

from __future__ import annotations

import faulthandler
import gc
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import ray

from miles.observe.memory import resident_bytes

#: Methods with `@control` run beside the actor's work, in a thread (or event loop) of their own.
control: Any = ray.method(concurrency_group="control")


def actor(cls: type) -> Any:
    """Makes a Ray actor class of `cls`. One `async def` among its methods makes all of its calls run in an event loop.

    An actor that dies stays dead: a restarted one would have lost its model, and the run would go on without it.
    """
    # Ray's overloads do not know concurrency groups, hence the Any.
    decorate: Any = ray.remote
    return decorate(concurrency_groups={"control": 1}, max_restarts=0, max_task_retries=0)(cls)


@dataclass(frozen=True)
class Beat:
    """A sign of life, the answer of every actor's control method `beat`."""

    pid: int
    node: str
    """Ray's id of the machine."""
    trouble: str | None = None
    """How the server that this actor looks after has ended or is stuck; None while it serves, or where there is none."""
    server_pid: int | None = None
    """Also the id of the server's process group."""
    rss_bytes: int = 0
    """Memory of the process; of the server, where there is one."""


def sign_of_life(trouble: str | None = None, server_pid: int | None = None) -> Beat:
    node = ray.get_runtime_context().get_node_id()
    return Beat(os.getpid(), node, trouble, server_pid, resident_bytes(server_pid or os.getpid()))


def settle() -> None:
    """For a process that has made what it will keep: garbage collection passes over that, and comes less often.

    Imports leave half a million objects, and looking through them takes half a second in the midst of some step. What a step
    makes ends by itself, with its last reference; thousands of samples alive at once are no reason to look for cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def all_stacks() -> str:
    """The Python stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as f:
        faulthandler.dump_traceback(f, all_threads=True)
        f.seek(0)
        return f.read()
