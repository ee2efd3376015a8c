"""Families of models shared by real ranks: every tensor goes in and comes out bitwise, and a step is that of one rank."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from miles.config.parallel import parallel_sizes
from miles.types import TrainBatch
from tests.unit.trainers.families import save_model

from .trainer_tools import config_for, make_batch, run_ranks, share, trainer_for

_DENSE = ("qwen2 window", "llama 3.1", "glm4", "qwen3_5_text")
_EXPERTS = ("qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe", "qwen3_next")
_OPTIMIZER: dict[str, Any] = {"lr": 1e-3, "adam_eps": 1e-6, "clip_grad": 0.5}


class Stepped(NamedTuple):
    lost: list[str]
    """Tensors that did not come out as they went in."""
    log_probs: list[np.ndarray]
    loss: float
    norm: float
    weights: dict[str, torch.Tensor]


def _step(
    rank: int, world_size: int, port: int, hf: Path, run_dir: Path, flags: dict[str, Any], batch: TrainBatch
) -> Stepped:
    """The model through one optimizer step of the whole batch."""
    config = config_for(hf, actor_num_gpus_per_node=world_size, **_OPTIMIZER, **flags)
    sizes = parallel_sizes(config)
    replicas, mine = sizes.data_size(world_size), sizes.data_rank(rank, world_size)
    rows = np.array_split(np.arange(batch.num_rows), replicas)[mine]
    own = share(batch, [rows], 2)
    with trainer_for(config, run_dir, rank=rank, world_size=world_size, port=port) as trainer:
        out = {name: tensor.clone() for name, tensor in trainer.named_weights()}
        saved = load_file(hf / "model.safetensors")
        lost = [name for name in saved if name not in out or not torch.equal(out[name], saved[name])]
        log_probs = trainer.log_probs(own)
        metrics = trainer.train(own)
        weights = {name: tensor.clone() for name, tensor in trainer.named_weights()}
    return Stepped(lost, log_probs, metrics["train/loss"], metrics["train/grad_norm"], weights)


@functools.cache
def _batch() -> TrainBatch:
    return make_batch()


@functools.cache
def _alone(root: Path, case: str) -> tuple[Path, Stepped]:
    hf = root / f"family-{case.replace(' ', '-')}"
    save_model(case, hf)
    return hf, _step(0, 1, 0, hf, root, {}, _batch())


@pytest.mark.parametrize(
    ("cases", "flags"),
    [
        (_DENSE, {"tensor_model_parallel_size": 2}),
        (_DENSE + _EXPERTS, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (_DENSE + _EXPERTS, {"pipeline_model_parallel_size": 2}),
        (_EXPERTS, {"expert_model_parallel_size": 2}),
        # The others keep a state along the sequence.
        (("qwen2 window", "glm4", "qwen3_moe", "gpt_oss", "deepseek_v3"), {"context_parallel_size": 2}),
    ],
    ids=["tp2", "tp2-sp", "pp2", "ep2", "cp2"],
)
def test_two_ranks_are_as_one(
    tmp_path_factory: pytest.TempPathFactory, cases: tuple[str, ...], flags: dict[str, Any]
) -> None:
    root = tmp_path_factory.getbasetemp()
    for case in cases:
        hf, expected = _alone(root, case)
        ranks = run_ranks(2, _step, hf, root, flags, _batch())
        for held in ranks:
            assert not held.lost, case
            assert held.weights.keys() == expected.weights.keys()
            assert held.loss == pytest.approx(expected.loss, abs=1e-6), case
            assert held.norm == pytest.approx(expected.norm, rel=1e-5), case
            for name, weight in expected.weights.items():
                assert (held.weights[name] - weight).abs().max() <= 1e-4, (case, name)
        replicas = ranks if "expert_model_parallel_size" in flags else ranks[:1]
        rows = [row for rank in replicas for row in rank.log_probs]
        for ours, theirs in zip(rows, expected.log_probs, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5, err_msg=case)


def _save(
    rank: int, world_size: int, port: int, hf: Path, run_dir: Path, flags: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The weights after a step, of which a checkpoint is written."""
    config = config_for(hf, actor_num_gpus_per_node=world_size, **_OPTIMIZER, **flags)
    with trainer_for(config, run_dir, rank=rank, world_size=world_size, port=port) as trainer:
        trainer.train(share(_batch(), [np.arange(_batch().num_rows)], 2))
        trainer.save(run_dir / "ckpt", 1, {})
        if rank == 0:
            trainer.finish_save(run_dir / "ckpt", 1)
        return {name: tensor.clone() for name, tensor in trainer.named_weights()}


@pytest.mark.parametrize("case", ["qwen3_next", "gpt_oss", "deepseek_v3", "glm4"])
def test_a_checkpoint_of_two_ranks_is_read_by_one_bitwise(tmp_path: Path, case: str) -> None:
    hf = tmp_path / "model"
    save_model(case, hf)
    flags = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    saved = run_ranks(2, _save, hf, tmp_path, flags)[0]
    with trainer_for(config_for(hf, load=str(tmp_path / "ckpt"), **_OPTIMIZER), tmp_path) as trainer:
        found = {name: tensor.clone() for name, tensor in trainer.named_weights()}
    assert found.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(found[name], saved[name])] == []
