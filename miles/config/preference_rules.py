"""Which flags of preference jobs go together. Which --loss-type reads which of them is in `jobs`."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .algorithms import AVERAGED_PAIR_LOSSES, PAIR_LOSSES, SMOOTHED_PAIR_LOSSES, WITHOUT_DIVERGENCE
from .jobs import job_of
from .problem import Problem, suggestion
from .rule import Facts, Range, Rule, needs

PREFERENCE_RANGES: dict[str, Range] = {
    **dict.fromkeys(["beta", "discopop_tau"], Range(0, open_low=True)),
    **dict.fromkeys(
        [
            "center_rewards_coefficient",
            "rpo_alpha",
            "simpo_gamma",
            "cpo_alpha",
            "desirable_weight",
            "undesirable_weight",
        ],
        Range(0),
    ),
    **dict.fromkeys(["ld_alpha"], Range(0, 1)),
    **dict.fromkeys(["f_alpha_divergence_coef"], Range(-float("inf"))),
}


def pair_losses_are_known(facts: Facts) -> Iterator[Problem]:
    """What a plugin registers is known when it is imported: the trainers' check looks again."""
    names = facts.config.preference.dpo_loss_type
    if not names:
        yield Problem("--dpo-loss-type", "none", "nothing would be trained", "name a loss, such as sigmoid")
    if facts.config.cluster.plugin:
        return
    for name in names:
        if name not in PAIR_LOSSES:
            fix = suggestion(
                name, PAIR_LOSSES, otherwise=f"choose among {', '.join(PAIR_LOSSES)}, or name its --plugin"
            )
            yield Problem("--dpo-loss-type", name, "there is no such name", fix)


def pair_losses_have_a_weight_each(facts: Facts) -> Iterator[Problem]:
    flags = facts.config.preference
    if flags.dpo_loss_weights is not None and len(flags.dpo_loss_weights) != len(flags.dpo_loss_type):
        got = " ".join(map(str, flags.dpo_loss_weights))
        yield Problem("--dpo-loss-weights", got, f"--dpo-loss-type names {len(flags.dpo_loss_type)}", "give as many")


def pair_losses_weigh_a_number(facts: Facts) -> Iterator[Problem]:
    weights = facts.config.preference.dpo_loss_weights or ()
    if not all(map(math.isfinite, weights)):
        got = " ".join(map(str, weights))
        yield Problem("--dpo-loss-weights", got, "the loss would be no number", "give finite numbers")


def kto_needs_company(facts: Facts) -> Iterator[Problem]:
    """Its baseline is made of answers to other prompts."""
    sizes, job = facts.config.rollout, job_of(facts.config)
    groups, steps = sizes.rollout_batch_size, sizes.num_steps_per_rollout or 1
    if job.rows == "judged" and groups is not None and groups // steps < 2:
        why = f"an optimizer step has {groups // steps} of them, and kto compares a row with the others of its step"
        yield Problem("--rollout-batch-size", groups, why, f"give at least {2 * steps}")


def label_smoothing_fits(facts: Facts) -> Iterator[Problem]:
    flags, is_dpo = facts.config.preference, facts.config.grpo.loss_type == "dpo"
    smoothing, names = flags.label_smoothing, flags.dpo_loss_type
    if not 0 <= smoothing < 0.5:
        why = "it is the share of wrong labels, and half of them wrong says nothing"
        yield Problem("--label-smoothing", smoothing, why, "give 0 to below 0.5")
    if not is_dpo:
        return
    if "exo_pair" in names and not smoothing:
        why = "exo_pair compares with the distribution (1 - e, e), which must not be certain"
        yield Problem("--label-smoothing", smoothing, why, "give a small one, such as 1e-3")
    knows = _any_of(names, SMOOTHED_PAIR_LOSSES)
    why, fix = f"--dpo-loss-type {' '.join(names)} does not read it", f"take one of {', '.join(SMOOTHED_PAIR_LOSSES)}"
    yield from needs(facts, ("label_smoothing",), unless=knows, why=why, fix=fix)


def scores_fit_the_losses(facts: Facts) -> Iterator[Problem]:
    """Flags that change what losses of pairs look at, where none of the chosen ones looks at it."""
    flags = facts.config.preference
    names, fix = flags.dpo_loss_type, "leave it out"
    if facts.config.grpo.loss_type != "dpo":
        return
    why = f"--dpo-loss-type {' '.join(names)}"
    has_scores = any(name not in WITHOUT_DIVERGENCE for name in names)
    yield from needs(facts, ("f_divergence",), unless=has_scores, why=f"{why} looks at log-probs alone", fix=fix)
    is_alpha = flags.f_divergence == "alpha_divergence"
    why_alpha = f"--f-divergence {flags.f_divergence} has no such number"
    yield from needs(facts, ("f_alpha_divergence_coef",), unless=is_alpha, why=why_alpha, fix=fix)
    yield from needs(facts, ("discopop_tau",), unless="discopop" in names, why=f"{why} does not read it", fix=fix)
    averages = [name for name in names if name in AVERAGED_PAIR_LOSSES]
    yield from needs(facts, ("average_log_prob",), unless=not averages, why=f"{why} averages by itself", fix=fix)


def pairs_count_as_wholes(facts: Facts) -> Iterator[Problem]:
    is_preference = job_of(facts.config).preference is not None
    why = f"--loss-type {facts.config.grpo.loss_type} is a mean over pairs or answers, not over tokens"
    names = ("calculate_per_token_loss", "loss_aggregation", "loss_constant_length")
    yield from needs(facts, names, unless=not is_preference, why=why, fix="leave it out")


def online_pairs_need_several_answers(facts: Facts) -> Iterator[Problem]:
    config = facts.config
    sizes = config.rollout
    if not config.preference.online_preferences or job_of(config).preference is None:
        return
    if job_of(config).preference == "pairs" and sizes.n_samples_per_prompt == 1:
        why = "a pair is the best and the worst of a prompt's answers"
        yield Problem("--n-samples-per-prompt", 1, why, "give at least 2, such as 4")
    groups, steps = sizes.rollout_batch_size, sizes.num_steps_per_rollout
    if groups is not None and steps is not None and groups % steps:
        why = f"the {groups} prompts of a rollout (--rollout-batch-size) are not cut"
        yield Problem("--num-steps-per-rollout", steps, why, f"give a divisor of {groups}")


def precomputed_log_probs_have_a_reference(facts: Facts) -> Iterator[Problem]:
    flags = facts.config.preference
    why, fix = "answers of the engines are not known at launch", "leave it out, or --online-preferences"
    yield from needs(facts, ("precompute_ref_log_probs",), unless=not flags.online_preferences, why=why, fix=fix)
    why = "with --reference-free there is nothing to compute"
    yield from needs(facts, ("precompute_ref_log_probs",), unless=not flags.reference_free, why=why, fix="leave it out")
    why, fix = "nothing is computed without --precompute-ref-log-probs", "add it, or leave this out"
    yield from needs(facts, ("ref_log_probs_dir",), unless=flags.precompute_ref_log_probs, why=why, fix=fix)


def pairs_name_their_columns(facts: Facts) -> Iterator[Problem]:
    is_pairs = job_of(facts.config).rows == "pairs"
    why = f"--loss-type {facts.config.grpo.loss_type} reads the columns chosen and rejected"
    yield from needs(facts, ("label_key",), unless=not is_pairs, why=why, fix="leave it out, and name them so")


def _any_of(names: tuple[str, ...], known: tuple[str, ...]) -> bool:
    """A name that a plugin registers may read anything."""
    return any(name in known or name not in PAIR_LOSSES for name in names)


PREFERENCE_RULES: tuple[Rule, ...] = (
    pair_losses_are_known,
    pair_losses_have_a_weight_each,
    pair_losses_weigh_a_number,
    kto_needs_company,
    label_smoothing_fits,
    scores_fit_the_losses,
    pairs_count_as_wholes,
    pairs_name_their_columns,
    online_pairs_need_several_answers,
    precomputed_log_probs_have_a_reference,
)
