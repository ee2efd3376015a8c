"""What training by each --loss-type asks of a run: engines or not, rewards or not, which rows it reads.

A new job is one row in `JOBS`, its name among the choices of --loss-type, and a loss in `miles.trainers.losses`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .groups import Config, GrpoArgs, SglangArgs
from .problem import Problem
from .rule import Facts, Rule, needs


@dataclass(frozen=True)
class Job:
    """One --loss-type."""

    rows: Literal["prompts", "conversations", "pairs", "judged"]
    """What a row of --prompt-data is: a prompt that engines answer, a conversation that is there already, two answers of which
    one is preferred, or an answer with a judgement."""
    engines: bool = False
    """Engines are started and get the weights."""
    generates: bool = False
    """Answers are made while it trains, of all rows or of some."""
    rewards: bool = False
    """What is trained on is scored; the scores become advantages."""
    loss_aggregation: str = "seq_mean"
    """Default of --loss-aggregation."""
    preference: Literal["pairs", "judged"] | None = None
    """What is compared: two answers to a prompt, or answers that are good or bad by themselves."""


JOBS: dict[str, Job] = {
    **dict.fromkeys(("policy_loss", "custom_loss"), Job("prompts", engines=True, generates=True, rewards=True)),
    "sft_loss": Job("conversations", loss_aggregation="token_mean"),
    "gkd": Job("conversations", loss_aggregation="token_mean"),
    **dict.fromkeys(("dpo", "orpo", "simpo", "cpo", "rm"), Job("pairs", preference="pairs")),
    "kto": Job("judged", preference="judged"),
}


def job_of(config: Config) -> Job:
    job = find_job(config.grpo.loss_type, online=config.preference.online_preferences)
    if config.gkd.gkd_lmbda > 0:
        return dataclasses.replace(job, engines=True, generates=True)
    return dataclasses.replace(job, generates=True) if config.gkd.gkd_seq_kd else job


def find_job(loss_type: str, *, online: bool = False) -> Job:
    """The job of a --loss-type; online: what is compared comes from engines and rewards (--online-preferences)."""
    job = JOBS[loss_type]
    return dataclasses.replace(job, rows="prompts", engines=True, generates=True, rewards=True) if online else job


# ------------------------------------------------------------------------------------------------ which flags a job reads

#: Flags of the engines.
ENGINE_FLAGS = (
    *(field.name for field in dataclasses.fields(SglangArgs)),
    *("colocate", "rollout_engine", "max_engine_restarts", "update_weight_buffer_size"),
    *("check_weight_update_equal", "debug_rollout_only"),
)

#: Flags of how answers are made ...
ANSWER_FLAGS = (
    *("rollout_temperature", "rollout_top_p", "rollout_top_k", "rollout_stop", "rollout_stop_token_ids"),
    *("rollout_max_response_len", "rollout_max_context_len", "rollout_skip_special_tokens"),
    *("custom_generate_function_path", "custom_generate_timeout"),
)

#: ... and of how prompts are sampled, one by one or in an evaluation.
PROMPT_FLAGS = (
    *("rollout_max_prompt_len", "over_sampling_batch_size", "n_samples_per_prompt"),
    *("eval_temperature", "eval_top_p", "eval_top_k", "eval_max_response_len", "n_samples_per_eval_prompt"),
    "custom_eval_rollout_log_function_path",
)

#: Flags of rewards and of what is done with scored groups.
REWARD_FLAGS = (
    *(
        "rm_type",
        "rm_url",
        "rm_model",
        "rm_timeout",
        "rm_num_workers",
        "rm_max_retries",
        "group_rm",
        "reward_key",
        "reward_weights",
    ),
    *("format_pattern", "cosine_max_len", "repetition_n_grams", "repetition_max_penalty"),
    *(f"cosine_{end}_len_value_{kind}" for end in ("min", "max") for kind in ("correct", "wrong")),
    *("soft_max_length", "soft_cache_length", "custom_rm_path", "dynamic_sampling_filter_path"),
)

#: Flags of GRPO that every job reads.
_SHARED = ("loss_type", "calculate_per_token_loss", "loss_aggregation", "loss_constant_length")
#: Flags of advantages, of the policy loss and of its corrections.
POLICY_FLAGS = tuple(field.name for field in dataclasses.fields(GrpoArgs) if field.name not in _SHARED)

#: Those that change the policy loss itself, beside numbers and columns that a function of one's own reads.
POLICY_LOSS_FLAGS = (
    *("policy_loss", "kl_loss_coef", "use_unbiased_kl", "entropy_coef", "entropy_quantile", "use_opsm"),
    *("use_tis", "off_policy_correction", "custom_tis_function_path"),
)

#: Flag -> the loss types that read it, for flags that not every job reads and that are in none of the lists above.
READ_BY: dict[str, tuple[str, ...]] = {
    "sft_token_loss": ("sft_loss",),
    **dict.fromkeys(("loss_scale", "channel_key"), ("sft_loss", "gkd")),
    **dict.fromkeys(("gkd_beta", "gkd_temperature", "gkd_lmbda", "gkd_seq_kd", "teacher_top_k", "sft_alpha"), ("gkd",)),
    "custom_loss_function_path": ("custom_loss",),
    "overlong_rows": ("sft_loss", "gkd", "dpo", "kto", "orpo", "simpo", "cpo", "rm"),
    "center_rewards_coefficient": ("rm",),
    **dict.fromkeys(("dpo_loss_type", "dpo_loss_weights", "f_divergence", "f_alpha_divergence_coef"), ("dpo",)),
    **dict.fromkeys(("rpo_alpha", "ld_alpha", "discopop_tau"), ("dpo",)),
    **dict.fromkeys(("beta", "online_preferences"), ("dpo", "kto", "orpo", "simpo", "cpo")),
    "label_smoothing": ("dpo", "simpo", "cpo"),
    **dict.fromkeys(("precompute_ref_log_probs", "ref_log_probs_dir"), ("dpo",)),
    "reference_free": ("dpo", "kto"),
    "average_log_prob": ("dpo", "kto", "cpo"),
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("cpo",),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), ("kto",)),
}


def flags_are_read_by_the_job(facts: Facts) -> Iterator[Problem]:
    name, job = facts.config.grpo.loss_type, job_of(facts.config)
    flag, fix = f"--loss-type {name}", "leave it out"
    no_engine = f"{flag} starts no engine"
    yield from needs(facts, ENGINE_FLAGS, unless=job.engines, why=no_engine, fix=fix)
    yield from needs(facts, ANSWER_FLAGS, unless=job.generates, why=no_engine, fix=fix)
    asks = job.generates or facts.config.gkd.teacher_urls is not None
    yield from needs(facts, ("max_failed_sample_fraction",), unless=asks, why=no_engine, fix=fix)
    why = f"{flag} answers a row once, and evaluates rows as they are" if job.generates else no_engine
    yield from needs(facts, PROMPT_FLAGS, unless=job.rows == "prompts", why=why, fix=fix)
    yield from needs(facts, REWARD_FLAGS, unless=job.rewards, why=f"{flag} scores nothing", fix=fix)
    yield from needs(
        facts, POLICY_FLAGS, unless=job.preference is None and job.rewards, why=f"{flag} has no advantages", fix=fix
    )
    why = f"{flag} is the whole loss"
    yield from needs(facts, POLICY_LOSS_FLAGS, unless=name != "custom_loss", why=why, fix=f"{fix}, and write it there")
    for field, losses in READ_BY.items():
        takes = f"take --loss-type {' or '.join(losses)}, or leave it out"
        yield from needs(facts, (field,), unless=name in losses, why=f"{flag} does not read it", fix=takes)
    why = "with --online-preferences the engines answer prompts"
    yield from needs(facts, ("overlong_rows",), unless=job.rows != "prompts", why=why, fix=fix)


def parts_are_given(facts: Facts) -> Iterator[Problem]:
    grpo = facts.config.grpo
    if grpo.loss_type == "custom_loss" and grpo.custom_loss_function_path is None:
        yield Problem("--loss-type", "custom_loss", "there is no function", "add --custom-loss-function-path PATH")


def rows_fit_model(facts: Facts) -> Iterator[Problem]:
    longest, model = facts.config.model.seq_length, facts.config.model.max_position_embeddings
    if "seq_length" in facts.given and longest is not None and model is not None and longest > model:
        why = f"the model knows {model} positions (--max-position-embeddings)"
        yield Problem("--seq-length", longest, why, f"give at most {model}")


JOB_RULES: tuple[Rule, ...] = (
    flags_are_read_by_the_job,
    parts_are_given,
    rows_fit_model,
)
