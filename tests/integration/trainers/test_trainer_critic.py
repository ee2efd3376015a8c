"""PPO's critic in the trainer: values, returns and updates against plain HF and torch, splits, checkpoints, its flags."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from miles.errors import CheckpointError, NonFiniteError
from miles.trainers.megatron import MegatronTrainer
from miles.types import TrainBatch

from .trainer_tools import config_for, hf_log_probs, hf_rows, make_batch, run_ranks, share, trainer_for

_SGD: dict[str, Any] = {"optimizer": "sgd", "clip_grad": 0.0, "weight_decay": 0.0}
_PPO: dict[str, Any] = {"advantage_estimator": "ppo", "gamma": 0.97, "lambd": 0.9, "kl_coef": 0.05}


@pytest.fixture(scope="module")
def scalar_hf(tmp_path_factory: pytest.TempPathFactory, other_qwen3: Path) -> Path:
    """A sequence-classification directory: other weights than the actor's, and a head that is not zero."""
    path = tmp_path_factory.mktemp("scalar")
    weights = {k: v for k, v in load_file(other_qwen3 / "model.safetensors").items() if k != "lm_head.weight"}
    weights["score.weight"] = 0.3 * torch.randn(1, 48, generator=torch.Generator().manual_seed(3))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((other_qwen3 / "config.json").read_text())
    config |= {
        "architectures": ["Qwen3ForSequenceClassification"],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def _hf_values(model: Any, batch: TrainBatch) -> list[torch.Tensor]:
    """The head at the token before each response token, of each row by itself, with gradient."""
    found = []
    for tokens, response in hf_rows(batch):
        hidden = model.model(tokens[None]).last_hidden_state[0, -response - 1 : -1]
        found.append(model.score(hidden).squeeze(1))
    return found


def _gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lambd: float) -> tuple[np.ndarray, np.ndarray]:
    advantages, later = np.zeros(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        following = values[t + 1] if t + 1 < len(rewards) else 0.0
        later = rewards[t] + gamma * following - values[t] + gamma * lambd * later
        advantages[t] = later
    return advantages, advantages + values


def _weights(trainer: MegatronTrainer) -> dict[str, torch.Tensor]:
    critic = {} if trainer._critic is None else dict(trainer._critic._weights.stream())
    named = {**{f"critic.{k}": v for k, v in critic.items()}, **dict(trainer.named_weights())}
    return {name: tensor.clone() for name, tensor in named.items()}


def test_a_rollout_equals_hf_and_torch(tmp_path: Path, qwen3: Path, other_qwen3: Path, scalar_hf: Path) -> None:
    """Two steps of SGD with momentum, of critic and actor: KL in the reward, GAE over trained tokens, whitening, clipped value loss."""
    batch = make_batch(steps=2, micro_batches=2, temperature=0.7)
    critic = AutoModelForSequenceClassification.from_pretrained(scalar_hf).train()
    actor = AutoModelForCausalLM.from_pretrained(qwen3).train()
    reference = AutoModelForCausalLM.from_pretrained(other_qwen3)
    lengths = np.cumsum(batch.rows["response_lengths"])[:-1]
    masks = [m != 0 for m in np.split(batch.ragged["loss_mask"], lengths)]
    with torch.no_grad():
        old_values = [v.double().numpy() for v in _hf_values(critic, batch)]
        kl = [
            (a - b).double().numpy()
            for a, b in zip(hf_log_probs(actor, batch), hf_log_probs(reference, batch), strict=True)
        ]
        old = hf_log_probs(actor, batch)
    advantages, returns = [], []
    for row, mask in enumerate(masks):
        rewards = -0.05 * kl[row][mask]
        if len(rewards):
            rewards[-1] += batch.rows["rewards"][row]
        for column, found in zip((advantages, returns), _gae(rewards, old_values[row][mask], 0.97, 0.9), strict=True):
            whole = np.zeros(len(mask))
            whole[mask] = found
            column.append(whole)
    trained = np.concatenate(masks)
    flat = np.concatenate(advantages)[trained]
    whitened = [(a - flat.mean()) / (flat.std() + 1e-8) * m for a, m in zip(advantages, masks, strict=True)]

    rates = {"critic": 0.005, "actor": 0.02}
    optimizers = {
        "critic": torch.optim.SGD(critic.parameters(), lr=rates["critic"], momentum=0.9),
        "actor": torch.optim.SGD(actor.parameters(), lr=rates["actor"], momentum=0.9),
    }
    losses, held = [], []
    for step in batch.steps:
        value_loss = policy_loss = torch.zeros(())
        clipped = 0.0
        now_values, now = _hf_values(critic, batch), hf_log_probs(actor, batch)
        for row in np.concatenate(step):
            weight = torch.from_numpy(masks[row] * batch.rows["loss_weight"][row]).float()
            target, before = torch.from_numpy(returns[row]).float(), torch.from_numpy(old_values[row]).float()
            plain = (now_values[row] - target) ** 2
            near = (before + (now_values[row] - before).clamp(-0.01, 0.01) - target) ** 2
            value_loss = value_loss + (weight * 0.5 * torch.maximum(plain, near)).sum()
            clipped += float((weight * (near > plain)).sum())
            ratio = (now[row] - old[row].detach()).exp()
            advantage = torch.from_numpy(whitened[row]).float()
            surrogate = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            policy_loss = policy_loss + (weight * surrogate).sum()
        for name, loss in (("critic", value_loss), ("actor", policy_loss)):
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
        losses.append(value_loss.item())
        held.append(clipped)
    assert held[1] > 0.05, "the clip is at work"

    flags = {**_SGD, **_PPO, "lr": rates["actor"], "critic_lr": rates["critic"], "value_clip": 0.01}
    config = config_for(qwen3, ref_load=str(other_qwen3), critic_load=str(scalar_hf), load=None, **flags)
    with trainer_for(config, tmp_path) as trainer:
        trainer._weights.load(qwen3)  # the actor is not the reference
        trainer._actor.optimizer.reload_model_params()
        metrics = trainer.train(batch)
        ours = _weights(trainer)
    flat_returns, flat_values = np.concatenate(returns)[trained], np.concatenate(old_values)[trained]
    assert metrics["train/value_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["train/value_clipfrac"] == pytest.approx(np.mean(held), abs=1e-4)
    assert metrics["train/value"] == pytest.approx(flat_values.mean(), rel=1e-5)
    assert metrics["train/return"] == pytest.approx(flat_returns.mean(), rel=1e-5)
    explained = 1 - (flat_returns - flat_values).var() / flat_returns.var()
    assert metrics["train/explained_variance"] == pytest.approx(explained, rel=1e-4)
    for name, tensor in [*((f"critic.{k}", v) for k, v in critic.state_dict().items()), *actor.state_dict().items()]:
        torch.testing.assert_close(ours[name], tensor, atol=2e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def _train(
    rank: int, world_size: int, port: int, hf: Path, run_dir: Path, flags: dict[str, Any], shares: list[TrainBatch]
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    with trainer_for(config_for(hf, **flags), run_dir, rank=rank, world_size=world_size, port=port) as trainer:
        metrics = [trainer.train(shares[rank]) for _ in range(2)]
        return metrics, _weights(trainer)


@pytest.mark.parametrize("kind", ["uneven", "a rank without rows"])
def test_two_ranks_equal_one(tmp_path: Path, qwen3: Path, scalar_hf: Path, kind: str) -> None:
    batch = make_batch(steps=2)
    flags = {**_PPO, "lr": 1e-2, "critic_lr": 3e-3, "adam_eps": 1e-4, "critic_load": str(scalar_hf)}
    whole = _train(0, 1, 0, qwen3, tmp_path, flags, [batch])
    rows = [step[0] for step in batch.steps]
    at = 1 if kind == "uneven" else 0
    shares = [share(batch, [part[at:] for part in rows], 2), share(batch, [part[:at] for part in rows], 2)]
    first, second = run_ranks(2, _train, qwen3, tmp_path, flags, shares)
    for a, b, one in zip(first[0], second[0], whole[0], strict=True):
        names = {name for name in one if not name.endswith("_time")}
        assert "train/value_loss" in names
        assert {n: a[n] for n in names} == {n: b[n] for n in names}
        for name in names:
            assert a[name] == pytest.approx(one[name], rel=2e-5, abs=5e-6), name
    for name, tensor in whole[1].items():
        assert torch.equal(first[1][name], second[1][name]), name
        assert (tensor - first[1][name]).norm() <= 2e-5 * tensor.norm(), name


def test_a_continued_run_is_the_same_bit_for_bit(tmp_path: Path, qwen3: Path) -> None:
    flags = {**_PPO, "lr": 1e-3, "critic_lr_warmup_iters": 3, "lr_decay_style": "linear", "num_critic_only_steps": 1}
    batches = [make_batch(seed=number, rollout_id=number) for number in range(4)]
    with trainer_for(config_for(qwen3, **flags), tmp_path) as trainer:
        whole = [trainer.train(batch) for batch in batches]
        expected = _weights(trainer)
    with trainer_for(config_for(qwen3, **flags), tmp_path) as trainer:
        for batch in batches[:2]:
            trainer.train(batch)
        trainer.save(tmp_path / "ckpt", 2)
        trainer.finish_save(tmp_path / "ckpt", 2)
    with trainer_for(config_for(qwen3, load=str(tmp_path / "ckpt"), **flags), tmp_path) as trainer:
        rest = [trainer.train(batch) for batch in batches[2:]]
        for name, tensor in _weights(trainer).items():
            assert torch.equal(tensor, expected[name]), name
    for a, b in zip(whole[2:], rest, strict=True):
        assert {k: v for k, v in a.items() if "_time" not in k} == {k: v for k, v in b.items() if "_time" not in k}
    assert [line["train/critic_lr"] for line in whole] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3])


def test_rollouts_of_the_critic_alone_leave_the_actor(tmp_path: Path, qwen3: Path) -> None:
    with trainer_for(config_for(qwen3, num_critic_only_steps=2, lr=1e-3, **_PPO), tmp_path) as trainer:
        start = _weights(trainer)
        for number in range(2):
            metrics = trainer.train(make_batch(rollout_id=number))
            assert metrics["train/value_loss"] > 0
            assert "train/pg_loss" not in metrics
            assert trainer.global_step == 0
        moved = {name for name, tensor in _weights(trainer).items() if not torch.equal(tensor, start[name])}
        assert moved
        assert all(name.startswith("critic.") for name in moved)
        assert trainer.train(make_batch(rollout_id=2))["train/global_step"] == 1


def test_a_critic_from_a_language_model_begins_with_values_of_zero(tmp_path: Path, qwen3: Path) -> None:
    with trainer_for(config_for(qwen3, lr=1e-3, **{**_PPO, "kl_coef": 0.0}), tmp_path) as trainer:
        start = _weights(trainer)
        metrics = trainer.train(make_batch())
        assert metrics["train/value"] == 0
        assert metrics["train/explained_variance"] == pytest.approx(0)
        assert not start["critic.score.weight"].any()
        for name in start:
            if name.startswith("critic.model."):
                assert torch.equal(start[name], start[name.removeprefix("critic.")]), name


def test_critic_save_is_what_critic_load_and_transformers_read(tmp_path: Path, qwen3: Path) -> None:
    flags = {**_PPO, "lr": 1e-3, "critic_load": str(tmp_path / "critic"), "save": str(tmp_path / "ckpt")}
    flags["critic_save"] = flags["critic_load"]  # not there yet
    batch = make_batch()
    with trainer_for(config_for(qwen3, **flags), tmp_path) as trainer:
        trainer.train(batch)
        trainer.save(tmp_path / "ckpt", 1)
        trainer.finish_save(tmp_path / "ckpt", 1)
        expected = _weights(trainer)
    sources = [tmp_path / "critic", tmp_path / "ckpt", tmp_path / "ckpt" / "iter_0000001"]
    for source in sources:
        with trainer_for(
            config_for(qwen3, **{**flags, "critic_load": str(source), "critic_save": None}), tmp_path
        ) as other:
            got = _weights(other)
            assert got["critic.score.weight"].any()
            assert all(torch.equal(got[n], expected[n]) for n in got if n.startswith("critic.")), source
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    assert model.config.num_labels == 1
    tokens = hf_rows(batch)[0][0]
    with torch.no_grad():
        score = model(tokens[None]).logits[0, 0]
        hidden = model.model(tokens[None]).last_hidden_state[0, -1]
    torch.testing.assert_close(score, hidden @ expected["critic.score.weight"][0])


def test_a_checkpoint_without_a_critic(tmp_path: Path, qwen3: Path) -> None:
    """It starts one, with a head of zeros, and cannot be continued by PPO."""
    with trainer_for(config_for(qwen3), tmp_path) as trainer:
        trainer.save(tmp_path / "ckpt", 1)
        trainer.finish_save(tmp_path / "ckpt", 1)
    series = str(tmp_path / "ckpt")
    with trainer_for(config_for(qwen3, critic_load=series, **_PPO), tmp_path) as trainer:
        assert not _weights(trainer)["critic.score.weight"].any()
    with (
        pytest.raises(CheckpointError, match="got no critic: a run without one wrote it; start from its weights"),
        trainer_for(config_for(qwen3, load=series, **_PPO), tmp_path),
    ):
        pass


def test_a_value_that_is_no_number_stops_before_anything_moves(tmp_path: Path, qwen3: Path) -> None:
    batch = make_batch()
    rewards = batch.rows["rewards"].copy()
    rewards[0] = np.inf
    batch = dataclasses.replace(batch, rows={**batch.rows, "rewards": rewards})
    with trainer_for(config_for(qwen3, **_PPO), tmp_path) as trainer:
        start = _weights(trainer)
        with pytest.raises(NonFiniteError, match="critic's optimizer step 0 of rollout 0, got loss"):
            trainer.train(batch)
        assert all(torch.equal(tensor, start[name]) for name, tensor in _weights(trainer).items())
