"""What is in a checkpoint; `miles.trainers.checkpoints` knows which are whole.

    save_state (every rank) -> DIR/iter_0000007.tmp/   the caller may add files of its own, then finish
    load_state, load_rng    <- DIR/iter_0000007/       a whole one
                               DIR/iter_0000007/critic/    a critic's state, where there is one
                               DIR/iter_0000007/reference/    the reference's weights, where the actor's have become those
                               DIR/iter_0000007/old_actor/    those that made the rollout which comes next

The state is a Megatron distributed checkpoint (torch_dist), so that it can be loaded with other parallel sizes.
"""

from __future__ import annotations

import functools
import json
import queue
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from miles.errors import CheckpointError
from miles.trainers.checkpoints import STATE, partial_directory

from . import cpu, rng
from .parallel import Parallel
from .roles import SleepingWeights

#: Directory within a checkpoint that holds the critic's state.
CRITIC = "critic"
#: ... and the one that holds a reference that is not the run's first.
REFERENCE = "reference"
#: ... and the one with the weights that made the rollout which comes next, where they are older than the actor's.
OLD_ACTOR = "old_actor"

# ----------------------------------------------------------------------------------------------------------------- write


def save_state(
    directory: str | Path,
    iteration: int,
    *,
    model: Sequence[GPTModel],
    optimizer: MegatronOptimizer | None,
    state: dict[str, Any],
    parallel: Parallel,
    critic: tuple[Sequence[GPTModel], MegatronOptimizer | None] | None = None,
    others: Mapping[str, SleepingWeights] | None = None,
) -> Path:
    """Writes this rank's part into the partial directory, emptied first, and returns that. Every rank calls it.

    `optimizer` None leaves the optimizer out. `state` is JSON-ready and the same on every rank. `critic`: its model and
    optimizer, likewise. `others`: further weights of `model`, by the name of their directory.
    """
    partial = partial_directory(directory, iteration)
    parts = {partial: (model, optimizer), **({partial / CRITIC: critic} if critic else {})}
    if parallel.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        for place in (*parts, *(partial / name for name in others or {})):
            place.mkdir(parents=True)
    parallel.barrier()
    with cpu.cuda_means_cpu():
        for place, part in parts.items():
            dist_checkpointing.save(_sharded_state(*part, parallel), str(place), InProcessSave())
        for name, weights in (others or {}).items():
            with weights.awake():
                dist_checkpointing.save(_sharded_state(model, None, parallel), str(partial / name), InProcessSave())
    rng.save(partial / _rng_file(parallel.rank))
    if parallel.is_main:
        (partial / STATE).write_text(json.dumps({"iteration": iteration, **state}, indent=1) + "\n")
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


# ------------------------------------------------------------------------------------------------------------------ read


def load_state(
    checkpoint: Path,
    *,
    model: Sequence[GPTModel],
    optimizer: MegatronOptimizer | None,
    parallel: Parallel,
    without: frozenset[str] = frozenset(),
) -> None:
    """Fills model and, where given, optimizer. Raises CheckpointError where the tensors do not fit the configuration.

    `without` names parameters that stay as they are.
    """
    wanted = _sharded_state(model, optimizer, parallel, is_loading=True)
    for part in wanted["model"].values():
        for name in without & part.keys():
            del part[name]
    try:
        with cpu.cuda_means_cpu():
            loaded = dist_checkpointing.load(wanted, str(checkpoint))
            for number, part in enumerate(model):
                part.load_state_dict(loaded["model"][str(number)], strict=not without)
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


def holds_tensor(checkpoint: Path, name: str) -> bool:
    """Whether the state has a tensor of that name."""
    return name in dist_checkpointing.load_tensors_metadata(str(checkpoint))


def load_rng(checkpoint: Path, parallel: Parallel) -> None:
    """Continues this rank's random streams; a rank that the saved run did not have keeps its own."""
    file = checkpoint / _rng_file(parallel.rank)
    if file.is_file():
        rng.load(file)


def _sharded_state(
    model: Sequence[GPTModel], optimizer: MegatronOptimizer | None, parallel: Parallel, *, is_loading: bool = False
) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": parallel.groups.dp_cp,
        "singleton_local_shards": False,
        # Of a distributed optimizer: the tensors of a plain one, so that each can be loaded as the other.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }
    # Tensors go by the names that they have in the whole model, whatever piece holds them.
    pieces = {str(number): part.sharded_state_dict(metadata=metadata) for number, part in enumerate(model)}
    state: dict[str, Any] = {"model": pieces}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=is_loading, metadata=metadata)
    return state


def _rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.safetensors"
