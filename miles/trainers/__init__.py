"""Trainers: they turn a `TrainBatch` into a step of the policy, and hand out its weights. One backend so far: megatron."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .check import check

if TYPE_CHECKING:
    from miles.config.groups import Config

    from .megatron import MegatronTrainer

__all__ = ["check", "make_trainer"]


def make_trainer(
    config: Config,
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    master_addr: str,
    master_port: int,
    run_dir: Path,
    total_optimizer_steps: int,
) -> MegatronTrainer:
    """The trainer that --train-backend names, in this process. The backend is imported here and not before."""
    from .megatron import MegatronTrainer

    return MegatronTrainer(
        config,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        master_addr=master_addr,
        master_port=master_port,
        run_dir=run_dir,
        total_optimizer_steps=total_optimizer_steps,
    )
