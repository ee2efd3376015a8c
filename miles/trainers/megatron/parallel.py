"""This rank's place among the ranks: process group, megatron's parallel groups, and the reductions we need.

    init_process_group (backend and limit explicit) -> parallel_state (TP, PP, CP, EP, DP groups) -> Parallel

Everything else asks `Parallel` for a group or a reduction; no module computes a rank layout of its own.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from miles.config.parallel import ParallelSizes

from .context import TokenSplit

T = TypeVar("T")


class Parallel:
    """Process groups of this rank. One at a time per process; `close` takes it down."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        local_rank: int,
        master_addr: str,
        master_port: int,
        backend: str,
        timeout_s: float,
        sizes: ParallelSizes | None = None,
    ):
        """Joins the process group, within `timeout_s`, which is also the limit of every collective.

        `master_port` 0 lets a world of one take any free port. Raises ValueError where the world does not divide into replicas.
        """
        self.sizes = sizes or ParallelSizes()
        data_rank = self.sizes.data_rank(rank, world_size)
        self.rank, self.world_size = rank, world_size
        self.device = _device(local_rank)
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group(
            backend,
            store=_store(master_addr, master_port, rank, world_size, timeout),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=self.device if backend == "nccl" else None,
        )
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=self.sizes.tensor,
            pipeline_model_parallel_size=self.sizes.pipeline,
            virtual_pipeline_model_parallel_size=self.sizes.virtual if self.sizes.virtual > 1 else None,
            context_parallel_size=self.sizes.context,
            expert_model_parallel_size=self.sizes.expert,
            expert_tensor_parallel_size=self.sizes.expert_tensor,
            distributed_timeout_minutes=timeout_s / 60,  # fractions, too: megatron makes a timedelta of it
            # A second set of gloo groups serves only the distributed optimizer's CPU gathers.
            create_gloo_process_groups=False,
        )
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        assert self.data_rank == data_rank, "the driver hands out shards by the same arithmetic"

    @property
    def is_main(self) -> bool:
        """The one rank that writes shared files and hands out weights."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        return int(self.groups.dp.rank())

    @property
    def data_size(self) -> int:
        return int(self.groups.dp.size())

    @property
    def token_split(self) -> TokenSplit:
        """This rank's part in the tokens of a micro-batch."""
        cp = self.groups.cp
        return TokenSplit(cp.rank(), cp.size(), self.sizes.tensor if self.sizes.sequence_parallel else 1)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer, hence the loss."""
        return bool(self.groups.pp.rank() == self.groups.pp.size() - 1)

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Sum over the data-parallel replicas, whose rows differ. In place.

        Ranks of one replica hold the same rows, also those that share a sequence: scores of tokens are put together
        (see `context`) before anything is made of them.
        """
        return self._reduce(values, dist.ReduceOp.SUM)

    def max_over_data(self, values: Tensor) -> Tensor:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.groups.dp.size() > 1:
            dist.all_reduce(values, op=op, group=self.groups.dp)
        return values

    def tensor_from_last_stage(self, values: Tensor) -> Tensor:
        """`values` of the last pipeline stage, on every stage. In place; the shape is the same on all."""
        return self.tensor_from_stage(self.groups.pp.size() - 1, values)

    def tensor_from_stage(self, stage: int, values: Tensor) -> Tensor:
        """The same, of any stage."""
        if self.groups.pp.size() > 1:
            dist.broadcast(values, src=self._stage_rank(stage), group=self.groups.pp)
        return values

    def from_last_stage(self, value: T) -> T:
        """A small value of the last pipeline stage, on every stage."""
        if self.groups.pp.size() == 1:
            return value
        box = [value]
        src = self._stage_rank(self.groups.pp.size() - 1)
        dist.broadcast_object_list(box, src=src, group=self.groups.pp, device=self.device)
        return box[0]

    def from_all_stages(self, value: T) -> list[T]:
        """The small values of all pipeline stages, in order."""
        if self.groups.pp.size() == 1:
            return [value]
        found: list[T | None] = [None] * self.groups.pp.size()
        dist.all_gather_object(found, value, group=self.groups.pp)
        return found  # type: ignore[return-value]

    def _stage_rank(self, stage: int) -> int:
        return dist.get_global_rank(self.groups.pp, stage)

    def gather_tensor_shards(self, shard: Tensor, *, of_expert: bool = False) -> list[Tensor]:
        """The shards of a tensor-parallel weight, or of an expert's, on all ranks of the group, in rank order."""
        return _gathered(shard, self.groups.expt_tp if of_expert else self.groups.tp)

    def gather_expert_shards(self, weight: Tensor) -> list[Tensor]:
        """What the ranks that share the experts have in the place of this rank's `weight`, in rank order."""
        return _gathered(weight, self.groups.ep)

    def from_main(self, value: T) -> T:
        """`value` of the main rank, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leaves all groups. Safe to call twice."""
        if dist.is_initialized():
            mpu.destroy_model_parallel()
            dist.destroy_process_group()


def _gathered(shard: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    if group.size() == 1:
        return [shard]
    shards = [torch.empty(shard.shape, dtype=shard.dtype, device=shard.device) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Ray shows an actor only the GPU it was given; other launchers show all of the node's.
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _store(host: str, port: int, rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """The rendezvous store, listening on `host` alone: TCPStore by itself listens on every interface."""
    if _is_loopback(host):
        # gloo would otherwise listen on whatever interface the host name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
    if rank != 0:
        return dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        use_libuv=True,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except (OSError, ValueError):
        return False


def _loopback_interface() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return "lo" if "lo" in names else "lo0"
