"""The megatron trainer against plain HF: log-probs, gradients, optimizer steps, exported weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from miles.errors import CheckpointError, ConfigError
from miles.trainers.megatron import MegatronTrainer
from miles.trainers.megatron.layers import PackedLayer
from miles.types import TrainBatch

from .trainer_tools import (
    config_for,
    hf_log_probs,
    make_batch,
    make_hf,
    save_hf_model,
    trainer_for,
    with_rollout_log_probs,
)


@pytest.mark.parametrize(("kind", "tied"), [("qwen3", True), ("qwen3", False), ("qwen2", True), ("llama", False)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_hf(tmp_path: Path, kind: str, tied: bool, temperature: float, monkeypatch) -> None:
    hf = make_hf(kind, tied=tied)
    hf.save_pretrained(tmp_path / "hf")
    batch = make_batch(temperature=temperature, micro_batches=3)
    with torch.no_grad():
        expected = hf_log_probs(hf, batch)
    live: list[int] = []
    softmax = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda x, dim: live.append(x.shape[0]) or softmax(x, dim))  # type: ignore[func-returns-value]
    with trainer_for(config_for(tmp_path / "hf", log_probs_chunk_size=7), tmp_path) as trainer:
        for ours, theirs in zip(trainer.log_probs(batch), expected, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
    assert max(live) == 7


@pytest.mark.parametrize(
    ("kind", "micro_batches", "in_pieces"),
    [("qwen3", 1, True), ("qwen3", 2, True), ("qwen3", 2, False), ("qwen2", 2, True), ("qwen2", 1, False)],
)
def test_groups_that_share_their_prompt_equal_hf(
    tmp_path: Path, kind: str, micro_batches: int, in_pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs, and a step's gradient through the exported weights; one row alone, one of one response token.

    Not in pieces is what runs on a GPU and under tensor parallelism: megatron's parts, with our attention.
    """
    decide, taken = PackedLayer._in_pieces, []
    monkeypatch.setattr(PackedLayer, "_in_pieces", lambda *args: taken.append(in_pieces and decide(*args)) or taken[-1])
    path = save_hf_model(tmp_path / "hf", kind)
    rows = [(12 + n, n) for n in (5, 1, 9, 5)] + [(20, 4)] + [(7 + n, n) for n in (3, 3, 2)]
    batch = make_batch(rows, micro_batches=micro_batches, temperature=0.7)
    parts = np.split(batch.ragged["tokens"], np.cumsum([total for total, _ in rows])[:-1])
    for first, others in ((0, (1, 2, 3)), (5, (6, 7))):
        prompt = rows[first][0] - rows[first][1]
        for other in others:
            parts[other][:prompt] = parts[first][:prompt]
    model = AutoModelForCausalLM.from_pretrained(path).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = hf_log_probs(model, batch)
    weights = batch.rows["loss_weight"] * batch.rows["rewards"]
    masks = np.split(batch.ragged["loss_mask"].astype(np.float32), np.cumsum([n for _, n in rows])[:-1])
    loss = -sum(
        (row * torch.from_numpy(mask)).sum() * float(weight)
        for row, mask, weight in zip(expected, masks, weights, strict=True)
    )
    loss.backward()
    optimizer.step()
    flags = {"optimizer": "sgd", "lr": 0.1, "clip_grad": 0.0, "weight_decay": 0.0}
    with trainer_for(config_for(path, **flags), tmp_path) as trainer:
        for ours, theirs in zip(trainer.log_probs(batch), expected, strict=True):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5)
        trainer.train(batch)
        exported = {name: tensor.clone() for name, tensor in trainer.named_weights()}
    assert set(taken) == {in_pieces}
    for name, tensor in model.state_dict().items():
        if name in exported:
            torch.testing.assert_close(exported[name], tensor, atol=1e-6, rtol=1e-5)


def test_greedy_rows_count_as_temperature_one(tmp_path: Path, qwen3: Path) -> None:
    with trainer_for(config_for(qwen3), tmp_path) as trainer:
        greedy = trainer.log_probs(make_batch(temperature=0.0))
        for a, b in zip(greedy, trainer.log_probs(make_batch(temperature=1.0)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("kind", "tied"), [("qwen3", True), ("qwen3", False), ("qwen2", False), ("llama", True)])
def test_weights_go_through_megatron_bit_for_bit(tmp_path: Path, kind: str, tied: bool) -> None:
    hf = make_hf(kind, tied=tied)
    hf.save_pretrained(tmp_path / "hf")
    with trainer_for(config_for(tmp_path / "hf"), tmp_path) as trainer:
        sent = {name: tensor.clone() for name, tensor in trainer.named_weights()}
    on_disk = load_file(tmp_path / "hf" / "model.safetensors")
    assert sent.keys() == on_disk.keys()
    assert all(torch.equal(sent[name], on_disk[name]) for name in sent)


def test_exported_model_loads_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = make_hf("qwen3", tied=True)
    hf.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("miles.trainers.megatron.hf_files.MAX_SHARD_BYTES", 40_000)
    with trainer_for(config_for(tmp_path / "hf"), tmp_path) as trainer:
        trainer.train(make_batch())
        trainer.save_hf(tmp_path / "out")
        batch = make_batch(seed=3)
        ours = trainer.log_probs(batch)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out.tmp").exists()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert reloaded.dtype == torch.float32
    with torch.no_grad():
        for a, b in zip(ours, hf_log_probs(reloaded, batch), strict=True):
            np.testing.assert_allclose(a, b.numpy(), atol=1e-5)


@pytest.mark.parametrize(("kind", "tied"), [("qwen3", True), ("qwen2", False)])
def test_five_steps_equal_hf_with_stale_log_probs(tmp_path: Path, kind: str, tied: bool) -> None:
    """Unequal lengths, ratios of 0.7 to 1.4, clipping, KL, entropy bonus, clipped gradients, decoupled decay, warm-up."""
    hf = make_hf(kind, tied=tied)
    hf.save_pretrained(tmp_path / "hf")
    batch = make_batch(temperature=0.7, micro_batches=3)
    stale = _stale(hf, batch)
    reference = make_hf(kind, tied=tied, seed=5)
    reference.save_pretrained(tmp_path / "ref")
    with torch.no_grad():
        lp_ref = torch.cat(hf_log_probs(reference, batch))
    batch = with_rollout_log_probs(batch, stale)
    flags: dict[str, Any] = {
        "ref_load": str(tmp_path / "ref"),
        "use_rollout_logprobs": True,
        "use_kl_loss": True,
        "kl_loss_coef": 0.1,
        "kl_loss_type": "k3",
        "entropy_coef": 0.05,
        "eps_clip": 0.2,
        "eps_clip_high": 0.28,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "lr_decay_style": "cosine",
        "lr_warmup_iters": 2,
        "weight_decay": 0.1,
        "clip_grad": 0.3,
        "log_probs_chunk_size": 16,
    }
    config = config_for(tmp_path / "hf", **flags)
    with trainer_for(config, tmp_path, steps=10) as trainer:
        trainer.load_weights(str(tmp_path / "hf"))  # --ref-load is also where the actor starts
        ours = [trainer.train(batch) for _ in range(5)]
        weights = {name: tensor.clone() for name, tensor in trainer.named_weights()}

    decayed = [p for p in hf.parameters() if p.ndim > 1]
    plain = [p for p in hf.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98), eps=1e-8
    )
    old = torch.from_numpy(np.concatenate(stale))
    ratios = []
    for step, metrics in enumerate(ours):
        # Megatron: linear from 0 over 2 steps, then cosine from step 2 to 10.
        rate = 1e-3 * step / 2 if step <= 2 else 1e-4 + 0.5 * 9e-4 * (1 + np.cos(np.pi * (step - 2) / 8))
        for group in adam.param_groups:
            group["lr"] = rate
        adam.zero_grad()
        loss, ratio = _reference_loss(hf, batch, old, lp_ref)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), 0.3)
        adam.step()
        ratios.append(ratio)
        assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
        assert metrics["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert metrics["train/lr"] == pytest.approx(rate, rel=1e-9)
    assert ratios[0].min() < 0.75
    assert ratios[0].max() > 1.35
    for name, tensor in hf.state_dict().items():
        if name in weights:
            # Adam divides rounding noise of near-zero gradients by itself, so single entries may differ by more.
            assert (weights[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


@pytest.mark.parametrize(("kind", "tied"), [("qwen3", True), ("qwen2", False), ("llama", False)])
@pytest.mark.parametrize("chunk", [-1, 16])
def test_gradients_equal_hf(tmp_path: Path, kind: str, tied: bool, chunk: int) -> None:
    hf = make_hf(kind, tied=tied)
    hf.save_pretrained(tmp_path / "hf")
    batch = make_batch(temperature=0.7, micro_batches=2)
    stale = _stale(hf, batch)
    with torch.no_grad():
        reference = torch.cat(hf_log_probs(hf, batch))
    config = config_for(
        tmp_path / "hf",
        use_rollout_logprobs=True,
        use_kl_loss=True,
        kl_loss_coef=0.1,
        kl_loss_type="k3",
        entropy_coef=0.05,
        eps_clip_high=0.28,
        clip_grad=0.0,
        log_probs_chunk_size=chunk,
    )
    with trainer_for(config, tmp_path) as trainer:
        trainer.train(with_rollout_log_probs(batch, stale))
        ours = dict(_hf_named_gradients(trainer))
    _reference_loss(hf, batch, torch.from_numpy(np.concatenate(stale)), reference)[0].backward()
    assert ours.keys() == {name for name, _ in hf.named_parameters()}
    for name, parameter in hf.named_parameters():
        assert parameter.grad is not None
        assert (ours[name] - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max(), name


def _hf_named_gradients(trainer: MegatronTrainer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in trainer._model[0].named_parameters():
        match = trainer._names.match(name)
        yield from zip(match.hf, match.layout.split([parameter.main_grad], trainer._names.shape), strict=True)


def _stale(hf: PreTrainedModel, batch: TrainBatch) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    with torch.no_grad():
        return [
            (row.numpy() - np.log(rng.uniform(0.7, 1.4, len(row)))).astype(np.float32)
            for row in hf_log_probs(hf, batch)
        ]


def _reference_loss(
    hf: PreTrainedModel, batch: TrainBatch, old: torch.Tensor, ref: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the flags above, from the papers, one row at a time."""
    rows, entropies = [], []
    tokens_at = 0
    for total, response, temperature in zip(
        batch.rows["total_lengths"], batch.rows["response_lengths"], batch.rows["temperature"], strict=True
    ):
        tokens = torch.from_numpy(batch.ragged["tokens"][tokens_at : tokens_at + total])
        tokens_at += total
        table = torch.log_softmax(hf(tokens[None]).logits[0, -response - 1 : -1] / float(temperature), -1)
        rows.append(table.gather(1, tokens[-response:, None]).squeeze(1))
        entropies.append(-(table.exp() * table).sum(-1))
    new, entropy = torch.cat(rows), torch.cat(entropies)
    of_row = np.repeat(np.arange(batch.num_rows), batch.rows["response_lengths"])
    advantage = torch.from_numpy(batch.rows["rewards"][of_row])
    weight = torch.from_numpy(batch.rows["loss_weight"][of_row] * batch.ragged["loss_mask"])
    ratio = (new - old).exp()
    policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    gap = ref - new
    kl = gap.exp() - 1 - gap
    return (weight * (policy + 0.1 * kl - 0.05 * entropy)).sum(), ratio.detach()


def test_reference_pass_leaves_the_actor_alone_and_reports_the_kl(
    tmp_path: Path, qwen3: Path, other_qwen3: Path
) -> None:
    config = config_for(qwen3, use_kl_loss=True, kl_loss_coef=0.0, kl_loss_type="k1")
    batch = make_batch(masked=0.0)
    with trainer_for(config, tmp_path) as trainer:
        same = trainer.train(batch)
        assert same["train/kl_loss"] == pytest.approx(0.0, abs=1e-7)
        assert same["perf/ref_log_probs_time"] > 0
    config = dataclasses.replace(config, ckpt=dataclasses.replace(config.ckpt, ref_load=str(other_qwen3)))
    with trainer_for(config, tmp_path) as trainer:
        trainer.load_weights(str(qwen3))
        before = {name: tensor.clone() for name, tensor in trainer.named_weights()}
        with trainer._reference.awake():
            asleep = {name: tensor.clone() for name, tensor in trainer.named_weights()}
        after = dict(trainer.named_weights())
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not torch.equal(asleep["model.norm.weight"], after["model.norm.weight"])
        logged = trainer.train(batch)["train/kl_loss"]
    with torch.no_grad():
        actor = torch.cat(hf_log_probs(make_hf("qwen3"), batch))
        reference = torch.cat(hf_log_probs(make_hf("qwen3", seed=7), batch))
    assert logged == pytest.approx((actor - reference).mean().item(), rel=1e-4)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path: Path, qwen3: Path) -> None:
    save_hf_model(tmp_path / "other", "qwen2")
    weights = load_file(qwen3 / "model.safetensors")
    for name, changed in (
        ("few", {k: v for k, v in weights.items() if "k_norm" not in k}),
        ("many", {**weights, "model.extra.weight": torch.zeros(1)}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((qwen3 / "config.json").read_text())
        save_file(changed, tmp_path / name / "model.safetensors")
    with trainer_for(config_for(qwen3), tmp_path) as trainer:
        with pytest.raises(CheckpointError, match=r"o_proj\.weight of shape \[\(48, 48\)\].*\(48, 64\)"):
            trainer.load_weights(str(tmp_path / "other"))
        with pytest.raises(CheckpointError, match=r"no tensor .*k_norm\.weight"):
            trainer.load_weights(str(tmp_path / "few"))
        with pytest.raises(CheckpointError, match=r"model\.extra\.weight"):
            trainer.load_weights(str(tmp_path / "many"))
        with pytest.raises(CheckpointError, match=r"neither config\.json nor"):
            trainer.load_weights(str(tmp_path))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text((qwen3 / "config.json").read_text())
    (tmp_path / "torn" / "model.safetensors").write_bytes((qwen3 / "model.safetensors").read_bytes()[:1000])
    with (
        trainer_for(config_for(qwen3), tmp_path) as trainer,
        pytest.raises(CheckpointError, match=r"model\.safetensors"),
    ):
        trainer.load_weights(str(tmp_path / "torn"))


def test_an_unknown_kind_of_model_names_the_known_ones(tmp_path: Path, qwen3: Path) -> None:
    with pytest.raises(ConfigError, match="qwen3"), trainer_for(config_for(qwen3, model_name="qwen9"), tmp_path):
        pass
