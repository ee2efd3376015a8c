"""KL estimators: values by hand, gradients, and that they estimate the KL of two known distributions."""

import math

import pytest
import torch

from miles.algo.kl import kl
from miles.errors import ConfigError

KINDS = ("k1", "k2", "k3", "low_var_kl")


def at(kind: str, d: float) -> float:
    return kl(kind, torch.tensor([0.0], dtype=torch.float64), torch.tensor([d], dtype=torch.float64)).item()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("k1", -0.5), ("k2", 0.125), ("k3", math.e**0.5 - 1.5), ("low_var_kl", math.e**0.5 - 1.5)],
)
def test_hand_worked_with_d_one_half(kind, expected):
    assert at(kind, 0.5) == pytest.approx(expected, rel=1e-12)


def test_sign_is_reference_minus_policy():
    log_probs, reference = torch.tensor([-1.0]), torch.tensor([-3.0])
    assert kl("k1", log_probs, reference).item() == 2.0


@pytest.mark.parametrize("kind", KINDS)
def test_zero_where_policies_agree(kind):
    x = torch.tensor([-2.5, -0.1], requires_grad=True)
    value = kl(kind, x, x.detach())
    assert (value == 0).all()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_unbiased(kind):
    """Summed over all tokens of a vocabulary with the policy's probabilities, k1 and k3 are the KL itself."""
    logits = torch.randn(2, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    policy, reference = logits.log_softmax(-1)
    expected = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * kl(kind, policy, reference)).sum(), expected)


def test_k3_is_never_negative_and_keeps_small_values():
    d = torch.linspace(-3, 3, 1001)
    assert (kl("k3", torch.zeros_like(d), d) >= 0).all()
    # exp(d) - 1 - d in float32 loses this altogether
    small = kl("k3", torch.zeros(1), torch.tensor([1e-3]))
    assert small.item() == pytest.approx(0.5e-6, rel=0.05)


@pytest.mark.parametrize("d", [50.0, 1e4])
def test_k3_stays_finite_and_is_not_clamped_itself(d):
    assert at("k3", d) == pytest.approx(math.exp(20) - 21)
    assert at("k3", -d) == pytest.approx(math.exp(-20) + 19)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient(kind):
    x = torch.linspace(-3, -0.2, 7, dtype=torch.float64, requires_grad=True)
    reference = torch.linspace(-0.1, -4, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl(kind, x, reference), (x,))


def test_unknown_name():
    with pytest.raises(ConfigError, match="did you mean 'low_var_kl'"):
        kl("low_var", torch.zeros(1), torch.zeros(1))
