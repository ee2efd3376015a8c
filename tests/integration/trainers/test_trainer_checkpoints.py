"""Checkpoints: exact continuation, refusal of what is not whole, and the guard against non-finite steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from miles.config import Config
from miles.errors import CheckpointError, NonFiniteError
from miles.trainers import checkpoints
from miles.trainers.megatron import MegatronTrainer

from .trainer_tools import config_for, make_batch, run_ranks, save_hf_model, trainer_for

_FLAGS: dict[str, Any] = {"lr": 1e-2, "min_lr": 1e-4, "lr_decay_style": "linear", "deterministic_mode": True}


@pytest.fixture(autouse=True)
def _undo_deterministic_mode() -> Any:
    yield
    torch.use_deterministic_algorithms(False)


def _weights(trainer: MegatronTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.named_weights()}


def _loading(config: Config, directory: Path) -> Config:
    return dataclasses.replace(config, ckpt=dataclasses.replace(config.ckpt, load=str(directory)))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(tmp_path: Path, qwen3: Path, optimizer: str) -> None:
    config = config_for(qwen3, optimizer=optimizer, **_FLAGS)
    batches = [make_batch(seed=i, steps=2, micro_batches=2, rollout_id=i) for i in range(4)]
    with trainer_for(config, tmp_path, steps=8) as trainer:
        for batch in batches[:2]:
            trainer.train(batch)
        trainer.save(tmp_path / "ckpt", 2, {"data": {"epoch": 3}})
        trainer.finish_save(tmp_path / "ckpt", 2)
        drawn = torch.rand(3), np.random.rand(3)
        never_stopped = [trainer.train(batch) for batch in batches[2:]]
        expected = _weights(trainer)
        moments = [{k: v.clone() for k, v in s.items() if torch.is_tensor(v)} for s in _optimizer_state(trainer)]

    with trainer_for(_loading(config, tmp_path / "ckpt"), tmp_path, steps=8) as trainer:
        assert checkpoints.read_state(tmp_path / "ckpt" / "iter_0000002")["extra"] == {"data": {"epoch": 3}}
        assert trainer.global_step == 4
        torch.testing.assert_close(torch.rand(3), drawn[0], rtol=0, atol=0)
        np.testing.assert_array_equal(np.random.rand(3), drawn[1])
        for batch, wanted in zip(batches[2:], never_stopped, strict=True):
            metrics = trainer.train(batch)
            assert {k: v for k, v in metrics.items() if "_time" not in k} == {
                k: v for k, v in wanted.items() if "_time" not in k
            }
        assert all(torch.equal(expected[name], tensor) for name, tensor in _weights(trainer).items())
        for ours, theirs in zip(_optimizer_state(trainer), moments, strict=True):
            assert theirs
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _optimizer_state(trainer: MegatronTrainer) -> list[dict[str, Any]]:
    (inner,) = trainer._actor.optimizer.chained_optimizers
    return [inner.optimizer.state[p] for p in inner.get_parameters()]


def test_load_initial_returns_the_next_rollout(tmp_path: Path, qwen3: Path) -> None:
    with trainer_for(config_for(qwen3), tmp_path) as trainer:
        assert trainer.load_initial(None) == 0
        trainer.save(tmp_path / "ckpt", 7, {})
        trainer.finish_save(tmp_path / "ckpt", 7)
        assert trainer.load_initial(tmp_path / "ckpt" / "iter_0000007") == 7


def test_hyper_parameters_are_the_flags_also_after_a_resume(tmp_path: Path, qwen3: Path) -> None:
    config = config_for(qwen3, lr=1e-2)
    _save_one(config, tmp_path, 1)
    changed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=3e-3, adam_beta2=0.95))
    with trainer_for(_loading(changed, tmp_path / "ckpt"), tmp_path) as trainer:
        assert trainer.train(make_batch())["train/lr"] == pytest.approx(3e-3)
        assert {group["betas"] for group in trainer._actor.optimizer.param_groups} == {(0.9, 0.95)}


def test_saving_leaves_no_process_and_no_partial_directory(tmp_path: Path, qwen3: Path) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    _save_one(config_for(qwen3), tmp_path, 1)
    _save_one(config_for(qwen3), tmp_path, 1)  # over itself
    assert {child.pid for child in psutil.Process().children(recursive=True)} == before
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == [
        "iter_0000001",
        "latest_checkpointed_iteration.txt",
    ]


def _save_one(config: Config, tmp_path: Path, *iterations: int) -> None:
    with trainer_for(config, tmp_path) as trainer:
        trainer.train(make_batch())
        for iteration in iterations:
            trainer.save(tmp_path / "ckpt", iteration, {})
            trainer.finish_save(tmp_path / "ckpt", iteration)


def test_reference_weights_are_the_ones_that_were_meant_or_none(tmp_path: Path, qwen3: Path) -> None:
    config = config_for(qwen3)
    _save_one(config, tmp_path, 1, 2)
    victim = tmp_path / "ckpt" / "iter_0000002" / "__0_0.distcp"
    victim.write_bytes(victim.read_bytes()[:-100])
    with trainer_for(config, tmp_path) as trainer:
        with pytest.raises(CheckpointError, match=rf"{victim}, got .* torn; the newest whole one before it is 1: name"):
            trainer.load_weights(str(tmp_path / "ckpt"))
        trainer.load_weights(str(tmp_path / "ckpt" / "iter_0000001"))


@pytest.mark.parametrize(("interval", "kept"), [(None, [1, 2, 3, 4, 5]), (3, [3, 4, 5]), (1, [1, 2, 3, 4, 5])])
def test_older_checkpoints_are_kept_as_asked(
    tmp_path: Path, qwen3: Path, interval: int | None, kept: list[int]
) -> None:
    config = config_for(qwen3, save=str(tmp_path / "ckpt"), save_retain_interval=interval)
    _save_one(config, tmp_path, 1, 2, 3, 4, 5)
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == [
        *(f"iter_{i:07d}" for i in kept),
        checkpoints.LATEST,
    ]
    assert checkpoints.choose(tmp_path / "ckpt").iteration == 5


def test_files_of_the_caller_are_part_of_the_checkpoint(tmp_path: Path, qwen3: Path) -> None:
    config = config_for(qwen3)
    with trainer_for(config, tmp_path) as trainer:
        trainer.save(tmp_path / "ckpt", 1, {})
        (checkpoints.partial_directory(tmp_path / "ckpt", 1) / "data.json").write_text("{}")
        trainer.finish_save(tmp_path / "ckpt", 1)
    final = tmp_path / "ckpt" / "iter_0000001"
    assert "data.json" in json.loads((final / "manifest.json").read_text())["files"]
    (final / "data.json").unlink()
    with (
        pytest.raises(CheckpointError, match=r"data\.json"),
        trainer_for(_loading(config, tmp_path / "ckpt"), tmp_path),
    ):
        pass


def test_weights_only_checkpoints_start_moments_afresh(tmp_path: Path, qwen3: Path) -> None:
    full, bare = config_for(qwen3, lr=1e-2), config_for(qwen3, lr=1e-2, no_save_optim=True, save=str(tmp_path / "ckpt"))
    _save_one(bare, tmp_path, 1)
    with trainer_for(_loading(full, tmp_path / "ckpt"), tmp_path) as trainer:
        assert all(not state["exp_avg"].any() for state in _optimizer_state(trainer))
        assert trainer.global_step == 1
        reloaded = _weights(trainer)
    # The same checkpoint as --ref-load: a warm start at rollout 0.
    warm = dataclasses.replace(full, ckpt=dataclasses.replace(full.ckpt, ref_load=str(tmp_path / "ckpt")))
    with trainer_for(warm, tmp_path) as trainer:
        assert trainer.global_step == 0
        assert all(torch.equal(reloaded[name], tensor) for name, tensor in _weights(trainer).items())


def test_a_checkpoint_of_another_shape_or_optimizer_says_so(tmp_path: Path, qwen3: Path) -> None:
    _save_one(config_for(qwen3), tmp_path, 1)
    sgd = config_for(qwen3, optimizer="sgd")
    with (
        pytest.raises(CheckpointError, match="--optimizer adam"),
        trainer_for(_loading(sgd, tmp_path / "ckpt"), tmp_path),
    ):
        pass
    other = config_for(save_hf_model(tmp_path / "llama", "llama"))
    with pytest.raises(CheckpointError, match="MODEL flags"), trainer_for(_loading(other, tmp_path / "ckpt"), tmp_path):
        pass


def _save_on_rank(rank: int, world_size: int, port: int, hf: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    batch = make_batch(seed=rank)
    with trainer_for(config_for(hf, lr=1e-2), tmp_path, rank=rank, world_size=world_size, port=port) as trainer:
        trainer.train(batch)
        trainer.save(tmp_path / "ckpt", 1, {})
        if rank == 0:
            trainer.finish_save(tmp_path / "ckpt", 1)
        trainer.parallel.barrier()
        assert trainer.load(tmp_path / "ckpt" / "iter_0000001") == 1
        trainer.save_hf(tmp_path / "hf-out")
        return _weights(trainer)


def test_two_ranks_save_one_checkpoint_that_one_rank_loads(tmp_path: Path, qwen3: Path) -> None:
    first, second = run_ranks(2, _save_on_rank, qwen3, tmp_path)
    with trainer_for(_loading(config_for(qwen3), tmp_path / "ckpt"), tmp_path) as trainer:
        for name, tensor in _weights(trainer).items():
            assert torch.equal(tensor, first[name])
            assert torch.equal(tensor, second[name])
        trainer.load_weights(str(tmp_path / "hf-out"))
        assert all(torch.equal(first[name], tensor) for name, tensor in _weights(trainer).items())


@pytest.mark.parametrize("poison", ["advantage", "weight"])
def test_a_non_finite_step_stops_before_the_weights_are_touched(tmp_path: Path, qwen3: Path, poison: str) -> None:
    with trainer_for(config_for(qwen3, lr=1e-2), tmp_path) as trainer:
        trainer.train(make_batch())
        before, moments = _weights(trainer), [{k: v.clone() for k, v in s.items()} for s in _optimizer_state(trainer)]
        batch = make_batch(rollout_id=5, micro_batches=2)
        if poison == "advantage":
            batch.rows["rewards"][3] = np.nan
        else:
            batch.rows["loss_weight"][0] = np.inf
        with pytest.raises(NonFiniteError, match="rollout 5"):
            trainer.train(batch)
        assert all(torch.equal(before[name], tensor) for name, tensor in _weights(trainer).items())
        for state, kept in zip(_optimizer_state(trainer), moments, strict=True):
            assert all(torch.equal(state[name], kept[name]) for name in kept)
        assert trainer.global_step == 1
        saved = np.load(tmp_path / "nonfinite-5-rank0.npz")
        np.testing.assert_array_equal(saved["tokens"], batch.ragged["tokens"])
        np.testing.assert_array_equal(saved["step0.micro_batch1"], batch.steps[0][1])
        trainer.train(make_batch())  # and a healthy batch goes on


def _poisoned(rank: int, world_size: int, port: int, hf: Path, tmp_path: Path) -> str:
    batch = make_batch(seed=rank)
    if rank == 1:
        batch.rows["rewards"][0] = np.nan
    with trainer_for(config_for(hf), tmp_path, rank=rank, world_size=world_size, port=port) as trainer:
        with pytest.raises(NonFiniteError) as caught:
            trainer.train(batch)
        return str(caught.value)


def test_all_ranks_stop_when_one_is_not_finite(tmp_path: Path, qwen3: Path) -> None:
    first, second = run_ranks(2, _poisoned, qwen3, tmp_path)
    assert "rank0.npz" in first
    assert "rank1.npz" in second


def test_a_reference_that_follows_the_actor_is_continued(tmp_path: Path, qwen3: Path) -> None:
    """--ref-update-interval: KL is 0 again after each update, and a resumed run has the reference of the one that went on."""
    kl_flags = {"use_kl_loss": True, "kl_loss_coef": 0.1, "ref_update_interval": 2}
    config = config_for(qwen3, **kl_flags, **_FLAGS)
    batches = [make_batch(seed=i, rollout_id=i) for i in range(6)]
    with trainer_for(config, tmp_path, steps=6) as trainer:
        made = [trainer.train(batch)["train/kl_loss"] for batch in batches[:3]]
        trainer.save(tmp_path / "ckpt", 3)
        trainer.finish_save(tmp_path / "ckpt", 3)
        made += [trainer.train(batch)["train/kl_loss"] for batch in batches[3:]]
        expected = _weights(trainer)
    assert [value == pytest.approx(0, abs=1e-7) for value in made] == [True, False] * 3
    with trainer_for(_loading(config, tmp_path / "ckpt"), tmp_path, steps=6) as trainer:
        assert [trainer.train(batch)["train/kl_loss"] for batch in batches[3:]] == made[3:]
        assert all(torch.equal(expected[name], tensor) for name, tensor in _weights(trainer).items())
