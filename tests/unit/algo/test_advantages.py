"""Estimators against numbers worked by hand, plain references written from the papers, and the conventions."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.algo import AdvantageSpec, Outcomes, advantage_estimators, equal_reward_groups

REWARDS = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))
GROUPS = st.lists(st.lists(REWARDS, min_size=1, max_size=7), min_size=1, max_size=5)
#: Estimators that compare within a group, with what they need beside rewards.
GROUP_RELATIVE = ("grpo", "gspo", "rloo", "reinforce_plus_plus_baseline", "gdpo", "maxrl", "opo", "pass_at_k")


def estimate(name, rewards, group, **spec) -> np.ndarray:
    rewards, group = np.asarray(rewards), np.asarray(group, dtype=int)
    outcomes = Outcomes(
        rewards, group, lengths=1 + np.arange(len(rewards)) % 3, parts={"a": rewards}, greedy=np.zeros(len(rewards))
    )
    return advantage_estimators.get(name)(outcomes, AdvantageSpec(**spec))


def grpo(rewards, group, **spec):
    return estimate("grpo", rewards, group, **spec)


def one_group(name, rewards, **spec):
    return estimate(name, np.array(rewards, dtype=float), np.zeros(len(rewards)), **spec)


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


# ----------------------------------------------------------------------------------------------------------------- grpo


def test_hand_worked():
    # mean 0.25; ddof 1: variance (3 * 0.0625 + 0.5625) / 3 = 0.25, std 0.5
    got = one_group("grpo", [1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(got, np.array([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-6), rtol=1e-14)


def test_without_std_is_centred_only():
    got = one_group("grpo", [1.0, 0.0, 0.0, 0.0], normalize_std=False)
    np.testing.assert_array_equal(got, [0.75, -0.25, -0.25, -0.25])


@pytest.mark.parametrize(("name", "spec"), [("grpo", {"baseline": False}), ("reinforce_plus_plus", {})])
def test_without_baseline_rewards_pass_through_as_a_copy(name, spec):
    outcomes = Outcomes(np.array([0.7, 0.7, 3.0]), np.array([0, 0, 1]))
    got = advantage_estimators.get(name)(outcomes, AdvantageSpec(**spec))
    np.testing.assert_array_equal(got, outcomes.rewards)
    got[0] = 9
    assert outcomes.rewards[0] == 0.7


def test_eps_stands_outside_the_root():
    # std 1e-6 exactly: outside the root the result halves, inside it would hardly move
    got = one_group("grpo", [0.0, math.sqrt(2) * 1e-6])
    np.testing.assert_allclose(got, np.array([-1, 1]) * math.sqrt(2) / 4, rtol=1e-9)


def test_small_but_real_differences_are_kept():
    got = one_group("grpo", [1.0, 1.0 + 1e-9])
    assert got[1] > 0 > got[0]


@given(GROUPS, st.booleans())
def test_agrees_with_the_formula(groups, std):
    rewards, group = flat(groups)
    got = grpo(rewards, group, normalize_std=std)
    np.testing.assert_allclose(got, reference(groups, std=std), rtol=1e-7, atol=1e-9)


# ----------------------------------------------------------------------------------------------- what all of them share


@pytest.mark.parametrize("name", GROUP_RELATIVE)
@pytest.mark.parametrize("value", [0.7, 0.1, 1e9 / 3, 0.0])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_identical_rewards_are_exactly_zero(name, value, dtype):
    assert (estimate(name, np.full(12, value, dtype=dtype), np.zeros(12)) == 0).all()


@pytest.mark.parametrize("name", GROUP_RELATIVE)
def test_rewards_equal_up_to_rounding_teach_nothing(name):
    rewards = [0.3, 0.1 + 0.2, 1.1 - 0.8]
    assert len(set(rewards)) > 1
    assert (one_group(name, rewards) == 0).all()


@pytest.mark.parametrize("name", set(GROUP_RELATIVE) - {"gdpo"})
def test_group_of_one_is_zero_and_leaves_others_alone(name):
    got = estimate(name, [5.0, 1.0, 0.0], [7, 3, 3])
    assert got[0] == 0
    assert got[1] > 0 > got[2]


@pytest.mark.parametrize("name", advantage_estimators)
def test_no_trajectories(name):
    assert estimate(name, np.empty(0), np.empty(0)).shape == (0,)


@pytest.mark.parametrize("name", advantage_estimators)
@given(groups=GROUPS, random=st.randoms())
def test_order_of_trajectories_does_not_matter(name, groups, random):
    rewards, group = flat(groups)
    if name == "maxrl":
        rewards = np.abs(rewards)
    order = list(range(len(rewards)))
    random.shuffle(order)
    lengths, greedy = np.arange(len(rewards)) % 5, np.cos(np.arange(len(rewards)))
    spec = AdvantageSpec(k=1)

    def run(pick, group_names):
        outcomes = Outcomes(
            rewards[pick], group_names[pick], lengths[pick], {"a": rewards[pick], "b": greedy[pick]}, greedy[pick]
        )
        return advantage_estimators.get(name)(outcomes, spec)

    expected = run(np.arange(len(rewards)), group)[order]
    np.testing.assert_allclose(run(order, group * 31 - 5), expected, rtol=1e-6, atol=1e-8)


def test_zero_std_groups_are_found():
    rewards, group = flat([[1.0, 1.0], [0.0, 1.0], [3.0]])
    np.testing.assert_array_equal(equal_reward_groups(rewards, group), [True, True, False, False, True])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", ["rewards", "greedy", "parts"])
def test_non_finite_values_are_refused(bad, column):
    values = np.array([0.0, bad])
    columns = {"rewards": np.zeros(2)} | {column: {"a": values} if column == "parts" else values}
    with pytest.raises(ValueError, match="of trajectory 1, got"):
        Outcomes(group=np.zeros(2, dtype=int), **columns)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="both must be"):
        Outcomes(np.zeros(3), np.zeros(2, dtype=int))
    with pytest.raises(ValueError, match="length, got shape"):
        Outcomes(np.zeros(2), np.zeros(2, dtype=int), lengths=np.zeros(3))


@pytest.mark.parametrize(("name", "what"), [("remax", "greedy"), ("opo", "lengths"), ("gdpo", "rewards, got one")])
def test_what_an_estimator_needs_is_named(name, what):
    with pytest.raises(ValueError, match=what):
        advantage_estimators.get(name)(Outcomes(np.zeros(2), np.zeros(2, dtype=int)), AdvantageSpec())


# ------------------------------------------------------------------------------------------------------ one by one


def test_rloo_is_the_mean_of_the_others():
    got = estimate("rloo", [1.0, 0.0, 4.0, 2.0, 3.0], [0, 0, 0, 1, 1])
    np.testing.assert_allclose(got, [1 - 2, 0 - 2.5, 4 - 0.5, -1, 1])


def test_reinforce_plus_plus_baseline_is_centred():
    np.testing.assert_allclose(one_group("reinforce_plus_plus_baseline", [3.0, 1.0, 2.0]), [1, -1, 0])


def test_maxrl_divides_by_the_success_rate():
    np.testing.assert_allclose(one_group("maxrl", [1, 0, 0, 0]), [3, -1, -1, -1])
    assert (one_group("maxrl", [0, 0, 0]) == 0).all()
    with pytest.raises(ValueError, match=r"reward of trajectory 1, got -1.0: maxrl"):
        one_group("maxrl", [1, -1])


def test_maxrl_gradient_is_the_mean_over_successes():
    """`sum A_i g_i / N = mean over successes of g - mean over all of g`, for any score vectors g."""
    rewards, scores = np.array([1.0, 0, 1, 0, 0, 1]), np.random.default_rng(0).normal(size=(6, 3))
    got = one_group("maxrl", rewards) @ scores / 6
    np.testing.assert_allclose(got, scores[rewards == 1].mean(0) - scores.mean(0))


def test_remax_may_be_negative_for_a_whole_group():
    outcomes = Outcomes(np.array([0.0, 0.5, 1.0]), np.array([0, 0, 1]), greedy=np.array([1.0, 1.0, 0.0]))
    np.testing.assert_array_equal(advantage_estimators.get("remax")(outcomes, AdvantageSpec()), [-1, -0.5, 1])


def test_opo_weights_its_baseline_by_length():
    outcomes = Outcomes(np.array([1.0, 0.0, 2.0]), np.zeros(3, dtype=int), lengths=np.array([1, 3, 4]))
    # (1 * 1 + 3 * 0 + 4 * 2) / 8 = 9/8
    np.testing.assert_allclose(advantage_estimators.get("opo")(outcomes, AdvantageSpec()), [-1 / 8, -9 / 8, 7 / 8])
    empty = Outcomes(np.array([1.0, 0.0]), np.zeros(2, dtype=int), lengths=np.zeros(2))
    assert (advantage_estimators.get("opo")(empty, AdvantageSpec()) == 0).all()


def test_gdpo_normalises_each_reward_then_the_batch():
    a, b = np.array([1.0, 0, 5, 5]), np.array([0.0, 10, 2, 1])
    group = np.array([0, 0, 1, 1])
    z = 1 / math.sqrt(2)  # of two values, ddof 1
    summed = np.array([2 * z - z, -2 * z + z, z, -z])  # weights 2 and 1; `a` says nothing in group 1
    expected = (summed - summed.mean()) / summed.std(ddof=1)
    outcomes = Outcomes(2 * a + b, group, parts={"a": a, "b": b})
    got = advantage_estimators.get("gdpo")(outcomes, AdvantageSpec(weights={"a": 2.0, "b": 1.0}))
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_gdpo_tells_apart_what_a_sum_of_rewards_cannot():
    """Two rewards that cancel in the sum: (1, 0) and (0, 1) of scales 1 and 10 differ in GDPO's advantage."""
    a, b, group = np.array([1.0, 0, 0, 0]), np.array([0, 1.0, 0, 0]), np.zeros(4, dtype=int)
    got = advantage_estimators.get("gdpo")(Outcomes(a + b, group, parts={"a": a, "b": b}), AdvantageSpec())
    assert got[0] == pytest.approx(got[1])
    many = advantage_estimators.get("gdpo")(Outcomes(a + 10 * b, group, parts={"a": a, "b": 10 * b}), AdvantageSpec())
    np.testing.assert_allclose(many, got, rtol=1e-4)


def best_of_k_reference(rewards, k) -> np.ndarray:
    """Every subset written out, as the paper's groups."""
    subsets = list(itertools.combinations(range(len(rewards)), k))
    best = np.array([max(rewards[i] for i in subset) for subset in subsets])
    if best.std() < 1e-12:
        return np.zeros(len(rewards))
    z = (best - best.mean()) / best.std()
    return np.array([np.mean([z[s] for s, subset in enumerate(subsets) if i in subset]) for i in range(len(rewards))])


@given(st.lists(st.sampled_from([0.0, 1.0, 0.25, -3.0]), min_size=1, max_size=7), st.integers(1, 7))
def test_pass_at_k_is_the_mean_over_all_subsets(rewards, k):
    # Answers that failed may leave a group without a single subset: it teaches nothing, and ends no run.
    expected = best_of_k_reference(rewards, k) if k <= len(rewards) else np.zeros(len(rewards))
    np.testing.assert_allclose(one_group("pass_at_k", rewards, k=k), expected, atol=1e-9)


def test_pass_at_k_of_successes_and_failures_is_the_papers_closed_form():
    rewards, k, size, failures = np.array([1.0, 0, 0, 0, 1, 0]), 3, 6, 4
    mean = 1 - math.comb(failures, k) / math.comb(size, k)
    std = math.sqrt(mean * (1 - mean))
    success = (1 - mean) / std
    failure = (1 - mean - math.comb(failures - 1, k - 1) / math.comb(size - 1, k - 1)) / std
    got = one_group("pass_at_k", rewards, k=k)
    np.testing.assert_allclose(got, np.where(rewards == 1, success, failure))
    assert got.sum() == pytest.approx(0, abs=1e-12)


def test_chosen_by_name():
    expected = {*GROUP_RELATIVE, "ppo", "reinforce_plus_plus", "remax"}
    assert set(advantage_estimators) == expected
    assert advantage_estimators.get("gspo") is advantage_estimators.get("grpo")
