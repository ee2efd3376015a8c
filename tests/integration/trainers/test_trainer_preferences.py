"""Preference losses in the megatron trainer: against plain HF in float64 from the papers, and however pairs are divided."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from miles.config import Config, make_config
from miles.trainers.megatron import MegatronTrainer
from miles.types import StepTotals, TrainBatch

from .trainer_tools import VOCAB, hf_log_probs, make_hf, run_ranks, share, trainer_for

#: (prompt, chosen, rejected) tokens of each pair; the last two share their prompt's length, one answer is a single token.
_PAIRS = [(4, 5, 2), (9, 1, 7), (3, 12, 11), (3, 4, 6)]


def _config(hf: Path, **flags: Any) -> Config:
    return make_config(
        **{
            "hf_checkpoint": str(hf),
            "prompt_data": "unused.jsonl",
            "rollout_batch_size": len(_PAIRS),
            "num_rollout": 10,
            "lr": 1e-2,
            "clip_grad": 0.0,
            "adam_eps": 1e-4,
            **flags,
        }
    )


def _batch(*, steps: int = 1, judged: bool = False, seed: int = 0) -> TrainBatch:
    """Pairs with a common prompt each, or rows that are good or bad; an eighth of the response tokens masked."""
    rng = np.random.default_rng(seed)
    tokens, total, response = [], [], []
    for prompt, *answers in _PAIRS:
        asked = rng.integers(0, VOCAB, prompt)
        for length in answers:
            tokens.append(np.concatenate([asked, rng.integers(0, VOCAB, length)]))
            total.append(prompt + length)
            response.append(length)
    rows = len(total)
    loss_mask = (np.arange(sum(response)) % 8 != 3).astype(np.uint8)
    divided = np.array_split(np.arange(rows).reshape(-1, 2), steps)
    weight = np.zeros(rows, np.float32)
    for part in divided:
        weight[part.ravel()] = 1 / (part.size if judged else len(part))
    columns = {
        "total_lengths": np.array(total),
        "response_lengths": np.array(response),
        "rewards": np.zeros(rows, np.float32),
        "raw_rewards": np.zeros(rows, np.float32),
        "temperature": np.ones(rows, np.float32),
        "loss_weight": weight,
        "sample_index": np.arange(rows),
        "trajectory_id": np.arange(rows),
        "group_index": np.arange(rows) // 2,
        "preferred": ((np.arange(rows) // 3 if judged else np.arange(rows) + 1) % 2).astype(np.uint8),
    }
    if not judged:
        columns["pair"] = np.arange(rows) // 2
    batch = TrainBatch(
        rollout_id=0,
        rows=columns,
        ragged={"tokens": np.concatenate(tokens), "loss_mask": loss_mask},
        steps=tuple((part.ravel(),) for part in divided),
        totals=tuple(StepTotals(len(part), 1, part.size) for part in divided),
    )
    return dataclasses.replace(batch, mismatched=_crossed(batch)) if judged else batch


def _crossed(batch: TrainBatch) -> TrainBatch:
    """Each prompt with the response two rows on."""
    split = np.split(batch.ragged["tokens"], np.cumsum(batch.rows["total_lengths"])[:-1])
    masks = np.split(batch.ragged["loss_mask"], np.cumsum(batch.rows["response_lengths"])[:-1])
    lengths = batch.rows["response_lengths"]
    other = np.roll(np.arange(len(lengths)), -2)
    rows = [np.concatenate([split[i][: -lengths[i]], split[j][-lengths[j] :]]) for i, j in enumerate(other)]
    return dataclasses.replace(
        batch,
        rows={**batch.rows, "total_lengths": np.array(list(map(len, rows))), "response_lengths": lengths[other]},
        ragged={"tokens": np.concatenate(rows), "loss_mask": np.concatenate([masks[j] for j in other])},
    )


def _sums(model: Any, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] sums of trained log-probs, and how many there are."""
    masks = np.split(batch.ragged["loss_mask"].astype(float), np.cumsum(batch.rows["response_lengths"])[:-1])
    rows = hf_log_probs(model, batch)
    sums = torch.stack([(row * torch.from_numpy(mask)).sum() for row, mask in zip(rows, masks, strict=True)])
    return sums, torch.tensor([mask.sum() for mask in masks])


def _dpo_smoothed(s: torch.Tensor, ref: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    h = 0.3 * ((s - ref)[0::2] - (s - ref)[1::2])
    return (-0.9 * logsigmoid(h) - 0.1 * logsigmoid(-h)).mean()


def _ipo(s: torch.Tensor, ref: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    per_token = (s - ref) / n
    return (per_token[0::2] - per_token[1::2] - 1 / (2 * 0.3)).square().mean()


def _aot(s: torch.Tensor, ref: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    policy, reference = (s[0::2] - s[1::2]).sort().values, (ref[0::2] - ref[1::2]).sort().values
    return -logsigmoid(0.3 * (policy - reference)).mean()


def _bco_and_nll(s: torch.Tensor, ref: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    reward = 0.3 * (s - ref)
    delta = reward.mean().detach()
    bco = -logsigmoid(reward[0::2] - delta) - logsigmoid(delta - reward[1::2])
    return (2 * bco - 0.5 * (s / n)[0::2]).mean()


def _orpo(s: torch.Tensor, ref: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    p = (s / n).exp()
    odds = (p / (1 - p)).log()
    return (-(s / n)[0::2] - 0.3 * logsigmoid(odds[0::2] - odds[1::2])).mean()


def _simpo(s: torch.Tensor, ref: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    return -logsigmoid(0.3 * ((s / n)[0::2] - (s / n)[1::2]) - 0.7).mean()


def _cpo(s: torch.Tensor, ref: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    return (-logsigmoid(0.3 * (s[0::2] - s[1::2])) - 0.4 * (s / n)[0::2]).mean()


_Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_JOBS: dict[str, tuple[dict[str, Any], _Loss]] = {
    "dpo": ({"loss_type": "dpo", "label_smoothing": 0.1}, _dpo_smoothed),
    "ipo": ({"loss_type": "dpo", "dpo_loss_type": ("ipo",)}, _ipo),
    "aot": ({"loss_type": "dpo", "dpo_loss_type": ("aot",)}, _aot),
    "bco, nll": (
        {"loss_type": "dpo", "dpo_loss_type": ("bco_pair",), "dpo_loss_weights": (2.0,), "rpo_alpha": 0.5},
        _bco_and_nll,
    ),
    "orpo": ({"loss_type": "orpo"}, _orpo),
    "simpo": ({"loss_type": "simpo", "simpo_gamma": 0.7}, _simpo),
    "cpo": ({"loss_type": "cpo", "cpo_alpha": 0.4}, _cpo),
}


def _gradients(trainer: MegatronTrainer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in trainer._model[0].named_parameters():
        match = trainer._names.match(name)
        found |= zip(match.hf, match.layout.split([parameter.main_grad], trainer._names.shape), strict=True)
    return {name: gradient.clone() for name, gradient in found.items()}


def _with_other_reference(config: Config, reference: Path) -> Config:
    return dataclasses.replace(config, ckpt=dataclasses.replace(config.ckpt, ref_load=str(reference)))


def _train(
    rank: int, world_size: int, port: int, hf: Path, reference: Path, run_dir: Path, flags: dict[str, Any], shares: list
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and gradients of the last optimizer step. The actor is `hf`, the reference another model."""
    config = _with_other_reference(_config(hf, **flags), reference)
    with trainer_for(config, run_dir, rank=rank, world_size=world_size, port=port) as trainer:
        trainer.load_weights(str(hf))
        metrics = trainer.train(shares[rank])
        return {k: v for k, v in metrics.items() if "_time" not in k}, _gradients(trainer)


def _assert_equal_hf(model: Any, loss: torch.Tensor, found: tuple[dict[str, float], dict[str, torch.Tensor]]) -> None:
    loss.backward()
    assert found[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert (found[1][name] - parameter.grad).abs().max() <= 2e-5 * parameter.grad.abs().max(), name


@pytest.mark.parametrize("name", _JOBS)
def test_loss_and_gradient_equal_hf(tmp_path: Path, qwen3: Path, other_qwen3: Path, name: str) -> None:
    flags, reference_loss = _JOBS[name]
    batch = _batch()
    split = dataclasses.replace(batch, steps=((np.arange(4, 8), np.arange(0), np.arange(4)),))
    found = _train(0, 1, 0, qwen3, other_qwen3, tmp_path, {"beta": 0.3, **flags}, [split])
    model, reference = make_hf("qwen3").double(), make_hf("qwen3", seed=7).double()
    with torch.no_grad():
        ref, _ = _sums(reference, batch)
    s, n = _sums(model, batch)
    _assert_equal_hf(model, reference_loss(s, ref, n), found)
    assert found[0]["train/logp_chosen"] == pytest.approx(s[0::2].mean().item(), rel=1e-5)


def test_kto_equals_hf(tmp_path: Path, qwen3: Path, other_qwen3: Path) -> None:
    batch = _batch(judged=True)
    assert batch.mismatched is not None
    flags = {"loss_type": "kto", "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.8}
    found = _train(0, 1, 0, qwen3, other_qwen3, tmp_path, flags, [batch])
    model, reference = make_hf("qwen3").double(), make_hf("qwen3", seed=7).double()
    with torch.no_grad():
        ref, crossed_ref = _sums(reference, batch)[0], _sums(reference, batch.mismatched)[0]
        z = (_sums(model, batch.mismatched)[0] - crossed_ref).mean().clamp(min=0)
    ratio = _sums(model, batch)[0] - ref
    good = torch.from_numpy(batch.rows["preferred"] == 1)
    values = torch.where(good, 1.5 * (1 - (0.3 * (ratio - z)).sigmoid()), 0.8 * (1 - (0.3 * (z - ratio)).sigmoid()))
    _assert_equal_hf(model, values.mean(), found)
    assert found[0]["train/kto_baseline"] == pytest.approx(float(z), rel=1e-4, abs=1e-5)


_SPLITS: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": "dpo", "ld_alpha": 0.5},
    "coupled": {"loss_type": "dpo", "dpo_loss_type": ("aot_unpaired", "bco_pair"), "dpo_loss_weights": (1.0, 0.5)},
    "kto": {"loss_type": "kto"},
}


@pytest.mark.parametrize("name", _SPLITS)
@pytest.mark.parametrize("steps", [1, 2])
def test_two_ranks_and_any_micro_batches_equal_one(
    tmp_path: Path, qwen3: Path, other_qwen3: Path, name: str, steps: int
) -> None:
    """One rank has one pair of each step, or none; the other has the rest, each pair alone."""
    flags, judged = _SPLITS[name], name == "kto"
    batch = _batch(steps=steps, judged=judged)
    whole = _train(0, 1, 0, qwen3, other_qwen3, tmp_path, flags, [batch])
    rows = [step[0] for step in batch.steps]
    cut = [part[:0] if steps == 1 and judged else part[:2] for part in rows]
    rest = [part[len(own) :] for part, own in zip(rows, cut, strict=True)]

    count = max(len(mine) // 2 for mine in rest)

    def part(batch: TrainBatch, rows: list[np.ndarray]) -> TrainBatch:
        """Micro-batches of two rows, and empty ones up to `count`."""
        own = share(batch, rows, 1)
        steps = tuple(tuple(mine[2 * m : 2 * m + 2] for m in range(count)) for step in own.steps for mine in step)
        crossed = share(batch.mismatched, rows, 1) if batch.mismatched else None
        return dataclasses.replace(own, steps=steps, mismatched=crossed)

    first, second = run_ranks(2, _train, qwen3, other_qwen3, tmp_path, flags, [part(batch, rest), part(batch, cut)])
    assert first[0] == second[0]
    assert first[0].keys() == whole[0].keys()
    for key, value in whole[0].items():
        assert first[0][key] == pytest.approx(value, rel=1e-5, abs=2e-6), key
    for key, gradient in whole[1].items():
        assert torch.equal(first[1][key], second[1][key])
        assert (first[1][key] - gradient).norm() <= 1e-5 * gradient.norm(), key


@pytest.mark.parametrize("name", ["coupled", "kto"])
@pytest.mark.parametrize("how", ["pipeline", "context"])
def test_ranks_that_share_the_model_find_what_one_finds(
    tmp_path: Path, qwen3: Path, other_qwen3: Path, name: str, how: str
) -> None:
    batch = _batch(judged=name == "kto")
    [whole] = run_ranks(1, _train, qwen3, other_qwen3, tmp_path, _SPLITS[name], [batch])
    flags = {**_SPLITS[name], f"{how}_{'model_' * (how == 'pipeline')}parallel_size": 2, "actor_num_gpus_per_node": 2}
    for found, _ in run_ranks(2, _train, qwen3, other_qwen3, tmp_path, flags, [batch, batch]):
        assert found == pytest.approx(whole[0], rel=1e-5, abs=2e-6)


def test_evaluation_says_what_the_step_would_and_leaves_the_model_alone(
    tmp_path: Path, qwen3: Path, other_qwen3: Path
) -> None:
    config = _with_other_reference(_config(qwen3, loss_type="dpo", dpo_loss_type=("bco_pair",)), other_qwen3)
    with trainer_for(config, tmp_path) as trainer:
        trainer.load_weights(str(qwen3))
        before = {name: tensor.clone() for name, tensor in trainer.named_weights()}
        found = trainer.evaluate(_batch())
        assert all(torch.equal(before[name], tensor) for name, tensor in trainer.named_weights())
        trained = trainer.train(_batch())
    for name in ("loss", "reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected", "logp_chosen"):
        assert found[name] == pytest.approx(trained[f"train/{name}"], rel=1e-6), name
    assert "token_accuracy" not in found


def test_a_batch_may_bring_the_log_probs_of_a_reference_that_was_let_go(
    tmp_path: Path, qwen3: Path, other_qwen3: Path
) -> None:
    config = _with_other_reference(_config(qwen3, loss_type="dpo"), other_qwen3)
    batch = dataclasses.replace(_batch(), steps=((np.arange(4, 8), np.arange(4)),))
    with trainer_for(config, tmp_path) as trainer:
        trainer.load_weights(str(qwen3))
        expected = trainer.evaluate(batch)
        found = trainer.reference_log_probs(batch)
        with torch.no_grad():
            reference = torch.cat(hf_log_probs(make_hf("qwen3", seed=7), batch))
        np.testing.assert_allclose(found, reference.numpy(), atol=1e-5)
        trainer.drop_reference()
        brought = dataclasses.replace(batch, ragged={**batch.ragged, "ref_log_probs": found})
        assert trainer.evaluate(brought) == expected
