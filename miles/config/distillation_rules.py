"""Rules of teachers: where they run, and which flags act beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .jobs import job_of
from .problem import Problem
from .rule import Facts, Range, Rule, needs

DISTILLATION_RANGES: dict[str, Range] = {
    "gkd_beta": Range(0, 1),
    "gkd_temperature": Range(0, open_low=True),
    "gkd_lmbda": Range(0, 1),
    "teacher_top_k": Range(1),
    "teacher_timeout": Range(0, open_low=True),
    "sft_alpha": Range(0),
    "opd_kl_coef": Range(0, open_low=True),
}

#: Without a name or a password: requests carry a key of their own.
_ADDRESS = re.compile(r"https?://[^/@\s]+(/[^@\s]*)?")


def one_teacher(facts: Facts) -> Iterator[Problem]:
    config, grpo = facts.config, facts.config.grpo
    teachers = {"--teacher-load": config.ckpt.teacher_load, "--teacher-urls": config.gkd.teacher_urls}
    given = [flag for flag, value in teachers.items() if value is not None]
    asks = "--use-opd" if grpo.use_opd else "--loss-type gkd" if grpo.loss_type == "gkd" else None
    if asks is None:
        why = "neither --loss-type gkd nor --use-opd asks for a teacher"
        yield from needs(facts, ("teacher_load", "teacher_urls"), unless=False, why=why, fix="add one, or leave it out")
        return
    if not given:
        yield Problem(asks, None, "there is no teacher", "add --teacher-load DIR, or --teacher-urls URL")
    if len(given) == 2:
        yield Problem("--teacher-load and --teacher-urls", None, f"{asks} has one teacher", "leave one of them out")
    home = {"megatron": "--teacher-load", "sglang": "--teacher-urls"}.get(grpo.opd_type or "")
    if grpo.use_opd and given and home not in given:
        yield Problem("--opd-type", grpo.opd_type, f"its teacher is that of {home}", f"give {home}, or leave it out")


def teacher_flags_act(facts: Facts) -> Iterator[Problem]:
    config = facts.config
    why, fix = "there are no --teacher-urls", "add --teacher-urls URL, or leave it out"
    names = ("gkd_seq_kd", "teacher_top_k", "teacher_timeout")
    yield from needs(facts, names, unless=config.gkd.teacher_urls is not None, why=why, fix=fix)
    why, fix = "without --use-opd there is no such term", "add --use-opd, or leave it out"
    yield from needs(facts, ("opd_kl_coef", "opd_type"), unless=config.grpo.use_opd, why=why, fix=fix)
    if config.gkd.gkd_lmbda == 1:
        why = "with --gkd-lmbda 1 the student answers all rows"
        yield from needs(facts, ("gkd_seq_kd",), unless=False, why=why, fix="lower it, or leave it out")


def teacher_urls_are_addresses(facts: Facts) -> Iterator[Problem]:
    urls = facts.config.gkd.teacher_urls
    if urls == ():
        yield Problem("--teacher-urls", "nothing", "there is nobody to ask", "give one address or several")
    for url in urls or ():
        if not _ADDRESS.fullmatch(url):
            why = "it is no web address, or one with a name in it"
            yield Problem("--teacher-urls", url.rpartition("@")[2], why, "write http://HOST:PORT")
    if urls is not None and len(set(urls)) < len(urls):
        yield Problem("--teacher-urls", " ".join(urls), "an address is there twice", "name each engine once")


def engines_tell_temperature_one(facts: Facts) -> Iterator[Problem]:
    """SGLang takes no temperature for the log-probs of a prompt."""
    config = facts.config
    if config.gkd.teacher_urls is None:
        return
    why, fix = "engines tell log-probs at temperature 1 alone", "leave it at 1, or take --teacher-load"
    if config.gkd.gkd_temperature != 1:
        yield Problem("--gkd-temperature", config.gkd.gkd_temperature, why, fix)
    if config.grpo.use_opd and config.rollout.rollout_temperature != 1:
        yield Problem("--rollout-temperature", config.rollout.rollout_temperature, f"{why} (--use-opd)", fix)


def teachers_tokens_fit(facts: Facts) -> Iterator[Problem]:
    top_k, vocabulary = facts.config.gkd.teacher_top_k, facts.config.model.vocab_size
    if "teacher_top_k" in facts.given and vocabulary is not None and top_k > vocabulary:
        yield Problem("--teacher-top-k", top_k, f"the vocabulary has {vocabulary} tokens", "give at most as many")


def saved_samples_have_no_teacher(facts: Facts) -> Iterator[Problem]:
    config = facts.config
    if config.gkd.teacher_urls is not None and config.debug.load_debug_rollout_data is not None:
        why = "the files of samples do not hold what a teacher says of them"
        yield Problem("--load-debug-rollout-data", config.debug.load_debug_rollout_data, why, "take --teacher-load")


def answers_have_a_prompt(facts: Facts) -> Iterator[Problem]:
    """Of rows that are answered anew."""
    config, job = facts.config, job_of(facts.config)
    if job.generates and job.rows == "conversations" and config.sft.loss_scale == "all":
        why = "where every message trains, nothing is left to answer"
        yield Problem(
            "--loss-scale", "all", why, "take assistant or last_round, or leave --gkd-lmbda and --gkd-seq-kd out"
        )


DISTILLATION_RULES: tuple[Rule, ...] = (
    one_teacher,
    teacher_flags_act,
    teacher_urls_are_addresses,
    engines_tell_temperature_one,
    teachers_tokens_fit,
    saved_samples_have_no_teacher,
    answers_have_a_prompt,
)
