"""Families of models through the whole trainer: every weight learns, is exported, and a run is continued bitwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from miles.trainers.megatron import MegatronTrainer
from tests.unit.trainers.families import TRAINED, save_model

from .trainer_tools import config_for, make_batch, trainer_for


def _weights(trainer: MegatronTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.named_weights()}


@pytest.mark.parametrize("case", TRAINED)
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(tmp_path: Path, case: str) -> None:
    hf = tmp_path / "model"
    save_model(case, hf)
    flags = {"moe_router_bias_update_rate": 0.01} if case == "deepseek_v3" else {}
    config = config_for(hf, lr=1e-2, rollout_engine="sglang", **flags)
    batches = [make_batch(seed=i, steps=2, micro_batches=2, rollout_id=i) for i in range(2)]
    with trainer_for(config, tmp_path, steps=4) as trainer:
        before = _weights(trainer)
        trainer.train(batches[0])
        trainer.save(tmp_path / "ckpt", 1, {})
        trainer.finish_save(tmp_path / "ckpt", 1)
        trainer.save_hf(tmp_path / "exported")
        middle = _weights(trainer)
        trainer.train(batches[1])
        expected = _weights(trainer)
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert set(exported) == set(load_file(hf / "model.safetensors"))
    assert all(torch.equal(exported[name], tensor) for name, tensor in middle.items())
    still = [name for name, tensor in expected.items() if torch.equal(tensor, before[name])]
    assert not still, "every weight learns"

    resumed = config_for(hf, lr=1e-2, load=str(tmp_path / "ckpt"), rollout_engine="sglang", **flags)
    with trainer_for(resumed, tmp_path, steps=4) as trainer:
        trainer.train(batches[1])
        found = _weights(trainer)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_balance_moves_the_routers(tmp_path: Path) -> None:
    hf = tmp_path / "model"
    save_model("qwen3_moe", hf)
    routers = []
    for flags in ({}, {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1.0}):
        with trainer_for(config_for(hf, lr=1e-2, rollout_engine="sglang", **flags), tmp_path, steps=1) as trainer:
            trainer.train(make_batch(micro_batches=2))
            routers.append(_weights(trainer)["model.layers.0.mlp.gate.weight"])
    assert not torch.equal(*routers)
