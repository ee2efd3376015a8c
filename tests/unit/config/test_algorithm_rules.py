"""Which parts of the loss go together: each combination that is refused, with its line, and what defaults they bring."""

from __future__ import annotations

from typing import Any

import pytest

from miles.algo import advantage_estimators, aggregations, surrogates
from miles.algo.corrections import corrections
from miles.config import make_config
from miles.config.algorithms import BUILT_IN
from miles.config.rules import warnings

from .refusal import refused

WEIGHTS = {"acc": 1.0, "format": 0.2}
STEPS = {"rollout_batch_size": 4, "n_samples_per_prompt": 4, "num_steps_per_rollout": 1}

BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"policy_loss": "gpso"}, "--policy-loss, got gpso: there is no such name; did you mean gspo?"),
    (
        {"advantage_estimator": "best"},
        "--advantage-estimator, got best: there is no such name; choose one of grpo, gspo,",
    ),
    ({"loss_aggregation": "sum"}, "--loss-aggregation, got sum: there is no such name"),
    (
        {"advantage_estimator": "gspo", "policy_loss": "cispo"},
        "--policy-loss, got cispo: --advantage-estimator gspo is short for grpo with --policy-loss gspo; leave it out",
    ),
    (
        {"advantage_estimator": "rloo", "disable_grpo_std_normalization": True},
        "--disable-grpo-std-normalization, got true: --advantage-estimator rloo does not divide by a standard deviation",
    ),
    (
        {"advantage_estimator": "opo", "disable_rewards_normalization": True},
        "--disable-rewards-normalization, got true: --advantage-estimator opo has no switch for its baseline",
    ),
    (
        {"gamma": 0.9},
        "--gamma, got 0.9: --advantage-estimator grpo says the same of every token, so there is no return",
    ),
    ({"ref_update_interval": 2}, "--ref-update-interval, got 2: there is KL neither in the loss nor in the reward"),
    ({"ref_update_interval": 0, "use_kl_loss": True}, "--ref-update-interval, got 0: it must be"),
    ({"pass_at_k": 2}, "--pass-at-k, got 2: --advantage-estimator grpo does not read it; add --advantage-estimator"),
    ({"advantage_estimator": "pass_at_k"}, "--advantage-estimator, got pass_at_k: it does not know how many answers"),
    (
        {"advantage_estimator": "pass_at_k", "pass_at_k": 5, **STEPS},
        "--pass-at-k, got 5: a prompt has --n-samples-per-prompt 4 answers; give at most 4",
    ),
    ({"advantage_estimator": "gdpo"}, "--advantage-estimator, got gdpo: it normalises several rewards, each by itself"),
    ({"advantage_estimator": "remax", "group_rm": True, "custom_rm_path": "m.f"}, "--group-rm: the greedy answer that"),
    ({"reward_weights": {"acc": "much"}}, "--reward-weights, got acc: 'much': it is no weight; give a number"),
    ({"reward_weights": WEIGHTS, "reward_key": "acc"}, "--reward-key, got acc: --reward-weights has acc, format train"),
    ({"sapo_tau_pos": 2.0}, "--sapo-tau-pos, got 2: --policy-loss ppo_clip does not read it; take --policy-loss sapo"),
    ({"policy_loss": "cispo", "eps_clip_c": 3.0}, "--eps-clip-c, got 3: --policy-loss cispo does not read it; take"),
    ({"policy_loss": "dppo", "eps_clip": 0.3}, "--eps-clip, got 0.3: --policy-loss dppo does not clip the ratio"),
    ({"eps_clip_c": 1.0}, "--eps-clip-c, got 1: it must be more than 1"),
    (
        {"policy_loss": "two_sided", "two_sided_delta": 1.2, "eps_clip_high": 0.28},
        "--two-sided-delta, got 1.2: ratios are clipped at 1.28 already where that helps; give more than 1.28",
    ),
    ({"use_unbiased_kl": True}, "--use-unbiased-kl, got true: without --use-kl-loss the loss has no KL term"),
    ({"kl_loss_type": "k3"}, "--kl-loss-type, got k3: there is KL neither in the loss nor in the reward"),
    (
        {"kl_coef": 0.1, "use_kl_loss": True, "kl_loss_coef": 0.1},
        "--kl-coef, got 0.1: --kl-loss-coef 0.1 has the same KL in the loss, so it would count twice",
    ),
    (
        {"use_tis": True, "off_policy_correction": "geometric"},
        "--off-policy-correction, got geometric: --use-tis is short for token_truncate; give one of the two",
    ),
    (
        {"off_policy_correction": "icepop", "use_rollout_logprobs": True},
        "--off-policy-correction, got icepop: --use-rollout-logprobs takes the engine's log-probs as the old policy's",
    ),
    ({"policy_loss": "dppo", "use_tis": True}, "--use-tis: --policy-loss dppo has the engine's policy in its ratio"),
    ({"off_policy_correction": "icepop", "tis_clip": 0.4}, "--tis-clip-low, got 0.5: it is above --tis-clip 0.4"),
    ({"opsm_delta": 0.1}, "--opsm-delta, got 0.1: without --use-opsm no sequence is left out"),
    ({"use_opsm": True, **STEPS}, "--use-opsm: with one optimizer step per rollout the old policy is the new one"),
    ({"entropy_quantile": 0.0}, "--entropy-quantile, got 0: it must be more than 0 and at most 1"),
]


@pytest.mark.parametrize(("flags", "line"), BROKEN, ids=[line[:45] for _, line in BROKEN])
def test_a_combination_without_sense_is_refused_with_the_reason(flags: dict[str, Any], line: str) -> None:
    refused(flags, line)


ALLOWED: list[dict[str, Any]] = [
    {"advantage_estimator": "gspo", "policy_loss": "gspo"},
    {"advantage_estimator": "rloo", "policy_loss": "gspo"},
    {"advantage_estimator": "reinforce_plus_plus", "gamma": 0.99, "kl_coef": 0.01, "kl_loss_type": "k2"},
    {"advantage_estimator": "rloo", "kl_coef": 0.01, "use_kl_loss": True, "kl_loss_coef": 0.0},
    {"advantage_estimator": "gdpo", "reward_weights": WEIGHTS, "disable_grpo_std_normalization": True},
    {"policy_loss": "cispo", "eps_clip": 1.0, "eps_clip_high": 4.0, "off_policy_correction": "sequence_mask"},
    {"policy_loss": "sapo", "sapo_tau_neg": 2.0, "eps_clip": 0.2},  # the default asks for nothing
    {"use_opsm": True, "use_rollout_logprobs": True, **STEPS},
    {"use_tis": True, "off_policy_correction": "token_truncate"},
]


@pytest.mark.parametrize("flags", ALLOWED, ids=lambda flags: " ".join(flags))
def test_what_goes_together(flags: dict[str, Any]) -> None:
    make_config(**flags)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"policy_loss": "ppo_clip", "eps_clip_c": None, "normalize_advantages": False, "tis_clip": 2.0}),
        ({"advantage_estimator": "gspo"}, {"policy_loss": "gspo"}),
        ({"advantage_estimator": "reinforce_plus_plus"}, {"normalize_advantages": True}),
        (
            {"advantage_estimator": "reinforce_plus_plus", "normalize_advantages": False},
            {"normalize_advantages": False},
        ),
        ({"policy_loss": "dual_clip"}, {"eps_clip_c": 3.0}),
        ({"policy_loss": "dppo"}, {"dppo_threshold": 0.15}),
        ({"policy_loss": "dppo", "dppo_divergence": "kl"}, {"dppo_threshold": 0.05}),
        ({"use_tis": True}, {"off_policy_correction": "token_truncate", "tis_clip_low": 0.0, "tis_clip": 2.0}),
        ({"off_policy_correction": "icepop"}, {"tis_clip_low": 0.5, "tis_clip": 5.0}),
        ({"off_policy_correction": "geometric", "tis_clip": 1.01}, {"tis_clip_low": 0.999, "tis_clip": 1.01}),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_what_defaults_follow_from_the_choice(flags: dict[str, Any], expected: dict[str, Any]) -> None:
    grpo = make_config(**flags).grpo
    assert {name: getattr(grpo, name) for name in expected} == expected


def test_names_of_the_command_line_are_those_of_the_registries() -> None:
    registries = {
        "advantage_estimator": set(advantage_estimators),
        "policy_loss": set(surrogates),
        "off_policy_correction": set(corrections) - {"opsm"},
        "loss_aggregation": set(aggregations),
    }
    assert {name: set(names) for name, names in BUILT_IN.items()} == registries


def test_a_name_may_be_a_plugins() -> None:
    assert make_config(policy_loss="mine", plugin=("mine.py",)).grpo.policy_loss == "mine"


def test_warnings() -> None:
    alone = {"rollout_batch_size": 4, "n_samples_per_prompt": 1, "num_steps_per_rollout": 1}
    assert "a group of one" in warnings(make_config(**alone))[0]
    assert warnings(make_config(advantage_estimator="reinforce_plus_plus", **alone)) == ()
    assert "the paper takes --eps-clip 3e-4" in warnings(make_config(advantage_estimator="gspo"))[0]
