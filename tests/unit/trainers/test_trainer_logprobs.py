"""Token scores against torch's own log-softmax, in float64, whatever the chunking."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from miles.trainers.megatron.logprobs import Vocabulary, token_scores


def _reference(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperatures: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    temperatures = torch.where(temperatures == 0, 1.0, temperatures)
    table = torch.log_softmax(hidden @ weight.t() / temperatures[:, None], -1)
    return table.gather(1, targets[:, None]).squeeze(1), -(table.exp() * table).sum(-1)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 17),
    chunk=st.sampled_from([-1, 1, 2, 5, 16, 100]),
    padding=st.integers(0, 3),
    use_entropy=st.booleans(),
    seed=st.integers(0, 999),
)
def test_values_and_gradients_equal_log_softmax(
    tokens: int, chunk: int, padding: int, use_entropy: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 6, generator=generator).requires_grad_()
    weight = torch.randn(11 + padding, 6, generator=generator).requires_grad_()
    targets = torch.randint(0, 11, (tokens,), generator=generator)
    temperatures = torch.tensor([0.0, 0.7, 1.0, 2.0])[torch.randint(0, 4, (tokens,), generator=generator)]
    up, up_entropy = torch.randn(2, tokens, generator=generator)

    scores = token_scores(hidden, weight, targets, temperatures, Vocabulary(rows=11), chunk)
    ((scores.log_probs * up).sum() + use_entropy * (scores.entropies * up_entropy).sum()).backward()

    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight[:11]))
    log_probs, entropies = _reference(exact_hidden, exact_weight, targets, temperatures.double())
    ((log_probs * up).sum() + use_entropy * (entropies * up_entropy).sum()).backward()

    torch.testing.assert_close(scores.log_probs.double(), log_probs, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(scores.entropies.double(), entropies, atol=2e-6, rtol=1e-5)
    assert hidden.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(weight.grad[:11].double(), exact_weight.grad, atol=1e-5, rtol=1e-5)
    assert not weight.grad[11:].any()


def test_entropy_without_a_bonus_leaves_the_gradient_alone() -> None:
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6)
    scores = token_scores(hidden, weight, torch.arange(4), torch.ones(4), Vocabulary(), 2)
    (alone,) = torch.autograd.grad(scores.log_probs.sum(), hidden)
    scores = token_scores(hidden, weight, torch.arange(4), torch.ones(4), Vocabulary(), 2)
    (with_zero,) = torch.autograd.grad(scores.log_probs.sum() + 0 * scores.entropies.sum(), hidden)
    torch.testing.assert_close(alone, with_zero)


def test_the_full_logits_are_never_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Largest matrix made in forward or backward, with chunks of 8 of 64 tokens."""
    sizes: list[int] = []
    softmax = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda x, dim: sizes.append(x.shape[0]) or softmax(x, dim))  # type: ignore[func-returns-value]
    hidden = torch.randn(64, 6, requires_grad=True)
    scores = token_scores(
        hidden, torch.randn(50, 6), torch.zeros(64, dtype=torch.int64), torch.ones(64), Vocabulary(), 8
    )
    saved = [t for t in scores.log_probs.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    scores.log_probs.sum().backward()
    assert sizes == [8] * 16
    assert max(t.numel() for t in saved) < 64 * 50


def test_a_chunk_size_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_tokens, got 0"):
        token_scores(
            torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.int64), torch.ones(1), Vocabulary(), 0
        )


class _Live(TorchDispatchMode):
    """Counts elements of tensors that operations made and that are not gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {part.untyped_storage().data_ptr() for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)}
        for part in tree_leaves(out):
            if isinstance(part, Tensor) and part.untyped_storage().data_ptr() not in given:
                self.now += part.numel()
                self.peak = max(self.peak, self.now)
                weakref.finalize(part, self._gone, part.numel())
        return out

    def _gone(self, elements: int) -> None:
        self.now -= elements


def test_memory_of_a_long_sequence_is_bounded_by_the_chunk() -> None:
    """Forward and backward pass, 2,048 tokens, a vocabulary of 1,000, 32 tokens at once."""
    hidden, weight = torch.randn(2048, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    targets, temperatures = torch.randint(0, 1000, (2048,)), torch.ones(2048)

    def peak(chunk: int) -> int:
        with _Live() as live:
            scores = token_scores(hidden, weight, targets, temperatures, Vocabulary(), chunk)
            (scores.log_probs.sum() + scores.entropies.sum()).backward()
        return live.peak

    table, rest = 32 * 1000, 3 * (hidden.numel() + weight.numel()) + 8 * 2048
    assert peak(32) < 5 * table + rest
    assert peak(-1) > 2 * 2048 * 1000, "it sees what is not cut into chunks"
