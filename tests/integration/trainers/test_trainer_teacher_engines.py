"""A teacher on engines: what the trainer makes of its top tokens and log-probs, beside plain HF and a teacher of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from miles.config import Config, make_config
from miles.data import build_train_batches
from miles.errors import DataError
from miles.trainers.megatron.coarse import coarse_log_probs
from miles.trainers.megatron.logprobs import Vocabulary
from miles.types import Sample, TeacherScores, TrainBatch

from .test_trainer_jobs import CHANNELS, DESCENT, assert_same, config_of, conversations, train_once
from .trainer_tools import VOCAB, make_hf, run_ranks

URL = ("http://127.0.0.1:1",)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("teacher")
    make_hf("qwen3", seed=9).save_pretrained(directory)
    return directory


@torch.no_grad()
def asked(groups: list[list[Sample]], teacher: Path, k: int) -> list[list[Sample]]:
    """The samples with what an engine would say of them."""
    model = AutoModelForCausalLM.from_pretrained(teacher)
    for sample in (sample for group in groups for sample in group):
        tokens = torch.tensor(sample.tokens)
        table = model(tokens[None]).logits[0, -sample.response_length - 1 : -1].log_softmax(-1)
        own = table.gather(1, tokens[-sample.response_length :, None])[:, 0]
        values, ids = table.topk(k, dim=-1)
        sample.teacher = TeacherScores(own.numpy(), ids.int().numpy(), values.numpy())
    return groups


def shards(config: Config, groups: list[list[Sample]], **options: Any) -> list[TrainBatch]:
    batches = build_train_batches(groups, config=config, rollout_id=0, channels=CHANNELS, **{"dp_size": 1, **options})
    return batches.batches


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_all_tokens_of_an_engine_equal_a_teacher_in_the_trainer(
    tmp_path: Path, qwen3: Path, teacher: Path, beta: float
) -> None:
    flags = {"gkd_beta": beta, "sft_alpha": 0.2, "log_probs_chunk_size": 7}
    inside = config_of(qwen3, "gkd", teacher_load=str(teacher), **flags)
    outside = config_of(qwen3, "gkd", teacher_urls=URL, teacher_top_k=VOCAB, **flags)
    expected = train_once(0, 1, 0, inside, tmp_path, shards(inside, conversations()))
    found = train_once(0, 1, 0, outside, tmp_path, shards(outside, asked(conversations(), teacher, VOCAB)))
    assert_same(found, expected)


def test_top_tokens_reach_every_rank_with_their_rows(tmp_path: Path, qwen3: Path, teacher: Path) -> None:
    config = config_of(qwen3, "gkd", teacher_urls=URL, teacher_top_k=5, micro_batch_size=3)
    groups = asked(conversations(), teacher, 5)
    one = train_once(0, 1, 0, config, tmp_path, shards(config, groups))
    two = run_ranks(2, train_once, config, tmp_path, shards(config, groups, dp_size=2))[0]
    assert_same(one, two)
    whole = config_of(qwen3, "gkd", teacher_load=str(teacher))
    bound = train_once(0, 1, 0, whole, tmp_path, shards(whole, conversations()))
    assert 0 < one[0]["divergence"] < bound[0]["divergence"]


@pytest.mark.parametrize("split", ["tensor", "context", "pipeline"])
def test_ranks_that_share_a_student_compute_the_same(tmp_path: Path, qwen3: Path, teacher: Path, split: str) -> None:
    flags = {"teacher_urls": URL, "teacher_top_k": 5, "micro_batch_size": 3, "log_probs_chunk_size": 7}
    config = config_of(qwen3, "gkd", **flags)
    (batch,) = shards(config, asked(conversations(), teacher, 5))
    one = train_once(0, 1, 0, config, tmp_path, [batch])
    shared = config_of(
        qwen3,
        "gkd",
        **flags,
        **{f"{split}_model_parallel_size" if split != "context" else "context_parallel_size": 2},
        actor_num_gpus_per_node=2,
    )
    two = run_ranks(2, train_once, shared, tmp_path, [batch, batch])[0]
    for of_one, of_two in zip(one[:2], two[:2], strict=True):
        names = {"loss", "divergence", "train/loss", "train/divergence", "train/grad_norm"} & of_one.keys()
        assert {name: of_two[name] for name in names} == pytest.approx({name: of_one[name] for name in names}, rel=1e-4)
    for name, tensor in two[2].items():
        torch.testing.assert_close(tensor, one[2][name], atol=1e-5, rtol=1e-4)


def test_on_policy_distillation_takes_an_engines_log_probs(tmp_path: Path, qwen3: Path, teacher: Path) -> None:
    def answers() -> list[list[Sample]]:
        groups = conversations()
        for sample in (sample for group in groups for sample in group):
            sample.reward, sample.loss_scale = float(sample.tokens[0] % 2), None
        return groups

    def trained(groups: list[list[Sample]], **flags: Any) -> Any:
        sizes = {"rollout_batch_size": 12, "n_samples_per_prompt": 1, "num_steps_per_rollout": 1, "num_rollout": 1}
        base = {"hf_checkpoint": str(qwen3), "prompt_data": "unused", "use_opd": True, "opd_kl_coef": 0.3, **sizes}
        config = make_config(**{**base, **DESCENT, "disable_rewards_normalization": True, **flags})
        batches = build_train_batches(groups, config=config, rollout_id=0, dp_size=1).batches
        return train_once(0, 1, 0, config, tmp_path, batches)

    inside = trained(answers(), teacher_load=str(teacher))
    outside = trained(asked(answers(), teacher, 0), teacher_urls=URL, opd_type="sglang")
    assert outside[1]["train/teacher_kl"] == pytest.approx(inside[1]["train/teacher_kl"], rel=1e-5)
    for name, tensor in inside[2].items():
        torch.testing.assert_close(outside[2][name], tensor, atol=1e-6, rtol=1e-5)


def test_samples_that_the_teacher_has_not_seen_are_an_error(qwen3: Path, teacher: Path) -> None:
    config = config_of(qwen3, "gkd", teacher_urls=URL, teacher_top_k=5)
    groups = asked(conversations(), teacher, 5)
    groups[4][0].teacher = None
    with pytest.raises(DataError, match="sample 8, got no log-probs of the teacher: --teacher-urls was not asked"):
        shards(config, groups)


def split(rank: int, world_size: int, port: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, and gradients of hidden states (summed over ranks, as megatron's copy does) and of this rank's rows."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        hidden, weight, ids, up = problem()
        mine = weight[rank * 6 : (rank + 1) * 6].clone().requires_grad_()
        rows = min(11 - rank * 6, 6)
        hidden.requires_grad_()
        vocabulary = Vocabulary(start=rank * 6, rows=rows, group=dist.group.WORLD)
        found = coarse_log_probs(hidden, mine, ids, vocabulary, chunk_tokens=3)
        (found * up).sum().backward()
        assert hidden.grad is not None
        assert mine.grad is not None
        dist.all_reduce(hidden.grad)
        return found.detach().numpy(), hidden.grad.numpy(), mine.grad.numpy()
    finally:
        dist.destroy_process_group()


def problem() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 5, generator=generator), torch.randn(12, 5, generator=generator)
    ids = torch.stack([torch.randperm(11, generator=generator)[:4] for _ in range(7)])
    return hidden, weight, ids, torch.randn(7, 5, generator=generator)


def test_a_split_vocabulary_changes_nothing() -> None:
    hidden, weight, ids, up = problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    found = coarse_log_probs(hidden, weight, ids, Vocabulary(rows=11))
    (found * up).sum().backward()
    parts = run_ranks(2, split)
    for values, slope, _ in parts:
        np.testing.assert_allclose(values, found.detach().numpy(), atol=1e-5)
        assert hidden.grad is not None
        np.testing.assert_allclose(slope, hidden.grad.numpy(), atol=1e-5)
    assert weight.grad is not None
    np.testing.assert_allclose(np.concatenate([part[2] for part in parts]), weight.grad.numpy(), atol=1e-5)
