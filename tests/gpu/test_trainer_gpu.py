"""The same trainer on a GPU: bf16 weights with fp32 masters, close to HF in bf16, resumed bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.integration.trainers.trainer_tools import config_for, make_batch, make_hf, trainer_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpu-qwen3")
    make_hf("qwen3", tied=True).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("backend", ["auto", "local", "unfused"])
def test_log_probs_are_close_to_fp32_hf(tmp_path: Path, hf: Path, backend: str) -> None:
    batch = make_batch(micro_batches=2)
    with trainer_for(config_for(hf, attention_backend=backend), tmp_path) as trainer:
        ours = np.concatenate(trainer.log_probs(batch))
    from tests.integration.trainers.trainer_tools import hf_log_probs

    with torch.no_grad():
        theirs = torch.cat(hf_log_probs(make_hf("qwen3", tied=True), batch)).numpy()
    assert np.abs(ours - theirs).mean() < 0.05


def test_training_lowers_the_loss_and_resumes_bit_for_bit(tmp_path: Path, hf: Path) -> None:
    config = config_for(hf, lr=1e-2, attention_backend="local")
    batch = make_batch(masked=0.0)
    batch.rows["rewards"][:] = 1.0
    with trainer_for(config, tmp_path) as trainer:
        before = np.concatenate(trainer.log_probs(batch)).mean()
        trainer.train(batch)
        trainer.save(tmp_path / "ckpt", 1, {})
        trainer.finish_save(tmp_path / "ckpt", 1)
        trainer.train(batch)
        expected = {name: tensor.clone() for name, tensor in trainer.named_weights()}
        assert {tensor.dtype for tensor in expected.values()} == {torch.bfloat16}
        assert np.concatenate(trainer.log_probs(batch)).mean() > before
    resumed = dataclasses.replace(config, ckpt=dataclasses.replace(config.ckpt, load=str(tmp_path / "ckpt")))
    with trainer_for(resumed, tmp_path) as trainer:
        trainer.train(batch)
        assert all(torch.equal(expected[name], tensor) for name, tensor in trainer.named_weights())


def test_reference_sleeps_on_the_host(tmp_path: Path, hf: Path) -> None:
    with trainer_for(config_for(hf, use_kl_loss=True), tmp_path) as trainer:
        before = {name: tensor.clone() for name, tensor in trainer.named_weights()}
        metrics = trainer.train(make_batch())
        assert metrics["train/kl_loss"] == pytest.approx(0.0, abs=1e-3)
        assert trainer._reference is not None
        with trainer._reference.awake():
            assert all(torch.equal(before[name], tensor) for name, tensor in trainer.named_weights())
