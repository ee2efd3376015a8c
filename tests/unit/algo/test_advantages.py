"""GRPO advantages against numbers worked by hand, the paper's formula written plainly, and the conventions."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.algo import advantage_estimators, equal_reward_groups, grpo_advantages

REWARDS = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))


def reference(groups: list[list[float]], *, std: bool) -> list[float]:
    out = []
    for rewards in groups:
        if len(set(rewards)) == 1:
            out += [0.0] * len(rewards)
            continue
        mean = math.fsum(rewards) / len(rewards)
        scale = statistics.stdev(rewards) + 1e-6 if std else 1.0
        out += [(r - mean) / scale for r in rewards]
    return out


def flat(groups: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(groups), np.repeat(np.arange(len(groups)), [len(g) for g in groups])


def test_hand_worked():
    # mean 0.25; ddof 1: variance (3 * 0.0625 + 0.5625) / 3 = 0.25, std 0.5
    got = grpo_advantages(np.array([1.0, 0.0, 0.0, 0.0]), np.zeros(4, dtype=int))
    np.testing.assert_allclose(got, np.array([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-6), rtol=1e-14)


def test_without_std_is_centred_only():
    got = grpo_advantages(np.array([1.0, 0.0, 0.0, 0.0]), np.zeros(4, dtype=int), normalize_std=False)
    np.testing.assert_array_equal(got, [0.75, -0.25, -0.25, -0.25])


def test_without_baseline_rewards_pass_through_as_a_copy():
    rewards = np.array([0.7, 0.7, 3.0])
    got = grpo_advantages(rewards, np.array([0, 0, 1]), baseline=False)
    np.testing.assert_array_equal(got, rewards)
    got[0] = 9
    assert rewards[0] == 0.7


def test_eps_stands_outside_the_root():
    # std 1e-6 exactly: outside the root the result halves, inside it would hardly move
    rewards = np.array([0.0, math.sqrt(2) * 1e-6])
    got = grpo_advantages(rewards, np.zeros(2, dtype=int))
    np.testing.assert_allclose(got, np.array([-1, 1]) * math.sqrt(2) / 4, rtol=1e-9)


@pytest.mark.parametrize("value", [0.7, 0.1, -1 / 3, 1e9 / 3, 0.0])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("std", [True, False])
def test_identical_rewards_are_exactly_zero(value, dtype, std):
    got = grpo_advantages(np.full(12, value, dtype=dtype), np.zeros(12, dtype=int), normalize_std=std)
    assert (got == 0).all()


def test_rewards_equal_up_to_rounding_teach_nothing():
    rewards = np.array([0.3, 0.1 + 0.2, 1.1 - 0.8])
    assert len(set(rewards.tolist())) > 1
    assert (grpo_advantages(rewards, np.zeros(3, dtype=int)) == 0).all()


def test_small_but_real_differences_are_kept():
    got = grpo_advantages(np.array([1.0, 1.0 + 1e-9]), np.zeros(2, dtype=int))
    assert got[1] > 0 > got[0]


def test_group_of_one_is_zero_and_leaves_others_alone():
    got = grpo_advantages(np.array([5.0, 1.0, 0.0]), np.array([7, 3, 3]))
    assert got[0] == 0
    assert got[1] == -got[2] > 0


def test_no_trajectories():
    assert grpo_advantages(np.empty(0), np.empty(0, dtype=int)).shape == (0,)


@given(st.lists(st.lists(REWARDS, min_size=1, max_size=9), min_size=1, max_size=6), st.booleans())
def test_agrees_with_the_formula(groups, std):
    rewards, group = flat(groups)
    got = grpo_advantages(rewards, group, normalize_std=std)
    np.testing.assert_allclose(got, reference(groups, std=std), rtol=1e-7, atol=1e-9)


@given(st.lists(st.lists(REWARDS, min_size=1, max_size=9), min_size=1, max_size=6), st.randoms())
def test_order_of_trajectories_does_not_matter(groups, random):
    rewards, group = flat(groups)
    order = list(range(len(rewards)))
    random.shuffle(order)
    expected = grpo_advantages(rewards, group)[order]
    np.testing.assert_allclose(grpo_advantages(rewards[order], group[order] * 31 - 5), expected, rtol=1e-7, atol=1e-9)


def test_zero_std_groups_are_found():
    rewards, group = flat([[1.0, 1.0], [0.0, 1.0], [3.0]])
    np.testing.assert_array_equal(equal_reward_groups(rewards, group), [True, True, False, False, True])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_reward_is_refused(bad):
    with pytest.raises(ValueError, match="reward 1, got"):
        grpo_advantages(np.array([0.0, bad]), np.zeros(2, dtype=int))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="both must be"):
        grpo_advantages(np.zeros(3), np.zeros(2, dtype=int))


def test_chosen_by_name():
    assert advantage_estimators.get("grpo") is grpo_advantages
