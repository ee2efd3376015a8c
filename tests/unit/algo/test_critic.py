"""The critic's loss and how good it is: hand-worked numbers, GAE of rows against a loop, splits over ranks, poison."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from miles.algo import TokenAdvantageSpec, critic_advantages, critic_loss, explained_variance, finish_metrics
from miles.algo.kl import kl

MASK = torch.tensor([True, True, False, True, True])
WEIGHT = torch.tensor([0.25, 0.25, 0.0, 0.25, 0.25])


def test_critic_loss_worked_by_hand() -> None:
    """Errors 1, 2 (held at 1 + 0.5, whose error is larger: 2.5), masked, 0.5, 0."""
    values = torch.tensor([1.0, 2.0, math.nan, 0.5, 3.0], requires_grad=True)
    old = torch.tensor([1.0, 1.0, math.inf, 0.5, 3.0])
    returns = torch.tensor([0.0, 4.0, math.nan, 0.0, 3.0])
    outputs = critic_loss(values, old, returns, MASK, WEIGHT, clip=0.5)
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(0.25 * 0.5 * (1 + 2.5**2 + 0.25 + 0))
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.25, 0.0, 0.0, 0.125, 0.0])
    finished = finish_metrics(outputs.metrics)
    assert finished["value_clipfrac"] == pytest.approx(0.25)
    assert finished["value_loss"] == finished["loss"] == pytest.approx(outputs.loss.item())


def test_without_a_token_the_loss_is_zero_with_a_gradient_of_zero() -> None:
    values = torch.full((3,), math.nan, requires_grad=True)
    none = torch.zeros(3, dtype=torch.bool)
    outputs = critic_loss(values, values, values, none, torch.zeros(3), clip=0.2)
    outputs.loss.backward()
    assert outputs.loss.item() == 0
    assert values.grad is not None
    assert not values.grad.any()


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, math.nan, 3.0, 6.0])
    assert explained_variance(returns, returns, MASK) == 1
    assert explained_variance(torch.full((5,), 7.0), returns, MASK) == pytest.approx(0)  # a bias is not held against it
    assert explained_variance(-returns, returns, MASK) == pytest.approx(-3)
    assert explained_variance(returns, torch.full((5,), 0.7), MASK) is None
    assert explained_variance(returns, returns, torch.zeros(5, dtype=torch.bool)) is None


def test_explained_variance_is_of_all_ranks_together() -> None:
    values, returns = torch.randn(40, generator=torch.Generator().manual_seed(0)), torch.arange(40.0)
    mask = torch.arange(40) % 3 != 0
    parts = [slice(0, 0), slice(0, 7), slice(7, 40)]
    pending: list[list[torch.Tensor]] = []
    # What each rank hands to the collectives is found by running it alone; then all are given the sums.
    for number in range(2):
        sums: list[torch.Tensor] = []
        for part in parts:
            calls = iter([torch.stack(done).sum(0) for done in pending])
            handed: list[torch.Tensor] = []

            def reduce(tensor: torch.Tensor, calls=calls, handed=handed) -> torch.Tensor:
                handed.append(tensor)
                return next(calls, tensor)

            explained_variance(values[part], returns[part], mask[part], reduce)
            sums.append(handed[number])
        pending.append(sums)
    whole = explained_variance(values, returns, mask)
    for part in parts:
        totals = iter([torch.stack(done).sum(0) for done in pending])
        assert explained_variance(
            values[part], returns[part], mask[part], lambda _, t=totals: next(t)
        ) == pytest.approx(whole)


@pytest.mark.parametrize("whiten", [False, True])
def test_advantages_and_returns_agree_with_the_loop(whiten: bool) -> None:
    generator = np.random.default_rng(0)
    lengths = [4, 1, 6, 3]
    row = np.repeat(np.arange(4), lengths)
    mask = generator.random(len(row)) > 0.3
    rewards, values = generator.normal(size=4), generator.normal(size=len(row))
    old, reference = generator.normal(size=(2, len(row)))
    spec = TokenAdvantageSpec(kl_coef=0.1, kl_type="k2", gamma=0.9, lambd=0.8, whiten=whiten)
    poison = np.where(mask, 0.0, np.nan)
    got = critic_advantages(
        *(torch.from_numpy(x) for x in (rewards, values + poison, mask, row)),
        spec,
        old_log_probs=torch.from_numpy(old + poison),
        ref_log_probs=torch.from_numpy(reference + poison),
    )
    penalty = 0.1 * kl("k2", torch.from_numpy(old), torch.from_numpy(reference)).numpy()
    advantages, returns = np.zeros(len(row)), np.zeros(len(row))
    for number in range(4):
        later, following, terminal = 0.0, 0.0, rewards[number]
        for t in reversed(np.flatnonzero((row == number) & mask)):
            later = terminal - penalty[t] + 0.9 * following - values[t] + 0.9 * 0.8 * later
            advantages[t], returns[t] = later, later + values[t]
            following, terminal = values[t], 0.0
    if whiten:
        advantages[mask] = (advantages[mask] - advantages[mask].mean()) / advantages[mask].std()
    np.testing.assert_allclose(got[0].numpy(), advantages, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1].numpy(), returns, rtol=1e-5, atol=1e-6)
    assert spec.lambd is not None
    assert not TokenAdvantageSpec(lambd=1.0).is_identity


def test_a_kl_penalty_needs_its_columns() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="old_log_probs, got None: --kl-coef needs it"):
        critic_advantages(
            one, one, one.bool(), torch.zeros(1, dtype=torch.int64), TokenAdvantageSpec(kl_coef=0.1, lambd=1.0)
        )
