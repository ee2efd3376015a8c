"""Flags of preference jobs: each changes the loss, and combinations that make no sense are refused with the reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from miles.algo.preference import pair_losses
from miles.cluster.placement import Layout
from miles.config import job_of, make_config
from miles.config.algorithms import AVERAGED_PAIR_LOSSES, PAIR_LOSSES, SMOOTHED_PAIR_LOSSES, WITHOUT_DIVERGENCE
from miles.config.groups import PreferenceArgs
from miles.config.jobs import READ_BY
from miles.errors import ConfigError
from miles.trainers.losses import build_loss
from miles.types import LossInputs


def _loss(loss_type: str, **flags: Any) -> float:
    """Of three pairs, or six rows, of unequal lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 5, 2, 2, 6, 1])
    log_probs, reference = -torch.rand(2, int(lengths.sum()), generator=generator, dtype=torch.float64) - 0.1
    inputs = LossInputs(
        log_probs=log_probs,
        old_log_probs=log_probs,
        advantages=torch.zeros_like(log_probs),
        loss_mask=torch.ones_like(log_probs, dtype=torch.bool),
        token_weight=torch.ones_like(log_probs),
        row=torch.repeat_interleave(torch.arange(6), lengths),
        num_rows=6,
        ref_log_probs=reference,
        row_weight=torch.full((6,), 1 / 6, dtype=torch.float64),
        chosen_rows=torch.tensor([0, 2, 5]),
        rejected_rows=torch.tensor([1, 3, 4]),
        desirable=torch.tensor([True, False, True, False, False, True]),
        kl_baseline=torch.tensor(0.1, dtype=torch.float64),
        scores=torch.tensor([0.3, -0.2, 1.0, 0.4, -0.6, 0.1], dtype=torch.float64),
    )
    return float(build_loss(make_config(loss_type=loss_type, **flags)).function(inputs).loss)


#: Flag -> the loss that reads it, what must be given with it, and a value that is not its default.
_FLAGS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "dpo_loss_type": ("dpo", {}, ("hinge",)),
    "dpo_loss_weights": ("dpo", {"dpo_loss_type": ("sigmoid", "ipo")}, (0.3, 2.0)),
    "beta": ("orpo", {}, 0.7),
    "label_smoothing": ("simpo", {}, 0.2),
    "reference_free": ("kto", {}, True),
    "average_log_prob": ("cpo", {}, True),
    "f_divergence": ("dpo", {}, "js_divergence"),
    "f_alpha_divergence_coef": ("dpo", {"f_divergence": "alpha_divergence"}, 0.9),
    "rpo_alpha": ("dpo", {}, 1.0),
    "ld_alpha": ("dpo", {}, 0.3),
    "discopop_tau": ("dpo", {"dpo_loss_type": ("discopop",)}, 0.4),
    "simpo_gamma": ("simpo", {}, 1.2),
    "cpo_alpha": ("cpo", {}, 0.1),
    "desirable_weight": ("kto", {}, 1.3),
    "undesirable_weight": ("kto", {}, 0.6),
    "center_rewards_coefficient": ("rm", {}, 0.5),
}


def test_every_preference_flag_is_tried() -> None:
    assert {*_FLAGS, "online_preferences", "precompute_ref_log_probs", "ref_log_probs_dir"} == {
        field.name for field in dataclasses.fields(PreferenceArgs)
    }
    assert set(_FLAGS) <= set(READ_BY)


@pytest.mark.parametrize("flag", _FLAGS)
def test_every_flag_changes_its_loss_and_no_other_job_takes_it(flag: str) -> None:
    loss_type, beside, value = _FLAGS[flag]
    plain = _loss(loss_type, **beside)
    assert _loss(loss_type, **beside, **{flag: value}) != pytest.approx(plain, rel=1e-6)
    for other in ("dpo", "kto", "orpo", "simpo", "cpo", "rm", "policy_loss", "sft_loss"):
        if other not in READ_BY[flag]:
            with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')}, got .* --loss-type {other} does not"):
                make_config(loss_type=other, **{flag: value})


@pytest.mark.parametrize("loss_type", READ_BY["beta"])
def test_beta_is_read_by_all(loss_type: str) -> None:
    assert _loss(loss_type, beta=0.9) != pytest.approx(_loss(loss_type), rel=1e-6)


def test_names_are_those_of_the_registry() -> None:
    assert set(PAIR_LOSSES) == set(pair_losses)
    assert set(SMOOTHED_PAIR_LOSSES) | set(WITHOUT_DIVERGENCE) | set(AVERAGED_PAIR_LOSSES) <= set(PAIR_LOSSES)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_the_tables_of_flags_are_true(name: str) -> None:
    """A pair loss changes with a flag exactly where the tables say that it reads it."""
    flags: dict[str, Any] = {"dpo_loss_type": (name,), **({"label_smoothing": 0.01} if name == "exo_pair" else {})}
    plain = _loss("dpo", **flags)
    for change, reads in (
        ({"label_smoothing": 0.1}, name in SMOOTHED_PAIR_LOSSES),
        ({"f_divergence": "forward_kl"}, name not in WITHOUT_DIVERGENCE),
        ({"average_log_prob": True}, name not in AVERAGED_PAIR_LOSSES),
    ):
        if reads:
            assert _loss("dpo", **flags | change) != pytest.approx(plain, rel=1e-9), change
        else:
            with pytest.raises(ConfigError, match=f"--{next(iter(change)).replace('_', '-')}, got"):
                make_config(loss_type="dpo", **flags | change)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"dpo_loss_type": ("sigmoid", "higne")},
            "--dpo-loss-type, got higne: there is no such name; did you mean hinge",
        ),
        ({"dpo_loss_type": ()}, "nothing would be trained"),
        ({"dpo_loss_weights": (1.0, 2.0)}, r"--dpo-loss-weights, got 1.0 2.0: --dpo-loss-type names 1; give as many"),
        ({"dpo_loss_weights": (float("nan"),)}, "--dpo-loss-weights, got nan: the loss would be no number"),
        ({"custom_eval_rollout_log_function_path": "a.py:f"}, "--loss-type dpo starts no engine"),
        ({"label_smoothing": 0.5}, "half of them wrong says nothing"),
        ({"label_smoothing": -0.1}, "give 0 to below 0.5"),
        ({"dpo_loss_type": ("exo_pair",)}, "exo_pair compares with the distribution"),
        ({"f_alpha_divergence_coef": 0.1}, "--f-divergence reverse_kl has no such number"),
        ({"discopop_tau": 0.1}, "--dpo-loss-type sigmoid does not read it"),
        ({"beta": 0.0}, "--beta, got 0: it must be more than 0"),
        ({"ld_alpha": 1.1}, "--ld-alpha, got 1.1: it must be at least 0 and at most 1"),
        ({"loss_aggregation": "token_mean"}, "a mean over pairs or answers, not over tokens"),
        ({"calculate_per_token_loss": True}, "a mean over pairs or answers, not over tokens"),
        ({"ref_log_probs_dir": "x"}, "nothing is computed without --precompute-ref-log-probs"),
        (
            {"precompute_ref_log_probs": True, "reference_free": True},
            "with --reference-free there is nothing to compute",
        ),
        ({"loss_type": "kto", "precompute_ref_log_probs": True}, "--loss-type kto does not read it"),
        ({"label_key": "winner"}, "reads the columns chosen and rejected"),
        ({"rollout_temperature": 0.5}, "--loss-type dpo starts no engine"),
        ({"rm_type": "math"}, "--loss-type dpo scores nothing"),
        ({"eps_clip": 0.1}, "--loss-type dpo has no advantages"),
    ],
)
def test_what_makes_no_sense_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**{"loss_type": "dpo", **flags})


def test_kto_has_others_to_compare_with() -> None:
    make_config(loss_type="kto", rollout_batch_size=4, num_steps_per_rollout=2)
    with pytest.raises(
        ConfigError, match=r"--rollout-batch-size, got 4: an optimizer step has 1 of them, .*; give at least 8"
    ):
        make_config(loss_type="kto", rollout_batch_size=4, num_steps_per_rollout=4)


_ONLINE: dict[str, Any] = {
    "online_preferences": True,
    "rm_type": "exact",
    "rollout_batch_size": 4,
    "n_samples_per_prompt": 4,
}


def test_online_preferences_come_from_engines_and_rewards() -> None:
    config = make_config(loss_type="dpo", **_ONLINE, rollout_temperature=0.7)
    job = job_of(config)
    assert (job.rows, job.engines, job.rewards, job.preference) == ("prompts", True, True, "pairs")
    assert Layout.of(config).engine_bundles
    assert not job_of(make_config(loss_type="dpo")).engines


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"n_samples_per_prompt": 1}, "--n-samples-per-prompt, got 1: a pair is the best and the worst"),
        ({"rollout_batch_size": 6, "num_steps_per_rollout": 4}, "--num-steps-per-rollout, got 4: the 6 prompts"),
        ({"eps_clip": 0.1}, "--loss-type dpo has no advantages"),
        ({"precompute_ref_log_probs": True}, "answers of the engines are not known at launch"),
        ({"overlong_rows": "drop"}, "with --online-preferences the engines answer prompts"),
        ({"loss_type": "policy_loss"}, "--online-preferences, got true: --loss-type policy_loss does not read it"),
    ],
)
def test_what_makes_no_sense_online_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**{"loss_type": "dpo", **_ONLINE, **flags})


def test_the_reference_is_loaded_where_the_loss_has_one() -> None:
    needs = {name: build_loss(make_config(loss_type=name)).needs_reference for name in READ_BY["beta"]}
    assert needs == {"dpo": True, "kto": True, "orpo": False, "simpo": False, "cpo": False}
    assert not build_loss(make_config(loss_type="dpo", reference_free=True)).needs_reference
