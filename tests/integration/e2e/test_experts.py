"""A whole run of a mixture-of-experts model, whose experts two trainers share and an engine has all of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from .harness import flags, train


def _model(task: Path, directory: Path) -> Path:
    """Random experts with the tokenizer of the task."""
    shutil.copytree(task / "model", directory)
    dense = json.loads((directory / "config.json").read_text())
    same = ("vocab_size", "max_position_embeddings", "eos_token_id", "bos_token_id", "pad_token_id")
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_attention_heads": 4,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    config = Qwen3MoeConfig(**{name: dense.get(name) for name in same}, **shape, **experts, num_key_value_heads=2)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.timeout(300)
def test_two_ranks_share_the_experts_of_a_run(task: Path, tmp_path: Path) -> None:
    model = _model(task, tmp_path / "model")
    shared = {"actor_num_gpus_per_node": 2, "expert_model_parallel_size": 2}
    balance = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
    export = {"save": tmp_path / "ckpt", "save_hf": tmp_path / "hf_{rollout_id}"}
    argv = flags(
        task, hf_checkpoint=model, num_rollout=2, check_weight_update_equal=True, **shared, **balance, **export
    )
    run = train([*argv, "--rm-type", "random"], tmp_path / "run").check()
    assert max(run.series("train/train_rollout_logprob_abs_diff_max")) < 1e-5
    assert min(run.series("train/grad_norm")) > 0
    [exported] = tmp_path.glob("hf_*")
    weights, before = (Qwen3MoeForCausalLM.from_pretrained(path).state_dict() for path in (exported, model))
    moved = [name for name, tensor in weights.items() if not torch.equal(tensor, before[name])]
    assert any("experts" in name for name in moved)
    assert any("mlp.gate" in name for name in moved)
