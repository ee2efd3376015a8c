"""A checkpoint goes on at any other way of sharing the model: weights and Adam's moments to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from miles.config.parallel import parallel_sizes
from miles.trainers.megatron import MegatronTrainer
from miles.types import TrainBatch

from .trainer_tools import config_for, make_batch, run_ranks, save_hf_model, share, trainer_for

_FLAGS: dict[str, Any] = {"lr": 1e-2, "adam_eps": 1e-5}
_TWO: dict[str, Any] = {"actor_num_gpus_per_node": 2}
_FOUR = {"actor_num_gpus_per_node": 4, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
_TENSOR = {**_TWO, "tensor_model_parallel_size": 2, "sequence_parallel": True}
_PIPELINE = {**_TWO, "pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
_CONTEXT = {**_TWO, "context_parallel_size": 2}


class Seen(NamedTuple):
    """What a rank has."""

    weights: dict[str, torch.Tensor]
    moments: list[torch.Tensor]
    """Of a rank that has the whole model, in order of its parameters."""
    after: dict[str, torch.Tensor]
    """The weights one step later."""


def _visit(
    rank: int,
    world_size: int,
    port: int,
    hf: Path,
    root: Path,
    flags: dict[str, Any],
    load: Path | None,
    save: Path,
    steps: int,
) -> Seen:
    """Loads, looks, trains `steps` batches and saves; or, with none to train, saves what was loaded and trains one after."""
    config = config_for(hf, **_FLAGS, **flags, load=None if load is None else str(load))
    sizes = parallel_sizes(config)
    replicas, mine = sizes.data_size(world_size), sizes.data_rank(rank, world_size)

    def rows(batch: TrainBatch) -> TrainBatch:
        return share(batch, [np.arange(batch.num_rows)[mine::replicas]], 2 * sizes.micro_batch_multiple)

    with trainer_for(config, root, rank=rank, world_size=world_size, port=port) as trainer:
        for seed in range(steps):
            trainer.train(rows(make_batch(seed=seed)))
        weights = {key: tensor.clone() for key, tensor in trainer.named_weights()}
        moments = [tensor.clone() for tensor in _moments(trainer)] if world_size == 1 else []
        trainer.save(save, 2, {})
        if rank == 0:
            trainer.finish_save(save, 2)
        trainer.parallel.barrier()
        trainer.train(rows(make_batch(seed=9)))
        return Seen(weights, moments, {key: tensor.clone() for key, tensor in trainer.named_weights()})


def _moments(trainer: MegatronTrainer) -> list[torch.Tensor]:
    [inner] = trainer._actor.optimizer.chained_optimizers
    parameters = [p for group in inner.optimizer.param_groups for p in group["params"]]
    return [inner.optimizer.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq")]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf_model(tmp_path_factory.mktemp("hf"), tied=True, num_hidden_layers=4)


def _at(flags: dict[str, Any], hf: Path, root: Path, load: Path | None, save: Path, steps: int = 0) -> list[Seen]:
    return run_ranks(flags.get("actor_num_gpus_per_node", 1), _visit, hf, root, flags, load, save, steps)


def _assert_same(seen: Seen, whole: Seen) -> None:
    assert seen.weights.keys() == whole.weights.keys()
    assert all(torch.equal(seen.weights[key], whole.weights[key]) for key in whole.weights)
    for key, weight in whole.after.items():
        torch.testing.assert_close(seen.after[key], weight, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("distributed", "others"), [(False, [_PIPELINE, _CONTEXT]), (True, [_TWO, _TENSOR, _PIPELINE])]
)
def test_it_goes_on_at_any_topology(hf: Path, tmp_path: Path, distributed: bool, others: list[dict[str, Any]]) -> None:
    """Written by four ranks, read by one; by two, sharing in each way, and what those write by one again."""
    kind = {"use_distributed_optimizer": distributed}
    there = _at(_FOUR | kind, hf, tmp_path, None, tmp_path / "made", steps=2)
    [whole] = _at(kind, hf, tmp_path, tmp_path / "made", tmp_path / "again")
    assert any(moment.abs().max() > 0 for moment in whole.moments)
    for seen in there:
        _assert_same(seen, whole)
    for number, flags in enumerate(others):
        for seen in _at(flags | kind, hf, tmp_path, tmp_path / "made", tmp_path / f"{number}"):
            _assert_same(seen, whole)
        [back] = _at(kind, hf, tmp_path, tmp_path / f"{number}", tmp_path / "back")
        _assert_same(back, whole)
        assert all(torch.equal(a, b) for a, b in zip(back.moments, whole.moments, strict=True))


def test_a_state_of_the_other_layout_is_refused(hf: Path, tmp_path: Path) -> None:
    _at({"use_distributed_optimizer": True}, hf, tmp_path, None, tmp_path / "made")
    with pytest.raises(
        AssertionError, match=r"--use-distributed-optimizer, got false: .* has the layout of one; add it, or"
    ):
        _at({}, hf, tmp_path, tmp_path / "made", tmp_path / "never")
