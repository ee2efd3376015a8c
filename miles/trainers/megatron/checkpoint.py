"""Checkpoints on disk: whole or not there at all.

    save_state (every rank) -> DIR/iter_0000007.tmp/   the caller may add files of its own
    finish (rank 0)         -> manifest.json, rename to iter_0000007, latest_checkpointed_iteration.txt
    find -> verify -> load_state

The state is a Megatron distributed checkpoint (torch_dist), so that it can be loaded with other parallel sizes. The
manifest lists size and checksum of every file and is written last: a directory without it, or one that disagrees with
it, is refused by name. Iteration `i` is the state after `i` training rollouts.
"""

from __future__ import annotations

import functools
import json
import queue
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from miles.errors import CheckpointError

from . import cpu, rng
from .hf_files import fsync, replace_directory
from .model import PolicyModel
from .parallel import Parallel

LATEST = "latest_checkpointed_iteration.txt"
_MANIFEST = "manifest.json"
_STATE = "trainer.json"
_CHUNK_BYTES = 1 << 24


def iteration_directory(directory: str | Path, iteration: int) -> Path:
    return Path(directory) / f"iter_{iteration:07d}"


def partial_directory(directory: str | Path, iteration: int) -> Path:
    """Where a checkpoint is written until it is whole; the caller may put files of its own there between save and finish."""
    return Path(directory) / f"iter_{iteration:07d}.tmp"


# ----------------------------------------------------------------------------------------------------------------- write


def save_state(
    directory: str | Path,
    iteration: int,
    *,
    model: PolicyModel,
    optimizer: MegatronOptimizer | None,
    state: dict[str, Any],
    parallel: Parallel,
) -> Path:
    """Writes this rank's part into the partial directory, emptied first, and returns that. Every rank calls it.

    `optimizer` None leaves the optimizer out. `state` is JSON-ready and the same on every rank.
    """
    partial = partial_directory(directory, iteration)
    if parallel.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    parallel.barrier()
    with cpu.cuda_means_cpu():
        dist_checkpointing.save(_sharded_state(model, optimizer, parallel), str(partial), InProcessSave())
    rng.save(partial / _rng_file(parallel.rank))
    if parallel.is_main:
        (partial / _STATE).write_text(json.dumps({"iteration": iteration, **state}, indent=1) + "\n")
    parallel.barrier()
    return partial


class InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's torch_dist writer, in this process and thread.

    Megatron's own forks a writer under running gloo and CUDA threads, and keeps a manager process that outlives a trainer
    which is killed.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> AsyncRequest:
        filesystem_async._results_queue = queue.SimpleQueue()
        request = super().async_save(sharded_state_dict, checkpoint_dir)
        if request.async_fn is None:
            return request
        transforms = request.async_fn.args[0]
        return request._replace(async_fn=functools.partial(_write_buckets, transforms))


def _write_buckets(transforms: list[Any], rank: int, buckets: list[Any], results: queue.SimpleQueue[Any]) -> None:
    written: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        replies: queue.Queue[Any] = queue.Queue()
        pending: queue.Queue[int] = queue.Queue()
        pending.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, replies, pending, use_fsync=True)
        _, outcome = replies.get_nowait()
        if isinstance(outcome, Exception):
            raise outcome
        written[number] = outcome
    results.put(written)


def finish(directory: str | Path, iteration: int) -> Path:
    """Makes the partial checkpoint current: manifest, flush, rename, then the latest-iteration file. One rank calls it.

    Killed anywhere in between, the previous checkpoint stays current and whole. Returns the final directory.
    """
    partial, final = partial_directory(directory, iteration), iteration_directory(directory, iteration)
    if not partial.is_dir():
        raise CheckpointError(
            f"checkpoint {partial}, got no such directory: save was not called; call it on every rank"
        )
    files = {str(file.relative_to(partial)): _fingerprint(file) for file in _files(partial)}
    for file in _files(partial):
        fsync(file)
    _write_durably(partial / _MANIFEST, json.dumps({"iteration": iteration, "files": files}, indent=1) + "\n")
    replace_directory(partial, final)
    _write_durably(Path(directory) / LATEST, f"{iteration}\n")
    return final


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    fsync(temporary)
    temporary.rename(path)
    fsync(path.parent)


def _files(directory: Path) -> Iterator[Path]:
    yield from sorted(file for file in directory.rglob("*") if file.is_file() and file.name != _MANIFEST)


def _fingerprint(file: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_64()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return {"bytes": file.stat().st_size, "xxh3_64": digest.hexdigest()}


# ------------------------------------------------------------------------------------------------------------------ find


def has_latest(directory: str | Path) -> bool:
    return (Path(directory) / LATEST).is_file()


def latest_iteration(directory: str | Path) -> int:
    """The iteration that latest_checkpointed_iteration.txt names. Raises CheckpointError where it names none."""
    file = Path(directory) / LATEST
    try:
        return int(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}, got no iteration ({error}): write the number of a checkpoint beside it"
        ) from error


def is_checkpoint(directory: str | Path) -> bool:
    """Whether `directory` holds one checkpoint's files itself, rather than a series of checkpoints."""
    return (Path(directory) / "metadata.json").is_file() and (Path(directory) / _STATE).is_file()


def find(directory: str | Path) -> Path:
    """The current checkpoint of a series, or `directory` itself where it is one. Verified.

    Raises CheckpointError, with the newest whole earlier checkpoint, where the current one is missing or torn.
    """
    root = Path(directory)
    if is_checkpoint(root):
        verify(root)
        return root
    iteration = latest_iteration(root)
    current = iteration_directory(root, iteration)
    try:
        verify(current)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_advice(root, iteration)}") from error
    return current


def verify(checkpoint: Path) -> None:
    """Compares every file with the manifest. Raises CheckpointError naming the first that is missing or differs."""
    manifest = checkpoint / _MANIFEST
    try:
        expected = json.loads(manifest.read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        why = "it was not written to its end" if checkpoint.is_dir() else "there is no such directory"
        raise CheckpointError(f"checkpoint {checkpoint}, got no {_MANIFEST}: {why}") from error
    for name, fingerprint in expected.items():
        file = checkpoint / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {checkpoint}, got no {name}: the manifest lists it")
        if file.stat().st_size != fingerprint["bytes"]:
            raise CheckpointError(
                f"{file}, got {file.stat().st_size} bytes: the manifest says {fingerprint['bytes']}, the file is torn"
            )
        if _fingerprint(file) != fingerprint:
            raise CheckpointError(f"{file}, got other contents than the manifest's checksum: the file is damaged")


def _advice(root: Path, iteration: int) -> str:
    for earlier in sorted(_iterations(root), reverse=True):
        if earlier < iteration:
            try:
                verify(iteration_directory(root, earlier))
            except CheckpointError:
                continue
            return (
                f"the newest whole one before it is {earlier}: write {earlier} into {root / LATEST} to go on from there"
            )
    return "no earlier checkpoint there is whole; start afresh with an empty --load"


def _iterations(root: Path) -> Iterator[int]:
    for entry in root.iterdir():
        if match := re.fullmatch(r"iter_(\d{7,})", entry.name):
            yield int(match.group(1))


# ------------------------------------------------------------------------------------------------------------------ read


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON that `save_state` was given, with `iteration`."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint / _STATE}, got {error}: it is no checkpoint of Miles; check the path"
        ) from error
    return state


def load_state(
    checkpoint: Path, *, model: PolicyModel, optimizer: MegatronOptimizer | None, parallel: Parallel
) -> None:
    """Fills model and, where given, optimizer. Raises CheckpointError where the tensors do not fit the configuration."""
    wanted = _sharded_state(model, optimizer, parallel, is_loading=True)
    try:
        with cpu.cuda_means_cpu():
            loaded = dist_checkpointing.load(wanted, str(checkpoint))
            model.load_state_dict(loaded["model"])
            if optimizer is not None:
                optimizer.load_state_dict(loaded["optimizer"])
    except (CheckpointException, CheckpointingException, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint}, got {_reason(error)}: it does not fit this model; check the MODEL flags"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of what went wrong; torch wraps it in one exception for all ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = (str(error) or repr(error)).splitlines()[0]
    return text if len(text) < 300 else text[:300] + " ..."


def load_rng(checkpoint: Path, parallel: Parallel) -> None:
    """Continues this rank's random streams; a rank that the saved run did not have keeps its own."""
    file = checkpoint / _rng_file(parallel.rank)
    if file.is_file():
        rng.load(file)


def _sharded_state(
    model: PolicyModel, optimizer: MegatronOptimizer | None, parallel: Parallel, *, is_loading: bool = False
) -> dict[str, Any]:
    metadata = {"dp_cp_group": parallel.groups.dp_cp, "singleton_local_shards": False}
    state: dict[str, Any] = {"model": model.sharded_state_dict(metadata=metadata)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=is_loading, metadata=metadata)
    return state


def _rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.safetensors"
