"""A mixture-of-experts model through the whole trainer: it learns, is balanced, exported, and continued bitwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from miles.trainers.megatron import MegatronTrainer

from .trainer_tools import VOCAB, config_for, make_batch, trainer_for


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts, initializer_range=0.1, pad_token_id=None))
    directory = tmp_path_factory.mktemp("qwen3_moe")
    model.float().save_pretrained(directory)
    return directory


def _weights(trainer: MegatronTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.named_weights()}


def test_a_resumed_run_of_experts_is_bitwise_the_run_that_never_stopped(tmp_path: Path, qwen3_moe: Path) -> None:
    config = config_for(qwen3_moe, lr=1e-2, rollout_engine="sglang")
    batches = [make_batch(seed=i, steps=2, micro_batches=2, rollout_id=i) for i in range(2)]
    with trainer_for(config, tmp_path, steps=4) as trainer:
        before = _weights(trainer)
        trainer.train(batches[0])
        trainer.save(tmp_path / "ckpt", 1, {})
        trainer.finish_save(tmp_path / "ckpt", 1)
        trainer.save_hf(tmp_path / "hf")
        trainer.train(batches[1])
        expected = _weights(trainer)
    moved = [name for name, tensor in expected.items() if not torch.equal(tensor, before[name])]
    assert len(moved) == len(before), "routers and experts learn"

    resumed = config_for(qwen3_moe, lr=1e-2, load=str(tmp_path / "ckpt"), rollout_engine="sglang")
    with trainer_for(resumed, tmp_path, steps=4) as trainer:
        trainer.train(batches[1])
        found = _weights(trainer)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    stacked = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()[
        "model.layers.0.mlp.experts.gate_up_proj"
    ]
    assert stacked.shape == (4, 48, 32)


def test_balance_moves_the_routers(tmp_path: Path, qwen3_moe: Path) -> None:
    routers = []
    for flags in ({}, {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1.0}):
        config = config_for(qwen3_moe, lr=1e-2, rollout_engine="sglang", **flags)
        with trainer_for(config, tmp_path, steps=1) as trainer:
            trainer.train(make_batch(micro_batches=2))
            routers.append(_weights(trainer)["model.layers.0.mlp.gate.weight"])
    assert not torch.equal(*routers)
