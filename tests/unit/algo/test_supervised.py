"""Supervised losses and divergences from a teacher, against sums written out in float64."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.algo.distillation import generalized_jsd, gkd_loss, with_remainder
from miles.algo.metrics import finish_metrics, merge_metrics
from miles.algo.supervised import sft_loss
from miles.errors import ConfigError
from miles.types import LossInputs


def make_inputs(
    log_probs: list[float], weights: list[float], rows: list[int], channel: list[int], channels: tuple[str, ...] = ()
) -> LossInputs:
    flat = torch.tensor(log_probs, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(weights, dtype=torch.float64)
    return LossInputs(
        log_probs=flat,
        old_log_probs=flat.detach(),
        advantages=torch.zeros_like(flat),
        loss_mask=weight != 0,
        token_weight=weight,
        row=torch.tensor(rows, dtype=torch.int64),
        num_rows=len(channel),
        channel=torch.tensor(channel, dtype=torch.int64),
        channels=channels,
    )


def test_cross_entropy_and_dft_by_hand() -> None:
    half, quarter = math.log(0.5), math.log(0.25)
    inputs = make_inputs([half, quarter, math.nan], [0.25, 0.75, 0.0], [0, 1, 1], [0, 1])
    outputs = sft_loss(inputs)
    assert outputs.loss.item() == pytest.approx(-0.25 * half - 0.75 * quarter)
    (grad,) = torch.autograd.grad(outputs.loss, inputs.log_probs)
    assert grad.tolist() == [-0.25, -0.75, 0.0]

    outputs = sft_loss(inputs, "dft")
    assert outputs.loss.item() == pytest.approx(-0.25 * 0.5 * half - 0.75 * 0.25 * quarter)
    (grad,) = torch.autograd.grad(outputs.loss, inputs.log_probs)
    assert grad.tolist() == pytest.approx([-0.25 * 0.5, -0.75 * 0.25, 0.0])
    # The metric is the likelihood, whatever is trained.
    assert finish_metrics(outputs.metrics)["nll"] == pytest.approx(-0.25 * half - 0.75 * quarter)


def test_channels_have_denominators_of_their_own() -> None:
    whole = sft_loss(make_inputs([-1.0, -2.0, -4.0], [0.2, 0.2, 0.6], [0, 0, 1], [0, 1], ("math", "code")))
    finished = finish_metrics(whole.metrics)
    assert finished["nll_math"] == pytest.approx(1.5)
    assert finished["nll_code"] == pytest.approx(4.0)
    assert finished["nll"] == pytest.approx(0.2 + 0.4 + 2.4)
    assert not any(name.endswith("#weight") for name in finished)

    parts = [
        sft_loss(make_inputs([-1.0, -2.0], [0.2, 0.2], [0, 0], [0], ("math", "code"))),
        sft_loss(make_inputs([-4.0], [0.6], [0], [1], ("math", "code"))),
    ]
    assert finish_metrics(merge_metrics(parts[0].metrics, parts[1].metrics)) == pytest.approx(finished)
    # A channel without tokens has no mean.
    assert "nll_code" not in finish_metrics(parts[0].metrics)


def test_distillation_tells_channels_apart() -> None:
    inputs = make_inputs([-1.0, -2.0, -4.0], [0.2, 0.2, 0.6], [0, 0, 1], [0, 1], ("math", "code"))
    divergence = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    finished = finish_metrics(gkd_loss(dataclasses.replace(inputs, divergence=divergence)).metrics)
    assert {name: finished[name] for name in finished if "_" in name and name != "scored_tokens"} == pytest.approx(
        {"divergence_math": 1.5, "divergence_code": 5.0, "nll_math": 1.5, "nll_code": 4.0}
    )


def test_nothing_to_train_on() -> None:
    for inputs in (make_inputs([], [], [], []), make_inputs([-math.inf], [0.0], [0], [0])):
        for kind in ("cross_entropy", "dft"):
            outputs = sft_loss(inputs, kind)
            assert outputs.loss.item() == 0
            (grad,) = torch.autograd.grad(outputs.loss, inputs.log_probs)
            assert grad.abs().sum() == 0


def test_unknown_kind_is_named() -> None:
    with pytest.raises(ConfigError, match="dft"):
        sft_loss(make_inputs([-1.0], [1.0], [0], [0]), "dtf")


# ------------------------------------------------------------------------------------------------------------ distillation


def table(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


STUDENT, TEACHER = [0.5, 0.25, 0.25], [0.1, 0.6, 0.3]


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_generalized_jsd_by_the_paper(beta: float) -> None:
    mixture = [beta * t + (1 - beta) * s for t, s in zip(TEACHER, STUDENT, strict=True)]
    expected = beta * kl(TEACHER, mixture) + (1 - beta) * kl(STUDENT, mixture)
    if beta in (0.0, 1.0):
        expected = kl(TEACHER, STUDENT) if beta == 0 else kl(STUDENT, TEACHER)
    found = generalized_jsd(table([STUDENT, TEACHER]), table([TEACHER, TEACHER]), beta)
    assert found[0].item() == pytest.approx(expected, abs=1e-12)
    assert found[1].item() == pytest.approx(0, abs=1e-12)


def test_symmetric_at_one_half() -> None:
    there = generalized_jsd(table([STUDENT]), table([TEACHER]), 0.5)
    back = generalized_jsd(table([TEACHER]), table([STUDENT]), 0.5)
    torch.testing.assert_close(there, back)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gradients_through_the_softmax(beta: float) -> None:
    logits = torch.tensor([[0.3, -1.0, 0.5], [2.0, 0.1, -0.4]], dtype=torch.float64, requires_grad=True)
    teacher = table([TEACHER, STUDENT])
    assert torch.autograd.gradcheck(lambda x: generalized_jsd(x.log_softmax(-1), teacher, beta), logits)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_impossible_tokens_leave_no_nan(beta: float) -> None:
    student = torch.tensor([[0.0, -math.inf, -1.0]], dtype=torch.float64, requires_grad=True)
    teacher = table([[0.5, 0.0, 0.5]])
    (grad,) = torch.autograd.grad(generalized_jsd(student, teacher, beta).sum(), student)
    assert grad.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.floats(0, 1))
def test_a_split_vocabulary_changes_nothing(cut: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(cut)
    student, teacher = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64).log_softmax(-1)
    whole = generalized_jsd(student, teacher, beta)
    other = generalized_jsd(student[:, cut:], teacher[:, cut:], beta)
    split = generalized_jsd(student[:, :cut], teacher[:, :cut], beta, lambda x: x + other)
    torch.testing.assert_close(split, whole)
    assert (whole >= -1e-12).all()


def test_top_k_with_remainder_is_a_distribution_and_a_lower_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 20, generator=generator, dtype=torch.float64).log_softmax(-1)
    top = teacher.topk(4, dim=-1).indices
    short_student, short_teacher = (with_remainder(x.gather(1, top)) for x in (student, teacher))
    torch.testing.assert_close(short_student.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    for beta in (0.0, 0.5, 1.0):
        assert (
            generalized_jsd(short_student, short_teacher, beta) <= generalized_jsd(student, teacher, beta) + 1e-12
        ).all()
    # All of the mass in the top tokens: finite, also where rounding makes it more than 1.
    assert with_remainder(torch.tensor([[0.0]])).isfinite().all()


def test_shapes_and_ranges_are_checked() -> None:
    with pytest.raises(ValueError, match="both must be"):
        generalized_jsd(torch.zeros(2, 3), torch.zeros(2, 4), 0.5)
    with pytest.raises(ValueError, match="beta"):
        generalized_jsd(torch.zeros(2, 3), torch.zeros(2, 3), 1.5)


def test_the_students_own_answers_are_not_imitated() -> None:
    inputs = make_inputs([-1.0, -2.0, -4.0], [0.25, 0.25, 0.5], [0, 0, 1], [0, 0])
    inputs = dataclasses.replace(inputs, divergence=torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    own = dataclasses.replace(inputs, own_answer=torch.tensor([False, True]))
    divergence = 0.25 * 0.1 + 0.25 * 0.2 + 0.5 * 0.3
    assert gkd_loss(own).loss.item() == pytest.approx(divergence)
    assert gkd_loss(inputs, 0.5).loss.item() == pytest.approx(divergence + 0.5 * (0.25 + 0.5 + 2.0))
    outputs = gkd_loss(own, 0.5)
    assert outputs.loss.item() == pytest.approx(divergence + 0.5 * (0.25 + 0.5))
    assert torch.autograd.grad(outputs.loss, own.log_probs)[0].tolist() == [-0.125, -0.125, 0.0]
    assert finish_metrics(outputs.metrics)["nll"] == pytest.approx(0.25 + 0.5 + 2.0)
