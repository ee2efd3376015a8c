"""--loss-type rm in the trainer: against plain HF and torch, however pairs are divided, and through the HF export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from miles.config import Config, make_config
from miles.types import TrainBatch

from .test_trainer_preferences import _batch
from .trainer_tools import hf_rows, run_ranks, share, trainer_for


def _config(hf: Path, **flags: Any) -> Config:
    defaults = {"loss_type": "rm", "hf_checkpoint": str(hf), "prompt_data": "unused.jsonl", "num_rollout": 10}
    defaults |= {"rollout_batch_size": 4, "lr": 1e-2, "clip_grad": 0.0, "adam_eps": 1e-4, "weight_decay": 0.0}
    return make_config(**{**defaults, **flags})


def _with_margins(batch: TrainBatch) -> TrainBatch:
    margin = np.repeat(np.array([0.0, 0.5, 1.0, 0.2], np.float32), 2)
    return dataclasses.replace(batch, rows={**batch.rows, "margin": margin})


def _hf_scores(model: Any, batch: TrainBatch) -> torch.Tensor:
    """Of each row alone: transformers takes the last token where there is no padding token."""
    return torch.stack([model(tokens[None]).logits[0, 0] for tokens, _ in hf_rows(batch)])


@pytest.mark.parametrize("center", [0.0, 0.3])
def test_steps_equal_hf_and_the_export_scores_the_same(tmp_path: Path, qwen3: Path, center: float) -> None:
    batch = _with_margins(_batch())
    model = AutoModelForSequenceClassification.from_pretrained(qwen3, num_labels=1).train()
    torch.nn.init.zeros_(model.score.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98), eps=1e-4, weight_decay=0.0)
    losses, accuracies = [], []
    for _ in range(3):
        scores = _hf_scores(model, batch)
        chosen, rejected = (scores[torch.from_numpy(batch.rows["preferred"]) == kind] for kind in (1, 0))
        margin = torch.from_numpy(batch.rows["margin"][batch.rows["preferred"] == 1])
        loss = (-logsigmoid(chosen - rejected - margin) + center * (chosen + rejected) ** 2).mean()
        accuracies.append(((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with trainer_for(_config(qwen3, center_rewards_coefficient=center), tmp_path) as trainer:
        made = [trainer.train(batch) for _ in range(3)]
        evaluated = trainer.evaluate(batch)
        trainer.save_hf(tmp_path / "out")
        trainer.save(tmp_path / "ckpt", 1)
        trainer.finish_save(tmp_path / "ckpt", 1)
    assert [m["train/loss"] for m in made] == pytest.approx(losses, rel=1e-4)
    assert [m["train/reward_accuracy"] for m in made] == pytest.approx(accuracies)
    assert accuracies[0] == 0.5, "a head of zeros tells nothing apart"
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert exported.config.num_labels == 1
    with torch.no_grad():
        expected, found = _hf_scores(model, batch), _hf_scores(exported, batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    chosen = found[torch.from_numpy(batch.rows["preferred"]) == 1]
    assert evaluated["reward_chosen"] == pytest.approx(chosen.mean().item(), abs=1e-5)
    # A reward model may be gone on with, from its export and from its checkpoint.
    for source in (tmp_path / "out", tmp_path / "ckpt"):
        with trainer_for(_config(qwen3, ref_load=str(source), center_rewards_coefficient=center), tmp_path) as trainer:
            assert trainer.evaluate(batch) == pytest.approx(evaluated, abs=1e-6)


def _train(
    rank: int, world_size: int, port: int, hf: Path, run_dir: Path, shares: list[TrainBatch]
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    config = _config(hf, center_rewards_coefficient=0.1)
    with trainer_for(config, run_dir, rank=rank, world_size=world_size, port=port) as trainer:
        metrics = [trainer.train(shares[rank]) for _ in range(3)]
        return metrics, {name: tensor.clone() for name, tensor in trainer.named_weights()}


def test_however_pairs_are_divided_the_step_is_the_same(tmp_path: Path, qwen3: Path) -> None:
    batch = _with_margins(_batch())
    whole = _train(0, 1, 0, qwen3, tmp_path, [batch])
    [rows] = batch.steps[0]
    split = dataclasses.replace(batch, steps=(tuple(np.split(rows, [2, 4, 4])),))
    shares = [share(batch, [rows[2:]], 1), share(batch, [rows[:2]], 1)]
    others = [_train(0, 1, 0, qwen3, tmp_path, [split]), run_ranks(2, _train, qwen3, tmp_path, shares)[0]]
    for metrics, weights in others:
        for a, b in zip(whole[0], metrics, strict=True):
            for name in (name for name in a if not name.endswith("_time")):
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
        for name, tensor in whole[1].items():
            assert (tensor - weights[name]).norm() <= 1e-4 * tensor.norm(), name
