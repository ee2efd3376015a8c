"""Every way of sharing a model over ranks trains as plain HF does: log-probs, losses, gradient norms, weights after five steps.

Real processes and gloo, through the trainer that a run uses; packed rows of unequal lengths, stale log-probs with ratios from
0.7 to 1.4, fp32. AdamW with lr 1e-3, betas 0.9 and 0.98, eps 1e-5 and weight decay 0.1 on matrices, gradients clipped to 0.5.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from miles.config.parallel import parallel_sizes
from miles.trainers.megatron.layers import PackedLayer
from miles.types import TrainBatch

from .trainer_tools import (
    config_for,
    hf_log_probs,
    make_batch,
    make_hf,
    run_ranks,
    share,
    trainer_for,
    with_rollout_log_probs,
)

_STEPS = 5
_OPTIMIZER: dict[str, Any] = {"lr": 1e-3, "adam_eps": 1e-5, "weight_decay": 0.1, "clip_grad": 0.5}
_FLAGS: dict[str, Any] = {**_OPTIMIZER, "use_rollout_logprobs": True, "eps_clip": 0.2, "log_probs_chunk_size": 16}
_LENGTHS = [(5, 2), (9, 4), (30, 20), (17, 16), (12, 5), (3, 1), (41, 25), (9, 4)]


class Trained(NamedTuple):
    """What a way of training came to."""

    log_probs: list[np.ndarray]
    """Of the rows of the first batch, before the first step."""
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    metrics: list[dict[str, float]] = []  # noqa: RUF012


class Plain(NamedTuple):
    """A model on disk, what to train it on, and how HF does."""

    path: Path
    batches: list[TrainBatch]
    trained: Trained


@functools.cache
def _plain(root: Path, kind: str) -> Plain:
    tied = kind == "tied"
    model = make_hf("qwen3_moe" if kind == "experts" else "qwen3", tied=tied, num_hidden_layers=4)
    path = root / f"hf-{kind}"
    model.save_pretrained(path)
    rng = np.random.default_rng(0)
    batches = []
    for seed in range(_STEPS):
        batch = make_batch(_LENGTHS, seed=seed, temperature=0.8)
        with torch.no_grad():
            rows = [row.numpy() - np.log(rng.uniform(0.7, 1.4, len(row))) for row in hf_log_probs(model, batch)]
        batches.append(with_rollout_log_probs(batch, rows))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-5)
    found = Trained([], [], [], {})
    for batch in batches:
        optimizer.zero_grad()
        log_probs = hf_log_probs(model, batch)
        if not found.log_probs:
            found.log_probs.extend(row.detach().numpy() for row in log_probs)
        loss = _clipped_loss(torch.cat(log_probs), batch)
        loss.backward()
        found.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        found.losses.append(float(loss))
        optimizer.step()
    model.save_pretrained(root / f"trained-{kind}")
    found.weights.update(load_file(root / f"trained-{kind}" / "model.safetensors"))
    return Plain(path, batches, found)


def _clipped_loss(log_probs: torch.Tensor, batch: TrainBatch) -> torch.Tensor:
    """`-sum w m min(r A, clip(r, 0.8, 1.2) A)`, arXiv 1707.06347."""
    row = np.repeat(np.arange(batch.num_rows), batch.rows["response_lengths"])
    ratio = (log_probs - torch.from_numpy(batch.ragged["rollout_log_probs"])).exp()
    advantage = torch.from_numpy(batch.rows["rewards"][row])
    weight = torch.from_numpy(batch.rows["loss_weight"][row] * batch.ragged["loss_mask"])
    return -(weight * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)).sum()


def _train(
    rank: int, world_size: int, port: int, hf: Path, run_dir: Path, flags: dict[str, Any], batches: list[TrainBatch]
) -> Trained:
    config = config_for(hf, **flags)
    sizes = parallel_sizes(config)
    replicas, mine = sizes.data_size(world_size), sizes.data_rank(rank, world_size)
    # Uneven on purpose.
    cuts = [0, *(len(_LENGTHS) * (2 * n + 1) // (2 * replicas) for n in range(replicas - 1)), len(_LENGTHS)]
    rows = np.arange(cuts[mine], cuts[mine + 1])
    shares = [share(batch, [rows], 2 * sizes.micro_batch_multiple) for batch in batches]
    with trainer_for(config, run_dir, rank=rank, world_size=world_size, port=port) as trainer:
        log_probs = trainer.log_probs(shares[0])
        metrics = [trainer.train(batch) for batch in shares]
        weights = {name: tensor.clone() for name, tensor in trainer.named_weights()}
    return Trained(
        log_probs,
        [m["train/loss"] for m in metrics],
        [m["train/grad_norm"] for m in metrics],
        weights if rank in (0, world_size - 1) else {},
        metrics,
    )


def _flags(tp: int = 1, pp: int = 1, vpp: int = 1, cp: int = 1, sp: bool = False, **more: Any) -> dict[str, Any]:
    virtual = {"num_virtual_stages_per_pipeline_rank": vpp} if vpp > 1 else {}
    return {
        **_FLAGS,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "sequence_parallel": sp,
        **virtual,
        **more,
    }


_CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "tp2": (2, "untied", _flags(tp=2)),
    "tp2-sp": (2, "tied", _flags(tp=2, sp=True)),
    "dp2": (2, "tied", _flags()),
    "dp2-distopt": (2, "tied", _flags(use_distributed_optimizer=True)),
    "dp2-overlap": (
        2,
        "untied",
        _flags(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
    ),
    "pp2": (2, "untied", _flags(pp=2)),
    "pp2-tied": (2, "tied", _flags(pp=2)),
    "pp2-uneven": (2, "untied", _flags(pp=2, decoder_first_pipeline_num_layers=1)),
    "pp2-vpp2": (2, "tied", _flags(pp=2, vpp=2)),
    "cp2": (2, "untied", _flags(cp=2)),
    "tp2-pp2-dp2-sp-distopt": (8, "tied", _flags(tp=2, pp=2, sp=True, use_distributed_optimizer=True)),
    "tp2-cp2-sp-distopt": (4, "untied", _flags(tp=2, cp=2, sp=True, use_distributed_optimizer=True)),
    "ep2": (2, "experts", _flags(expert_model_parallel_size=2)),
    "tp2-ep2-sp": (2, "experts", _flags(tp=2, sp=True, expert_model_parallel_size=2)),
    "tp2-etp2-sp": (
        2,
        "experts",
        _flags(tp=2, sp=True, expert_tensor_parallel_size=2, moe_token_dispatcher_type="allgather"),
    ),
    "tp2-cp2-pp2-vpp2-ep2-sp-distopt": (
        8,
        "experts",
        _flags(tp=2, cp=2, pp=2, vpp=2, sp=True, expert_model_parallel_size=2, use_distributed_optimizer=True),
    ),
}


@pytest.mark.parametrize("name", _CASES)
def test_a_shared_model_trains_as_hf_does(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    world_size, kind, flags = _CASES[name]
    flags = {**flags, "actor_num_gpus_per_node": world_size}
    plain = _plain(tmp_path_factory.getbasetemp(), kind)
    expected = plain.trained
    ranks = run_ranks(world_size, _train, plain.path, plain.path.parent, flags, plain.batches)
    sizes = parallel_sizes(config_for(plain.path, **flags))
    own = [sizes.data_rank(rank, world_size) for rank in range(world_size)]
    log_probs = [row for replica in range(max(own) + 1) for row in ranks[own.index(replica)].log_probs]
    for ours, theirs in zip(log_probs, expected.log_probs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(ranks[0].losses, expected.losses, atol=1e-6, rtol=0)
    np.testing.assert_allclose(ranks[0].norms, expected.norms, rtol=1e-5)
    for held in (ranks[0].weights, ranks[-1].weights):
        assert held.keys() == expected.weights.keys()
        for key, weight in expected.weights.items():
            torch.testing.assert_close(held[key], weight, atol=1e-4, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
    for rank in ranks[1:]:
        for mine, first in zip(rank.metrics, ranks[0].metrics, strict=True):
            assert _without_times(mine) == _without_times(first)


def _train_critic(
    rank: int, world_size: int, port: int, hf: Path, run_dir: Path, flags: dict[str, Any]
) -> list[dict[str, float]]:
    config = config_for(hf, **flags)
    sizes = parallel_sizes(config)
    mine = sizes.data_rank(rank, world_size)
    rows = [np.arange(len(_LENGTHS)), np.arange(0)] if mine == 0 else [np.arange(0), np.arange(0)]
    with trainer_for(config, run_dir, rank=rank, world_size=world_size, port=port) as trainer:
        return [
            _without_times(trainer.train(share(make_batch(_LENGTHS, seed=seed, steps=2), rows, 2))) for seed in range(2)
        ]


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [(2, _flags(tp=2, sp=True)), (2, _flags(cp=2)), (4, _flags(pp=2))],
    ids=["tp2-sp", "cp2", "pp2-dp2"],
)
def test_critic_whitening_and_metrics_are_those_of_one_rank(
    tmp_path_factory: pytest.TempPathFactory, world_size: int, flags: dict[str, Any]
) -> None:
    """Also where a replica, or a whole optimizer step, has no rows at all."""
    plain = _plain(tmp_path_factory.getbasetemp(), "untied")
    ppo = {"use_rollout_logprobs": False, "advantage_estimator": "ppo", "kl_coef": 0.1, "normalize_advantages": True}
    more = {"critic_lr": 1e-3, "entropy_coef": 0.01, "lambd": 0.9}
    [whole] = run_ranks(1, _train_critic, plain.path, plain.path.parent, {**_FLAGS, **ppo, **more})
    shared = {**flags, **ppo, **more, "actor_num_gpus_per_node": world_size}
    for metrics in run_ranks(world_size, _train_critic, plain.path, plain.path.parent, shared):
        for ours, one in zip(metrics, whole, strict=True):
            assert ours == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "again"),
    [({}, 4), ({"recompute_num_layers": 2}, 4), ({"recompute_method": "block", "recompute_num_layers": 3}, 3)],
)
def test_recomputation_runs_layers_again_and_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], again: int
) -> None:
    plain = _plain(tmp_path_factory.getbasetemp(), "untied")
    runs: list[int] = []
    forward = PackedLayer.forward
    monkeypatch.setattr(PackedLayer, "forward", lambda *a, **k: runs.append(1) or forward(*a, **k))  # type: ignore[func-returns-value]

    def train(**more: Any) -> tuple[dict[str, float], int]:
        runs.clear()
        with trainer_for(config_for(plain.path, **_FLAGS, **more), plain.path.parent) as trainer:
            return _without_times(trainer.train(plain.batches[0])), len(runs)

    (kept, once), (computed, more) = train(), train(recompute_granularity="full", **flags)
    assert (once, more) == (4, 4 + again)
    assert computed == pytest.approx(kept, rel=1e-6)


def _without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.endswith("_time")}
