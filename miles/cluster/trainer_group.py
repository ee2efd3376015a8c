"""The trainers: one Ray actor per rank, driven together.

driver --train(batch shards)--> every rank --collectives--> metrics
driver --publish(version)-----> every rank gathers, the main rank streams buckets to the engines
driver --save(directory)------> every rank writes its shards, then the main rank makes them current

A rank does what it is asked in order, so that a publication may wait in it for the end of the training before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from miles.config import Config, import_plugins, parallel_sizes
from miles.engines.client import EngineClient
from miles.errors import CheckpointError, EngineError, WeightUpdateError
from miles.interfaces import WeightTransport
from miles.observe import open_process_log
from miles.trainers import checkpoints, make_trainer
from miles.types import TrainBatch, WeightVersion
from miles.weights import PublishStats, SharedMemoryTransport, TorchSharingTransport, publish

from .actors import Beat, actor, all_stacks, control, settle, sign_of_life
from .engine_group import EngineAddress
from .placement import Placement
from .waits import Look, Process, wait_for


@dataclass(frozen=True)
class Trained:
    """What a rank, or all of them, report of one rollout."""

    metrics: dict[str, float]
    log_probs: dict[int, np.ndarray]
    """Of the traced samples, by position in the rollout: the trainer's, before the first update."""


@dataclass
class _Publication:
    """One that was called together with the training before it."""

    version: WeightVersion
    calls: dict[Process, ray.ObjectRef]
    to_former_engines: bool = False
    """One of the engines it goes to has been replaced since."""


class TrainerActor:
    """One rank. Its methods are called on all ranks together, in the same order."""

    def __init__(self, config: Config, rank: int, logs: Path):
        open_process_log(logs, f"trainer-{rank}")
        self.config, self.rank = config, rank
        self._loop = asyncio.new_event_loop()
        self._transport: WeightTransport | None = None
        self._clients: dict[str, EngineClient] = {}
        """By name of the engine, with connections that last from one publication to the next."""
        self._has_trained = False
        """Whether the last training came to its end."""

    def rendezvous(self) -> tuple[str, int]:
        """An address of this node and a free port on it, for rank 0's process group."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as s:
            s.bind((host, 0))
            return host, s.getsockname()[1]

    def start(
        self,
        world_size: int,
        local_rank: int,
        address: tuple[str, int],
        total_steps: int,
        run_dir: Path,
        resume_from: Path | None,
    ) -> int:
        """Builds model and optimizer, loads weights; returns the rollout to begin with."""
        import_plugins(self.config)
        self.trainer = make_trainer(
            self.config,
            rank=self.rank,
            world_size=world_size,
            local_rank=local_rank,
            master_addr=address[0],
            master_port=address[1],
            run_dir=run_dir,
            total_optimizer_steps=total_steps,
        )
        first_rollout = self.trainer.load_initial(resume_from)
        settle()
        return first_rollout

    def train(self, batch: TrainBatch) -> Trained:
        self._has_trained = False
        metrics = self.trainer.train(batch)
        self._has_trained = True
        return Trained(metrics, self.trainer.traced)

    def evaluate(self, batch: TrainBatch) -> dict[str, float]:
        return self.trainer.evaluate(batch)

    def reference_log_probs(self, batch: TrainBatch) -> np.ndarray:
        return self.trainer.reference_log_probs(batch)

    def drop_reference(self) -> None:
        self.trainer.drop_reference()

    def publish(
        self, engines: Sequence[EngineAddress], version: WeightVersion, *, of_training: bool = False
    ) -> PublishStats | None:
        """Every rank gathers its part of each tensor; the main rank sends. Returns the main rank's figures.

        of_training: was called together with a `train`. Raises where that has failed.
        """
        if of_training and not self._has_trained:
            raise WeightUpdateError(f"weights of version {version}, got none: the training before them failed")
        weights = self.trainer.named_weights()
        if self.rank != 0:
            for _ in weights:
                pass
            return None
        if self._transport is None:
            self._transport = _transport(self.config)
        clients = [self._client(engine) for engine in engines]
        return self._loop.run_until_complete(_publish(self.config, weights, clients, self._transport, version))

    def _client(self, engine: EngineAddress) -> EngineClient:
        known = self._clients.get(engine.name)
        if known is None or known.url != engine.url:
            if known is not None:
                self._loop.run_until_complete(known.close())
            known = self._clients[engine.name] = EngineClient(engine.name, engine.url, engine.token)
        return known

    def save(self, directory: str, iteration: int, extra: dict[str, Any]) -> None:
        self.trainer.save(directory, iteration, extra)

    def finish_save(self, directory: str, iteration: int) -> None:
        self.trainer.finish_save(directory, iteration)

    def save_hf(self, path: str) -> None:
        self.trainer.save_hf(path)

    @control
    def beat(self) -> Beat:
        return sign_of_life()

    @control
    def stacks(self) -> str:
        return all_stacks()


def _transport(config: Config) -> WeightTransport:
    """How weights travel to the engines of this run."""
    if config.cluster.rollout_engine == "sglang":
        return TorchSharingTransport(ranks_per_engine=config.sglang.rollout_num_gpus_per_engine)
    return SharedMemoryTransport()


# Not a method: one coroutine among its methods would make Ray run all of the actor's calls in an event loop.
async def _publish(
    config: Config,
    weights: Iterator[tuple[str, torch.Tensor]],
    engines: Sequence[EngineClient],
    transport: WeightTransport,
    version: WeightVersion,
) -> PublishStats:
    # What happened to the connections since the last publication, such as their end, is noticed here.
    await asyncio.sleep(0)
    try:
        return await publish(
            weights,
            engines,
            transport,
            version,
            config.cluster.update_weight_buffer_size,
            check_equal=config.debug.check_weight_update_equal,
        )
    except BaseException:
        await asyncio.gather(*(engine.close() for engine in engines))
        raise


class TrainerGroup:
    """The driver's view of all trainer ranks."""

    def __init__(self, config: Config, placement: Placement, logs: Path):
        self.config = config
        self._limit_s = config.cluster.wait_timeout
        self._sizes = parallel_sizes(config)
        self.look: Look | None = None
        self._begun: _Publication | None = None
        cpu_threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        env = {
            "TORCHDYNAMO_DISABLE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **({} if placement.use_gpu else cpu_threads),
        }
        self.processes = [
            Process(
                f"trainer-{rank}",
                actor(TrainerActor)
                .options(**placement.options(bundle), runtime_env={"env_vars": env})
                .remote(config, rank, logs),
                logs / f"trainer-{rank}.log",
            )
            for rank, bundle in enumerate(placement.layout.actor_bundles)
        ]

    @property
    def world_size(self) -> int:
        return len(self.processes)

    @property
    def data_size(self) -> int:
        """Shards of a batch: replicas of the model."""
        return self._sizes.data_size(self.world_size)

    def _shard(self, shards: Sequence[ray.ObjectRef], rank: int) -> ray.ObjectRef:
        """Ranks of one replica are handed the same."""
        return shards[self._sizes.data_rank(rank, self.world_size)]

    def _all(self, what: str, call: Callable[[Any, int], ray.ObjectRef]) -> list[Any]:
        return self._wait({process: call(process.handle, rank) for rank, process in enumerate(self.processes)}, what)

    def _wait(self, calls: dict[Process, ray.ObjectRef], what: str) -> list[Any]:
        return wait_for(calls, what=what, limit_s=self._limit_s, look=self.look)

    def start(self, total_steps: int, run_dir: Path, resume_from: Path | None, first_rollout: int) -> None:
        """`resume_from` is a whole checkpoint, or None. Raises `CheckpointError` where a rank found another one there than
        the driver, which would begin with `first_rollout`.
        """
        limit_s = self.config.cluster.start_timeout
        first = self.processes[0]
        [address] = wait_for(
            {first: first.handle.rendezvous.remote()}, what="the trainers' address", limit_s=limit_s, look=self.look
        )
        per_node = self.config.cluster.actor_num_gpus_per_node or 1
        starts = self._all(
            "the trainers to load",
            lambda h, rank: h.start.remote(
                self.world_size, rank % per_node, address, total_steps, run_dir, resume_from
            ),
        )
        if any(start != first_rollout for start in starts):
            raise CheckpointError(
                f"--load, got rollouts {starts} to begin with on ranks 0..{self.world_size - 1} and {first_rollout} on the "
                f"driver: they read different checkpoints; --load must be a directory that all nodes share"
            )

    def train(
        self,
        shards: Sequence[ray.ObjectRef],
        then_publish: tuple[Sequence[EngineAddress], WeightVersion] | None = None,
    ) -> Trained:
        """All optimizer steps of one rollout; `shards[i]` holds data-parallel rank i's `TrainBatch`.

        then_publish: engines and the version of the weights that come out. A rank goes on to that publication at once, without
        the driver's word between; `publish` waits for it, and has to be called.
        """
        calls = {
            process: process.handle.train.remote(self._shard(shards, rank))
            for rank, process in enumerate(self.processes)
        }
        if then_publish is not None:
            engines, version = then_publish
            self._begun = _Publication(
                version, {p: p.handle.publish.remote(engines, version, of_training=True) for p in self.processes}
            )
        ranks: list[Trained] = self._wait(calls, "the training step")
        return Trained(
            ranks[0].metrics,
            {position: values for rank in ranks for position, values in rank.log_probs.items()},
        )

    def reference_log_probs(self, shards: Sequence[ray.ObjectRef]) -> list[np.ndarray]:
        """Of the rows of each shard; `shards` as in `train`."""
        found = self._all(
            "reference log-probs", lambda h, rank: h.reference_log_probs.remote(self._shard(shards, rank))
        )
        of_shard = {self._sizes.data_rank(rank, self.world_size): values for rank, values in enumerate(found)}
        return [of_shard[number] for number in range(self.data_size)]

    def drop_reference(self) -> None:
        """Batches bring the reference's log-probs from now on."""
        self._all("the reference to be dropped", lambda h, _: h.drop_reference.remote())

    def evaluate(self, name: str, shards: Sequence[ray.ObjectRef]) -> dict[str, float]:
        """Loss and metrics of one evaluation data set, without a gradient; `shards` as in `train`."""
        return self._all(f"evaluation {name}", lambda h, rank: h.evaluate.remote(self._shard(shards, rank)))[0]

    def publish(self, engines: Sequence[EngineAddress], version: WeightVersion) -> PublishStats:
        """Returns once every engine serves `version`: at the end of the publication that `train` began, or of a new one."""
        what = f"weights of version {version} to the engines"
        begun, self._begun = self._begun, None
        if begun is not None and begun.to_former_engines:
            with contextlib.suppress(EngineError):
                self._wait(begun.calls, f"weights of version {version} to the engines, as they were before")
        elif begun is not None:
            assert begun.version == version, (begun.version, version)
            return self._wait(begun.calls, what)[0]
        return self._all(what, lambda h, _: h.publish.remote(engines, version))[0]

    def engine_replaced(self) -> None:
        """A publication that has begun reaches one engine less: the next `publish` is made anew."""
        if self._begun is not None:
            self._begun.to_former_engines = True

    def save(
        self, directory: str, iteration: int, extra: dict[str, Any], also: Callable[[Path], None] | None = None
    ) -> None:
        """Returns once the checkpoint of `iteration` is whole on disk and current. `also` puts more files into it."""
        self._all(f"checkpoint {iteration}", lambda h, _: h.save.remote(directory, iteration, extra))
        if also is not None:
            also(checkpoints.partial_directory(directory, iteration))
        first = self.processes[0]
        wait_for(
            {first: first.handle.finish_save.remote(directory, iteration)},
            what=f"checkpoint {iteration} to become current",
            limit_s=self._limit_s,
            look=self.look,
        )

    def save_hf(self, path: str) -> None:
        self._all(f"HF export to {path}", lambda h, _: h.save_hf.remote(path))
