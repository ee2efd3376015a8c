"""However the rows are divided over micro-batches and ranks, the step is the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.errors import DataError
from miles.trainers.megatron.logprobs import Vocabulary, token_scores
from miles.types import TrainBatch

from .trainer_tools import config_for, make_batch, run_ranks, share, trainer_for, with_rollout_log_probs

_FLAGS: dict[str, Any] = {
    "use_rollout_logprobs": True,
    "entropy_coef": 0.01,
    "clip_grad": 0.5,
    "lr": 1e-2,
    "adam_eps": 1e-4,
}


def _stale_batch(qwen3: Path, tmp_path: Path, *, steps: int = 1) -> TrainBatch:
    batch = make_batch(steps=steps)
    rng = np.random.default_rng(2)
    with trainer_for(config_for(qwen3), tmp_path) as trainer:
        rows = [row - np.log(rng.uniform(0.7, 1.4, len(row))) for row in trainer.log_probs(batch)]
    return with_rollout_log_probs(batch, rows)


def _train(
    rank: int, world_size: int, port: int, hf: Path, run_dir: Path, flags: dict[str, Any], shares: list[TrainBatch]
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    with trainer_for(config_for(hf, **flags), run_dir, rank=rank, world_size=world_size, port=port) as trainer:
        metrics = [trainer.train(shares[rank]) for _ in range(2)]
        return metrics, {name: tensor.clone() for name, tensor in trainer.named_weights()}


def _assert_same(one: tuple[Any, Any], other: tuple[Any, Any], *, times: bool = False) -> None:
    for a, b in zip(one[0], other[0], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if not name.endswith("_time"):
                assert a[name] == pytest.approx(b[name], rel=1e-5, abs=2e-6), name
    for name, tensor in one[1].items():
        assert (tensor - other[1][name]).norm() <= 1e-5 * tensor.norm(), name


@pytest.mark.parametrize("steps", [1, 2])
def test_any_split_into_micro_batches_is_the_same_step(tmp_path: Path, qwen3: Path, steps: int) -> None:
    batch = _stale_batch(qwen3, tmp_path, steps=steps)
    whole = _train(0, 1, 0, qwen3, tmp_path, _FLAGS, [batch])
    rows = [step[0] for step in batch.steps]
    for split in (
        tuple(tuple(np.array_split(part, 3)) for part in rows),
        tuple(tuple(part[[i]] for i in range(len(part))) for part in rows),
        tuple((part[::-1][:3], part[[]], part[::-1][3:]) for part in rows),
    ):
        _assert_same(whole, _train(0, 1, 0, qwen3, tmp_path, _FLAGS, [dataclasses.replace(batch, steps=split)]))


def test_packed_rows_score_as_each_row_alone(tmp_path: Path, qwen3: Path) -> None:
    lengths = [(n, n // 2) for n in (3, 7, 33, 34, 40, 64, 65, 120, 9, 9, 41)]
    batch = make_batch(lengths)
    alone = dataclasses.replace(batch, steps=(tuple(np.array([i]) for i in range(len(lengths))),))
    with trainer_for(config_for(qwen3), tmp_path) as trainer:
        for packed, single in zip(trainer.log_probs(batch), trainer.log_probs(alone), strict=True):
            np.testing.assert_allclose(packed, single, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
def test_two_ranks_equal_one(tmp_path: Path, qwen3: Path, steps: int) -> None:
    batch = _stale_batch(qwen3, tmp_path, steps=steps)
    flags = {**_FLAGS, "use_kl_loss": True, "kl_loss_coef": 0.1}
    whole = _train(0, 1, 0, qwen3, tmp_path, flags, [batch])
    rows = [step[0] for step in batch.steps]
    shares = [share(batch, [part[1:] for part in rows], 2), share(batch, [part[:1] for part in rows], 2)]
    first, second = run_ranks(2, _train, qwen3, tmp_path, flags, shares)
    _assert_same(first, whole)
    for a, b in zip(first[0], second[0], strict=True):
        assert {k: v for k, v in a.items() if "_time" not in k} == {k: v for k, v in b.items() if "_time" not in k}
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_a_rollout_of_skipped_rows_alone_reports_no_ratio(tmp_path: Path, qwen3: Path) -> None:
    whole = make_batch(lengths=[(5, 2)])
    empty = share(whole, [np.empty(0, np.int64)], 1)
    with trainer_for(config_for(qwen3), tmp_path) as trainer:
        metrics = trainer.train(empty)
    assert metrics["train/scored_tokens"] == 0
    assert metrics["train/grad_norm"] == 0
    assert "train/ratio_first" not in metrics


def test_a_rank_without_rows_joins_every_collective(tmp_path: Path, qwen3: Path) -> None:
    batch = _stale_batch(qwen3, tmp_path)
    whole = _train(0, 1, 0, qwen3, tmp_path, _FLAGS, [batch])
    shares = [share(batch, [np.arange(batch.num_rows)], 1), share(batch, [np.arange(0)], 1)]
    first, _ = run_ranks(2, _train, qwen3, tmp_path, _FLAGS, shares)
    _assert_same(first, whole)


def test_one_update_per_rollout_needs_no_old_pass_and_has_ratio_one(tmp_path: Path, qwen3: Path) -> None:
    with trainer_for(config_for(qwen3, lr=1e-2), tmp_path) as trainer:
        metrics = trainer.train(make_batch(micro_batches=2))
    assert metrics["train/ratio_first"] == 1.0
    assert metrics["train/ppo_kl"] == 0.0
    assert "perf/old_log_probs_time" not in metrics
    assert "train/train_rollout_kl" not in metrics


def test_later_updates_compare_with_the_policy_before_the_first(tmp_path: Path, qwen3: Path) -> None:
    batch = make_batch(steps=2)
    with trainer_for(config_for(qwen3, lr=1e-2), tmp_path) as trainer:
        batch = with_rollout_log_probs(batch, trainer.log_probs(batch))
        metrics = trainer.train(batch)
    assert metrics["train/ratio_first"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["train/ratio"] != pytest.approx(1.0, abs=1e-4)
    assert metrics["perf/old_log_probs_time"] > 0
    assert metrics["train/global_step"] == 2
    # The engine's policy was the trainer's, and an update in between must not show as a mismatch.
    assert metrics["train/train_rollout_logprob_abs_diff_max"] < 1e-5
    assert metrics["train/ess"] == pytest.approx(1.0, abs=1e-5)


def test_rollout_log_probs_mode_reports_the_mismatch_before_the_update(tmp_path: Path, qwen3: Path) -> None:
    batch = make_batch(steps=2)
    with trainer_for(config_for(qwen3, lr=1e-2, use_rollout_logprobs=True), tmp_path) as trainer:
        batch = with_rollout_log_probs(batch, trainer.log_probs(batch))
        metrics = trainer.train(batch)
    assert "perf/old_log_probs_time" not in metrics
    assert metrics["train/train_rollout_logprob_abs_diff_max"] < 1e-5


def test_a_flag_that_needs_the_engines_log_probs_says_so(tmp_path: Path, qwen3: Path) -> None:
    with trainer_for(config_for(qwen3, use_tis=True), tmp_path) as trainer, pytest.raises(DataError, match="--use-tis"):
        trainer.train(make_batch())


def _split_vocabulary_scores(rank: int, world_size: int, port: int, path: str) -> dict[str, torch.Tensor]:
    """Scores and gradients with the vocabulary of 11 split over the ranks in shards of 6, the last row padding."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    try:
        hidden, weight, targets, up = _scored()
        shard = torch.cat([weight, torch.full((1, 5), 9.0)]).chunk(world_size)[rank].clone().requires_grad_()
        hidden.requires_grad_()
        vocabulary = Vocabulary(start=6 * rank, rows=min(11 - 6 * rank, 6), group=torch.distributed.group.WORLD)
        scores = token_scores(hidden, shard, targets, torch.full((9,), 0.7), vocabulary, 4)
        (scores.log_probs * up[0] + scores.entropies * up[1]).sum().backward()
        assert hidden.grad is not None
        torch.distributed.all_reduce(hidden.grad)
        return {
            "log_probs": scores.log_probs.detach(),
            "entropies": scores.entropies.detach(),
            "hidden": hidden.grad,
            "weight": shard.grad,
        }
    finally:
        torch.distributed.destroy_process_group()


def _scored() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 5, generator=generator), torch.randn(11, 5, generator=generator)
    return hidden, weight, torch.arange(9) + 1, torch.randn(2, 9, generator=generator)


def test_a_vocabulary_split_over_ranks_scores_the_same(tmp_path: Path) -> None:
    first, second = run_ranks(2, _split_vocabulary_scores, str(tmp_path / "store"))
    hidden, weight, targets, up = _scored()
    hidden.requires_grad_()
    weight.requires_grad_()
    table = torch.log_softmax(hidden @ weight.t() / 0.7, -1)
    log_probs, entropies = table.gather(1, targets[:, None]).squeeze(1), -(table.exp() * table).sum(-1)
    (log_probs * up[0] + entropies * up[1]).sum().backward()
    for rank in (first, second):
        torch.testing.assert_close(rank["log_probs"], log_probs.detach())
        torch.testing.assert_close(rank["entropies"], entropies.detach())
        torch.testing.assert_close(rank["hidden"], hidden.grad, atol=1e-5, rtol=1e-5)
    gathered = torch.cat([first["weight"], second["weight"]])
    torch.testing.assert_close(gathered[:11], weight.grad, atol=1e-5, rtol=1e-5)
    assert not gathered[11].any()
