"""Jobs on data sets: what the trainer minimises is what plain HF computes of the same rows, however they are divided."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from miles.config import Config, make_config
from miles.data import build_train_batches
from miles.errors import CheckpointError, HookError
from miles.trainers.check import check
from miles.types import CHANNEL, LossInputs, Sample, TrainBatch

from .trainer_tools import VOCAB, config_for, hf_log_probs, make_batch, run_ranks, trainer_for

CHANNELS = ("code", "math")
#: Plain descent, so that the weights after a step show its gradient.
DESCENT: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "clip_grad": 0.0, "weight_decay": 0.0}


def config_of(hf: Path, loss_type: str = "sft_loss", **flags: Any) -> Config:
    sizes = {"rollout_batch_size": 12, "num_rollout": 10}
    return make_config(
        **{"hf_checkpoint": str(hf), "prompt_data": "unused", "loss_type": loss_type, **sizes, **DESCENT, **flags}
    )


def conversations(count: int = 12) -> list[list[Sample]]:
    """Rows of unlike lengths, with masks inside, scales on some, and one whose answers are two rows."""
    rng = np.random.default_rng(0)
    groups = []
    for number in range(count):
        rows = []
        for part in range(2 if number == 3 else 1):
            length, response = int(rng.integers(6, 40)), int(rng.integers(1, 5)) + number % 3
            mask = (rng.random(response) > 0.3).astype(int)
            mask[-1] = 1
            scale = (rng.choice([0.25, 1.0, 3.0], response) * mask).tolist() if number % 2 else None
            rows.append(
                Sample(
                    group_index=number,
                    index=2 * number + part,
                    trajectory_id=2 * number,
                    tokens=rng.integers(0, VOCAB, length).tolist(),
                    response_length=response,
                    loss_mask=mask.tolist(),
                    loss_scale=scale,
                    status=Sample.Status.COMPLETED,
                    metadata={CHANNEL: CHANNELS[number % 3 == 0]},
                )
            )
        groups.append(rows)
    return groups


def batches_of(config: Config, *, dp_size: int = 1, **options: Any) -> list[TrainBatch]:
    return build_train_batches(
        conversations(), config=config, rollout_id=0, dp_size=dp_size, channels=CHANNELS, **options
    ).batches


def hf_tokens(hf: torch.nn.Module) -> list[tuple[Sample, torch.Tensor, torch.Tensor]]:
    """(sample, loss of each response token by HF's own cross-entropy, whether it is the first choice), with gradient."""
    found = []
    for sample in (sample for group in conversations() for sample in group):
        tokens = torch.tensor(sample.tokens)
        logits = hf(tokens[None]).logits[0, -sample.response_length - 1 : -1]
        targets = tokens[-sample.response_length :]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        found.append((sample, loss, logits.argmax(-1) == targets))
    return found


def weights_of(sample: Sample) -> torch.Tensor:
    mask = torch.tensor(sample.loss_mask, dtype=torch.float32)
    return mask if sample.loss_scale is None else mask * torch.tensor(sample.loss_scale)


def train_once(
    rank: int, world_size: int, port: int, config: Config, run_dir: Path, shards: Sequence[TrainBatch]
) -> tuple[dict[str, float], dict[str, float], dict[str, torch.Tensor]]:
    """Metrics of an evaluation, those of one step on the same rows, and the weights after it."""
    with trainer_for(config, run_dir, rank=rank, world_size=world_size, port=port) as trainer:
        evaluated = trainer.evaluate(shards[rank])
        trained = trainer.train(shards[rank])
        return evaluated, trained, {name: tensor.clone() for name, tensor in trainer.named_weights()}


def assert_same(one: tuple[Any, Any, Any], other: tuple[Any, Any, Any]) -> None:
    for a, b in zip(one[:2], other[:2], strict=True):
        assert a.keys() == b.keys()
        assert {k: v for k, v in a.items() if "_time" not in k} == pytest.approx(
            {k: v for k, v in b.items() if "_time" not in k}, rel=1e-5, abs=1e-6
        )
    for name, tensor in one[2].items():
        torch.testing.assert_close(tensor, other[2][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean"])
@pytest.mark.parametrize("kind", ["cross_entropy", "dft"])
def test_sft_is_the_cross_entropy_of_hf(tmp_path: Path, qwen3: Path, aggregation: str, kind: str) -> None:
    """Denominators count trained tokens, or trajectories; scales weigh, and no denominator knows of them."""
    model = AutoModelForCausalLM.from_pretrained(qwen3).train()
    tokens = hf_tokens(model)
    number = {"token_mean": sum(sum(sample.loss_mask or []) for sample, _, _ in tokens), "seq_mean": 12}[aggregation]
    trajectory: dict[int, int] = {}
    for sample, _, _ in tokens:
        trajectory[sample.trajectory_id] = trajectory.get(sample.trajectory_id, 0) + sum(sample.loss_mask)
    total, right, weight = torch.zeros(()), 0.0, 0.0
    for sample, nll, first in tokens:
        each = nll if kind == "cross_entropy" else (-nll).exp().detach() * nll
        part = weights_of(sample) / (1 if aggregation == "token_mean" else trajectory[sample.trajectory_id]) / number
        total = total + (part * each).sum()
        right, weight = right + float((part * first).sum()), weight + float(part.sum())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total.backward()
    optimizer.step()

    config = config_of(qwen3, loss_aggregation=aggregation, sft_token_loss=kind)
    evaluated, trained, weights = train_once(0, 1, 0, config, tmp_path, batches_of(config))
    assert evaluated["loss"] == pytest.approx(float(total), rel=1e-5)
    assert trained["train/loss"] == pytest.approx(float(total), rel=1e-5)
    assert evaluated["token_accuracy"] == pytest.approx(right / weight, abs=1e-6)
    for name, tensor in model.state_dict().items():
        if name in weights:
            torch.testing.assert_close(weights[name], tensor, atol=1e-6, rtol=1e-5)
    for channel in CHANNELS:
        mine = [(weights_of(s), nll) for s, nll, _ in tokens if s.metadata[CHANNEL] == channel]
        if aggregation == "token_mean":
            mean = sum(float((w * nll).sum()) for w, nll in mine) / sum(float(w.sum()) for w, _ in mine)
            assert evaluated[f"nll_{channel}"] == trained[f"train/nll_{channel}"] == pytest.approx(mean, rel=1e-5)


def test_one_rank_equals_two_and_packed_equals_one_by_one(tmp_path: Path, qwen3: Path) -> None:
    config = config_of(qwen3, use_dynamic_batch_size=True, max_tokens_per_gpu=100_000)
    packed = train_once(0, 1, 0, config, tmp_path, batches_of(config))
    alone = config_of(qwen3, micro_batch_size=1)
    assert len(batches_of(alone)[0].steps[0]) == 13
    assert_same(packed, train_once(0, 1, 0, alone, tmp_path, batches_of(alone)))
    two = run_ranks(2, train_once, config, tmp_path, batches_of(config, dp_size=2))
    assert_same(packed, two[0])
    assert {k: v for k, v in two[0][1].items() if "_time" not in k} == {
        k: v for k, v in two[1][1].items() if "_time" not in k
    }


def test_an_evaluation_is_one_step_of_any_size_and_changes_nothing(tmp_path: Path, qwen3: Path) -> None:
    config = config_of(qwen3, rollout_batch_size=8, num_steps_per_rollout=4)
    (batch,) = batches_of(config, as_one_step=True)
    assert len(batch.steps) == 1
    with trainer_for(config, tmp_path) as trainer:
        before = {name: tensor.clone() for name, tensor in trainer.named_weights()}
        first = trainer.evaluate(batch)
        assert trainer.evaluate(batch) == first
        assert all(torch.equal(before[name], tensor) for name, tensor in trainer.named_weights())
        assert trainer.global_step == 0


def test_several_steps_of_a_rollout_need_no_pass_before(tmp_path: Path, qwen3: Path) -> None:
    config = config_of(qwen3, rollout_batch_size=12, num_steps_per_rollout=3)
    with trainer_for(config, tmp_path) as trainer:
        metrics = trainer.train(batches_of(config)[0])
    assert "perf/old_log_probs_time" not in metrics
    assert metrics["train/global_step"] == 3


# ----------------------------------------------------------------------------------------------------------- distillation


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider and deeper than the student, with the same tokens."""
    torch.manual_seed(3)
    directory = tmp_path_factory.mktemp("teacher")
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(directory)
    return directory


def distributions(hf: torch.nn.Module, temperature: float) -> list[tuple[Sample, torch.Tensor]]:
    """(sample, [response tokens, V] log-probs)."""
    found = []
    for sample in (sample for group in conversations() for sample in group):
        logits = hf(torch.tensor(sample.tokens)[None]).logits[0, -sample.response_length - 1 : -1]
        found.append((sample, torch.log_softmax(logits / temperature, -1)))
    return found


@pytest.mark.parametrize(("beta", "temperature", "alpha"), [(0.0, 1.0, 0.0), (0.5, 0.7, 0.3), (1.0, 2.0, 0.0)])
def test_gkd_is_the_divergence_of_hf_models(
    tmp_path: Path, qwen3: Path, teacher: Path, beta: float, temperature: float, alpha: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(qwen3).train()
    with torch.no_grad():
        theirs = distributions(AutoModelForCausalLM.from_pretrained(teacher), temperature)
    nlls = hf_tokens(model)
    number = sum(sum(sample.loss_mask or []) for sample, _ in theirs)
    total, divergence = torch.zeros(()), 0.0
    for (sample, t), (_, s), (_, nll, _) in zip(theirs, distributions(model, temperature), nlls, strict=True):
        m = torch.log(beta * t.exp() + (1 - beta) * s.exp())
        if beta == 0:
            each = (t.exp() * (t - s)).sum(-1)
        elif beta == 1:
            each = (s.exp() * (s - t)).sum(-1)
        else:
            each = (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)
        total = total + (weights_of(sample) * (each + alpha * nll)).sum() / number
        divergence += float((weights_of(sample) * each).sum().detach()) / number
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total.backward()
    optimizer.step()
    flags = {"gkd_beta": beta, "gkd_temperature": temperature, "sft_alpha": alpha, "log_probs_chunk_size": 5}
    config = config_of(qwen3, "gkd", teacher_load=str(teacher), **flags)
    evaluated, trained, weights = train_once(0, 1, 0, config, tmp_path, batches_of(config))
    assert evaluated["loss"] == pytest.approx(float(total.detach()), rel=1e-4)
    assert trained["train/loss"] == pytest.approx(float(total.detach()), rel=1e-4)
    scale = sum(float(weights_of(sample).sum()) for sample, _ in theirs) / number
    assert trained["train/divergence"] * scale == pytest.approx(divergence, rel=1e-4)
    for name, tensor in model.state_dict().items():
        if name in weights:
            torch.testing.assert_close(weights[name], tensor, atol=2e-6, rtol=1e-4)


def test_gkd_of_one_rank_equals_two_and_packed_equals_one_by_one(tmp_path: Path, qwen3: Path, teacher: Path) -> None:
    sizes = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 100_000}
    config = config_of(qwen3, "gkd", teacher_load=str(teacher), **sizes)
    packed = train_once(0, 1, 0, config, tmp_path, batches_of(config))
    alone = config_of(qwen3, "gkd", teacher_load=str(teacher), micro_batch_size=1)
    assert_same(packed, train_once(0, 1, 0, alone, tmp_path, batches_of(alone)))
    assert_same(packed, run_ranks(2, train_once, config, tmp_path, batches_of(config, dp_size=2))[0])


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path: Path, qwen3: Path) -> None:
    config = config_of(qwen3, "gkd", teacher_load=str(qwen3))
    _, trained, _ = train_once(0, 1, 0, config, tmp_path, batches_of(config))
    assert trained["train/divergence"] == pytest.approx(0, abs=1e-6)
    assert trained["train/grad_norm"] == pytest.approx(0, abs=1e-4)


def test_a_teacher_of_other_tokens_is_refused(tmp_path: Path, qwen3: Path, teacher: Path) -> None:
    small = tmp_path / "small"
    config = AutoConfig.from_pretrained(teacher)
    config.vocab_size = VOCAB - 1
    AutoModelForCausalLM.from_config(config).save_pretrained(small)
    with (
        pytest.raises(CheckpointError, match=rf"--teacher-load, got .*small with {VOCAB - 1} tokens: the student has"),
        trainer_for(config_of(qwen3, "gkd", teacher_load=str(small)), tmp_path),
    ):
        pass


def test_on_policy_distillation_takes_the_log_ratio_from_advantages(tmp_path: Path, qwen3: Path, teacher: Path) -> None:
    """-(A - c (log p - log p_teacher)) log p, as HF computes it."""
    batch = make_batch(micro_batches=2)
    model = AutoModelForCausalLM.from_pretrained(qwen3).train()
    ours = hf_log_probs(model, batch)
    with torch.no_grad():
        theirs = hf_log_probs(AutoModelForCausalLM.from_pretrained(teacher), batch)
    masks = np.split(batch.ragged["loss_mask"].astype(np.float32), np.cumsum(batch.rows["response_lengths"])[:-1])
    loss, gap, count = torch.zeros(()), 0.0, 0.0
    for row, (mine, other, mask) in enumerate(zip(ours, theirs, masks, strict=True)):
        advantage = float(batch.rows["rewards"][row]) - 0.3 * (mine - other).detach()
        weight = float(batch.rows["loss_weight"][row]) * torch.from_numpy(mask)
        loss = loss - (weight * advantage * mine).sum()
        gap += float((torch.from_numpy(mask) * (mine - other).detach()).sum())
        count += float(mask.sum())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss.backward()
    optimizer.step()
    config = config_for(qwen3, use_opd=True, opd_type="megatron", opd_kl_coef=0.3, teacher_load=str(teacher), **DESCENT)
    with trainer_for(config, tmp_path) as trainer:
        metrics = trainer.train(batch)
        weights = {name: tensor.clone() for name, tensor in trainer.named_weights()}
    assert metrics["train/teacher_kl"] == pytest.approx(gap / count, rel=1e-4)
    assert metrics["perf/teacher_log_probs_time"] > 0
    for name, tensor in model.state_dict().items():
        if name in weights:
            torch.testing.assert_close(weights[name], tensor, atol=2e-6, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- one's own loss


def reinforce(args: Any, tokens: LossInputs) -> tuple[torch.Tensor, dict[str, Any]]:
    """A loss for --custom-loss-function-path."""
    values = -args.eps_clip * tokens.advantages * tokens.log_probs
    return values, {"surprise": -tokens.log_probs.detach(), "constant": 2.0}


def wrong_shape(args: Any, tokens: LossInputs) -> tuple[torch.Tensor, dict[str, Any]]:
    return tokens.log_probs.mean(), {}


def wrong_result(args: Any, tokens: LossInputs) -> torch.Tensor:
    return tokens.log_probs


def custom(qwen3: Path, name: str, **flags: Any) -> Config:
    path = f"{__name__}.{name}"
    return config_for(qwen3, loss_type="custom_loss", custom_loss_function_path=path, **DESCENT, **flags)


def test_a_loss_of_ones_own_is_weighted_as_ours(tmp_path: Path, qwen3: Path) -> None:
    batch = make_batch(micro_batches=3)
    model = AutoModelForCausalLM.from_pretrained(qwen3).train()
    ours = hf_log_probs(model, batch)
    masks = np.split(batch.ragged["loss_mask"].astype(np.float32), np.cumsum(batch.rows["response_lengths"])[:-1])
    loss = torch.zeros(())
    for row, (mine, mask) in enumerate(zip(ours, masks, strict=True)):
        weight = float(batch.rows["loss_weight"][row]) * torch.from_numpy(mask)
        loss = loss - 0.25 * float(batch.rows["rewards"][row]) * (weight * mine).sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss.backward()
    optimizer.step()
    with trainer_for(custom(qwen3, "reinforce", eps_clip=0.25), tmp_path) as trainer:
        metrics = trainer.train(batch)
        weights = {name: tensor.clone() for name, tensor in trainer.named_weights()}
    assert metrics["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert metrics["train/custom/constant"] == pytest.approx(2.0)
    for name, tensor in model.state_dict().items():
        if name in weights:
            torch.testing.assert_close(weights[name], tensor, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "says"),
    [("wrong_shape", "return one loss for each token"), ("wrong_result", r"it returns \(token_losses, metrics\)")],
)
def test_a_loss_of_another_form_is_named(tmp_path: Path, qwen3: Path, name: str, says: str) -> None:
    with (
        trainer_for(custom(qwen3, name), tmp_path) as trainer,
        pytest.raises(HookError, match=rf"--custom-loss-function-path, got .*{says}"),
    ):
        trainer.train(make_batch())


def test_the_signature_is_checked_at_launch(qwen3: Path) -> None:
    config = custom(qwen3, "weights_of")
    (problem,) = [p for p in check(config) if "custom-loss" in str(p)]
    assert str(problem).startswith("--custom-loss-function-path, got ")
    assert not check(custom(qwen3, "reinforce"))
