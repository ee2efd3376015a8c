"""Which parts of the loss go together: advantage x policy loss x aggregation x corrections x regularisers.

A combination that makes no sense is refused at launch with the reason; so is a flag that the chosen parts do not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from .algorithms import BUILT_IN, LOSS_FLAGS, WHITENED_ESTIMATORS, WITHOUT_CLIP, WITHOUT_GROUP
from .fields import fields, flatten, show
from .groups import Config
from .planned import planned_choice
from .problem import Problem, suggestion
from .rule import Facts, Range, Rule, needs

ALGORITHM_RANGES: dict[str, Range] = {
    **dict.fromkeys(["kl_loss_coef", "kl_coef", "eps_clip", "eps_clip_high", "tis_clip_low", "opsm_delta"], Range(0)),
    **dict.fromkeys(["tis_clip", "sapo_tau_pos", "sapo_tau_neg", "dppo_threshold"], Range(0, open_low=True)),
    **dict.fromkeys(["eps_clip_c", "two_sided_delta"], Range(1, open_low=True)),
    **dict.fromkeys(["gamma", "entropy_quantile"], Range(0, 1, open_low=True)),
    **dict.fromkeys(["pass_at_k", "loss_constant_length"], Range(1)),
    "entropy_coef": Range(-float("inf")),
}


def check_names(config: Config, registries: Mapping[str, Iterable[str]]) -> list[Problem]:
    """Problems of the fields (the keys) that name no part of their registry, now that plugins are imported."""
    values = flatten(config)
    problems = []
    for name, registry in registries.items():
        value, known = values[name], list(registry)
        if value is not None and value not in known:
            fix = suggestion(value, known, otherwise=f"choose one of {', '.join(known)}")
            problems.append(Problem(fields()[name].flag, value, "neither Miles nor a --plugin registers it", fix))
    return problems


def names_are_known(facts: Facts) -> Iterator[Problem]:
    """What a plugin registers is known when it is imported: the rooms' checks look again."""
    if facts.config.cluster.plugin:
        return
    values = flatten(facts.config)
    for name, known in BUILT_IN.items():
        value, flag = values[name], fields()[name].flag
        if value is None or value in known:
            continue
        fix = suggestion(value, known, otherwise=f"choose one of {', '.join(known)}, or name its --plugin")
        yield planned_choice(name, flag, value, known) or Problem(flag, value, "there is no such name", fix)


# ------------------------------------------------------------------------------------------------------------ advantages


def gspo_is_its_loss(facts: Facts) -> Iterator[Problem]:
    grpo = facts.config.grpo
    if grpo.advantage_estimator == "gspo" and grpo.policy_loss != "gspo":
        why = "--advantage-estimator gspo is short for grpo with --policy-loss gspo"
        yield Problem("--policy-loss", grpo.policy_loss, why, "leave it out, or take --advantage-estimator grpo")


def switches_of_grpo_need_it(facts: Facts) -> Iterator[Problem]:
    estimator = facts.config.grpo.advantage_estimator
    why = f"--advantage-estimator {estimator} does not divide by a standard deviation of the group"
    fix = "leave it out, or take grpo, gspo or gdpo"
    is_divided = estimator in ("grpo", "gspo", "gdpo") or estimator not in BUILT_IN["advantage_estimator"]
    yield from needs(facts, ("disable_grpo_std_normalization",), unless=is_divided, why=why, fix=fix)
    why = f"--advantage-estimator {estimator} has no switch for its baseline"
    is_switched = estimator in ("grpo", "gspo") or estimator not in BUILT_IN["advantage_estimator"]
    fix = "leave it out, or take grpo; reinforce_plus_plus has no baseline"
    yield from needs(facts, ("disable_rewards_normalization",), unless=is_switched, why=why, fix=fix)


def std_needs_group_baseline(facts: Facts) -> Iterator[Problem]:
    yield from needs(
        facts,
        ("disable_grpo_std_normalization",),
        unless=not facts.config.grpo.disable_rewards_normalization,
        why="--disable-rewards-normalization leaves the rewards as they are",
        fix="give one of the two",
    )


def gamma_needs_a_return(facts: Facts) -> Iterator[Problem]:
    estimator = facts.config.grpo.advantage_estimator
    yield from needs(
        facts,
        ("gamma",),
        unless=estimator in WHITENED_ESTIMATORS,
        why=f"--advantage-estimator {estimator} says the same of every token, so there is no return to discount",
        fix=f"take {' or '.join(WHITENED_ESTIMATORS)}, or leave it out",
    )


def pass_at_k_has_its_k(facts: Facts) -> Iterator[Problem]:
    grpo, size = facts.config.grpo, facts.config.rollout.n_samples_per_prompt
    if grpo.advantage_estimator != "pass_at_k":
        why = f"--advantage-estimator {grpo.advantage_estimator} does not read it"
        fix = "add --advantage-estimator pass_at_k, or leave it out"
        yield from needs(facts, ("pass_at_k",), unless=False, why=why, fix=fix)
    elif grpo.pass_at_k is None:
        yield Problem(
            "--advantage-estimator", "pass_at_k", "it does not know how many answers may be tried", "add --pass-at-k K"
        )
    elif size is not None and grpo.pass_at_k > size:
        why = f"a prompt has --n-samples-per-prompt {size} answers"
        yield Problem("--pass-at-k", grpo.pass_at_k, why, f"give at most {size}")


def gdpo_needs_rewards(facts: Facts) -> Iterator[Problem]:
    if facts.config.grpo.advantage_estimator == "gdpo" and not facts.config.rollout.reward_weights:
        why = "it normalises several rewards, each by itself, and there is one"
        fix = "add --reward-weights '{\"NAME\": 1.0, ...}', with the entries of the reward's dict"
        yield Problem("--advantage-estimator", "gdpo", why, fix)


def remax_scores_single_answers(facts: Facts) -> Iterator[Problem]:
    if facts.config.grpo.advantage_estimator == "remax" and facts.config.rollout.group_rm:
        why = "the greedy answer that is its baseline belongs to no group"
        yield Problem("--group-rm", None, why, "score single samples, or take another --advantage-estimator")


def reward_weights_are_numbers(facts: Facts) -> Iterator[Problem]:
    rollout = facts.config.rollout
    for name, weight in rollout.reward_weights.items():
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)
        if not is_number or weight == 0:
            yield Problem("--reward-weights", f"{name}: {weight!r}", "it is no weight", "give a number other than 0")
    if rollout.reward_weights and rollout.reward_key is not None:
        why = f"--reward-weights has {', '.join(rollout.reward_weights)} train"
        yield Problem("--reward-key", rollout.reward_key, why, "give one of the two")


# --------------------------------------------------------------------------------------------------------- policy losses


def loss_flags_need_their_loss(facts: Facts) -> Iterator[Problem]:
    loss = facts.config.grpo.policy_loss
    for name, losses in LOSS_FLAGS.items():
        why = f"--policy-loss {loss} does not read it"
        fix = f"take --policy-loss {' or '.join(losses)}, or leave it out"
        is_read = loss in losses or loss not in BUILT_IN["policy_loss"]
        yield from needs(facts, (name,), unless=is_read, why=why, fix=fix)
    if loss in WITHOUT_CLIP:
        why = f"--policy-loss {loss} does not clip the ratio"
        yield from needs(facts, ("eps_clip", "eps_clip_high"), unless=False, why=why, fix="leave it out")


def caps_are_above_the_band(facts: Facts) -> Iterator[Problem]:
    grpo = facts.config.grpo
    high = 1 + (grpo.eps_clip_high if grpo.eps_clip_high is not None else grpo.eps_clip)
    if grpo.policy_loss == "two_sided" and grpo.two_sided_delta <= high:
        why = f"ratios are clipped at {show(high)} already where that helps"
        yield Problem("--two-sided-delta", show(grpo.two_sided_delta), why, f"give more than {show(high)}")


def per_token_loss_is_token_mean(facts: Facts) -> Iterator[Problem]:
    grpo = facts.config.grpo
    if grpo.calculate_per_token_loss and grpo.loss_aggregation != "token_mean":
        why = "--calculate-per-token-loss is short for token_mean"
        yield Problem("--loss-aggregation", grpo.loss_aggregation, why, "give one of the two")


def constant_length_needs_constant(facts: Facts) -> Iterator[Problem]:
    yield from needs(
        facts,
        ("loss_constant_length",),
        unless=facts.config.grpo.loss_aggregation == "constant",
        why=f"--loss-aggregation is {facts.config.grpo.loss_aggregation}, which has no constant divisor",
        fix="add --loss-aggregation constant, or leave it out",
    )


# -------------------------------------------------------------------------------------------------------------------- KL


def kl_needs_kl_loss(facts: Facts) -> Iterator[Problem]:
    grpo = facts.config.grpo
    yield from needs(
        facts,
        ("kl_loss_coef", "use_unbiased_kl"),
        unless=grpo.use_kl_loss,
        why="without --use-kl-loss the loss has no KL term",
        fix="add --use-kl-loss, or leave it out",
    )
    yield from needs(
        facts,
        ("kl_loss_type",),
        unless=grpo.use_kl_loss or grpo.kl_coef != 0,
        why="there is KL neither in the loss nor in the reward",
        fix="add --use-kl-loss or --kl-coef, or leave it out",
    )


def reference_updates_have_a_reference(facts: Facts) -> Iterator[Problem]:
    grpo, preference = facts.config.grpo, facts.config.preference
    if grpo.loss_type in ("policy_loss", "custom_loss"):
        has_one, why = grpo.use_kl_loss or grpo.kl_coef != 0, "there is KL neither in the loss nor in the reward"
    else:
        has_one = grpo.loss_type in ("dpo", "kto") and not preference.reference_free
        why = f"--loss-type {grpo.loss_type}{' --reference-free' * preference.reference_free} has no reference"
    yield from needs(facts, ("ref_update_interval",), unless=has_one, why=why, fix="leave it out")
    why = "--precompute-ref-log-probs scores all rows with one reference"
    is_computed = preference.precompute_ref_log_probs
    yield from needs(facts, ("ref_update_interval",), unless=not is_computed, why=why, fix="give one of the two")


def kl_is_in_one_place(facts: Facts) -> Iterator[Problem]:
    grpo = facts.config.grpo
    if grpo.kl_coef and grpo.kl_loss_coef:
        why = f"--kl-loss-coef {show(grpo.kl_loss_coef)} has the same KL in the loss, so it would count twice"
        yield Problem("--kl-coef", show(grpo.kl_coef), why, "give one of the two")


# ------------------------------------------------------------------------------------------------------------ off policy


def tis_is_token_truncate(facts: Facts) -> Iterator[Problem]:
    grpo = facts.config.grpo
    if grpo.custom_tis_function_path is not None and grpo.off_policy_correction is not None:
        why = f"--custom-tis-function-path {grpo.custom_tis_function_path} takes its place"
        yield Problem("--off-policy-correction", grpo.off_policy_correction, why, "give one of the two")
    elif grpo.custom_tis_function_path is None and grpo.use_tis and grpo.off_policy_correction != "token_truncate":
        why = "--use-tis is short for token_truncate"
        yield Problem("--off-policy-correction", grpo.off_policy_correction, why, "give one of the two")


def tis_clip_needs_a_correction(facts: Facts) -> Iterator[Problem]:
    yield from needs(
        facts,
        ("tis_clip", "tis_clip_low"),
        unless=facts.config.grpo.off_policy_correction is not None
        or facts.config.grpo.custom_tis_function_path is not None,
        why="without --use-tis or --off-policy-correction no importance weight is bounded",
        fix="add --use-tis, or leave it out",
    )


def correction_needs_old_log_probs(facts: Facts) -> Iterator[Problem]:
    grpo = facts.config.grpo
    if grpo.off_policy_correction is None and grpo.custom_tis_function_path is None:
        return
    flag = "--use-tis" if grpo.use_tis else "--off-policy-correction"
    got = None if grpo.use_tis else grpo.off_policy_correction
    if grpo.custom_tis_function_path is not None:
        flag, got = "--custom-tis-function-path", grpo.custom_tis_function_path
    if grpo.use_rollout_logprobs:
        why = "--use-rollout-logprobs takes the engine's log-probs as the old policy's, so every weight would be 1"
        yield Problem(flag, got, why, "give one of the two")
    if grpo.policy_loss == "dppo":
        why = "--policy-loss dppo has the engine's policy in its ratio already"
        yield Problem(flag, got, why, "leave it out")


def tis_bounds_are_ordered(facts: Facts) -> Iterator[Problem]:
    grpo = facts.config.grpo
    if grpo.tis_clip is not None and grpo.tis_clip_low is not None and grpo.tis_clip_low > grpo.tis_clip:
        why = f"it is above --tis-clip {show(grpo.tis_clip)}"
        yield Problem("--tis-clip-low", show(grpo.tis_clip_low), why, "give a lower bound below the upper one")


def opsm_needs_two_policies(facts: Facts) -> Iterator[Problem]:
    grpo, steps = facts.config.grpo, facts.config.rollout.num_steps_per_rollout
    why = "without --use-opsm no sequence is left out"
    yield from needs(facts, ("opsm_delta",), unless=grpo.use_opsm, why=why, fix="add --use-opsm, or leave it out")
    if grpo.use_opsm and steps == 1 and not grpo.use_rollout_logprobs:
        why = "with one optimizer step per rollout the old policy is the new one, so it would leave nothing out"
        fix = "add --use-rollout-logprobs, or take more steps with --num-steps-per-rollout"
        yield Problem("--use-opsm", None, why, fix)


ALGORITHM_RULES: tuple[Rule, ...] = (
    names_are_known,
    gspo_is_its_loss,
    switches_of_grpo_need_it,
    std_needs_group_baseline,
    gamma_needs_a_return,
    pass_at_k_has_its_k,
    gdpo_needs_rewards,
    remax_scores_single_answers,
    reward_weights_are_numbers,
    loss_flags_need_their_loss,
    caps_are_above_the_band,
    per_token_loss_is_token_mean,
    constant_length_needs_constant,
    kl_needs_kl_loss,
    reference_updates_have_a_reference,
    kl_is_in_one_place,
    tis_is_token_truncate,
    tis_clip_needs_a_correction,
    correction_needs_old_log_probs,
    tis_bounds_are_ordered,
    opsm_needs_two_policies,
)


def algorithm_warnings(config: Config) -> Iterator[str]:
    """What is allowed and probably not meant."""
    rollout, grpo = config.rollout, config.grpo
    if grpo.loss_type != "policy_loss":
        return
    compares = grpo.advantage_estimator not in WITHOUT_GROUP and not grpo.disable_rewards_normalization
    if rollout.n_samples_per_prompt == 1 and compares:
        yield "--n-samples-per-prompt 1: a group of one has advantage 0, so nothing is learned"
    if grpo.policy_loss == "gspo" and grpo.eps_clip > 0.05:
        yield (
            f"--eps-clip {show(grpo.eps_clip)} with --policy-loss gspo: the ratio of a whole sequence hardly moves that far, so "
            "nothing is clipped; the paper takes --eps-clip 3e-4 --eps-clip-high 4e-4"
        )
