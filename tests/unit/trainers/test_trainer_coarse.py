"""Distributions coarsened to a teacher's top tokens, against whole tables in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.algo.distillation import generalized_jsd
from miles.trainers.megatron import coarse
from miles.trainers.megatron.coarse import TopTokens, coarse_divergence, coarse_log_probs
from miles.trainers.megatron.logprobs import Vocabulary

VOCAB = 11


def tensors(tokens: int, padding: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [R, 6], weight [V + padding, 6], the teacher's log-probs [R, V]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 6, generator=generator)
    weight = torch.randn(VOCAB + padding, 6, generator=generator)
    teacher = (2 * torch.randn(tokens, VOCAB, generator=generator)).log_softmax(-1)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher


def top_of(teacher: torch.Tensor, k: int) -> TopTokens:
    values, ids = teacher.topk(k, dim=-1)
    return TopTokens(ids, values)


def exact(table: torch.Tensor, ids: torch.Tensor, *, with_rest: bool) -> torch.Tensor:
    """The same by a table of probabilities in float64."""
    probs = table.double().exp()
    own = probs.gather(1, ids)
    others = probs.scatter(1, ids, 0.0).sum(1, keepdim=True)
    return (torch.cat([own, others], 1) if with_rest else own).log()


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 13),
    k=st.integers(1, VOCAB),
    chunk=st.sampled_from([-1, 1, 2, 5, 100]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_values_and_gradients_are_those_of_whole_tables(
    tokens: int, k: int, chunk: int, padding: int, seed: int
) -> None:
    hidden, weight, teacher = tensors(tokens, padding, seed)
    ids, with_rest = top_of(teacher, k).ids, k < VOCAB
    found = coarse_log_probs(hidden, weight, ids, Vocabulary(rows=VOCAB), with_rest=with_rest, chunk_tokens=chunk)
    assert found.shape == (tokens, k + with_rest)
    up = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed + 1))
    (found * up).sum().backward()

    own_hidden, own_weight = (t.detach().double().requires_grad_() for t in (hidden, weight[:VOCAB]))
    expected = exact((own_hidden @ own_weight.t()).log_softmax(-1), ids, with_rest=with_rest)
    (expected * up).sum().backward()
    torch.testing.assert_close(found.double(), expected, atol=5e-6, rtol=1e-5)
    assert hidden.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(hidden.grad.double(), own_hidden.grad, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(weight.grad[:VOCAB].double(), own_weight.grad, atol=2e-5, rtol=1e-4)
    assert not weight.grad[VOCAB:].any()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_all_tokens_are_the_whole_divergence_and_fewer_a_lower_bound(beta: float) -> None:
    hidden, weight, teacher = tensors(9, 2, seed=4)
    student = (hidden @ weight[:VOCAB].t()).log_softmax(-1)
    whole = generalized_jsd(student, teacher, beta)
    (slope,) = torch.autograd.grad(whole.sum(), hidden, retain_graph=True)
    before = torch.zeros(9)
    for k in range(1, VOCAB + 1):
        own = coarse_divergence(
            hidden, weight, top_of(teacher, k), Vocabulary(rows=VOCAB), vocab_size=VOCAB, beta=beta, chunk_tokens=4
        )
        # A rest of the teacher of 1e-6 is known to a tenth in float32.
        assert (own >= before - 1e-3).all(), "every further token can only bring it closer"
        assert (own <= whole + 1e-3).all()
        before = own
    torch.testing.assert_close(own, whole, atol=1e-6, rtol=1e-5)
    (coarse_slope,) = torch.autograd.grad(own.sum(), hidden)
    torch.testing.assert_close(coarse_slope, slope, atol=1e-6, rtol=1e-4)


def test_a_rest_that_rounds_to_nothing_still_has_a_gradient() -> None:
    """The student is all but certain of the teacher's token: 1 - p is 0 in float32, and the rest must grow all the same."""
    weight = torch.eye(4)
    hidden = torch.tensor([[60.0, 0.0, 0.0, 0.0]], requires_grad=True)
    teacher = TopTokens(torch.tensor([[0]]), torch.tensor([[0.5]]).log())
    found = coarse_divergence(hidden, weight, teacher, Vocabulary(), vocab_size=4, beta=0.0)
    # T = (1/2, 1/2), S = (1, 3 e^-60): KL(T, S) = -log 2 + (60 - log 3) / 2
    assert found.item() == pytest.approx(-0.693147 + (60 - 1.098612) / 2, rel=1e-5)
    (slope,) = torch.autograd.grad(found.sum(), hidden)
    assert slope[0].tolist() == pytest.approx([0.5, -1 / 6, -1 / 6, -1 / 6], abs=1e-6)


def test_no_table_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    table_of = coarse.log_softmax_of

    def noted(hidden: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(len(hidden))
        return table_of(hidden, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(coarse, "log_softmax_of", noted)
    hidden, weight, teacher = tensors(13, 0, seed=1)
    coarse_log_probs(hidden, weight, top_of(teacher, 3).ids, Vocabulary(), chunk_tokens=5).sum().backward()
    assert sizes == [5, 5, 3] * 2
