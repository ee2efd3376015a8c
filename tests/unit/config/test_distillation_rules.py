"""Teachers: where they run, and which flags act beside them."""

from __future__ import annotations

from typing import Any

import pytest

from miles.config import job_of, make_config
from miles.errors import ConfigError

URL = ("http://teacher:30000",)
INSIDE = {"loss_type": "gkd", "teacher_load": "t"}
OUTSIDE = {"loss_type": "gkd", "teacher_urls": URL}


@pytest.mark.parametrize(
    "flags",
    [
        INSIDE,
        OUTSIDE | {"teacher_top_k": 8, "teacher_timeout": 5.0, "gkd_seq_kd": True, "rollout_temperature": 0.7},
        OUTSIDE | {"max_failed_sample_fraction": 0.5},
        {"use_opd": True, "opd_type": "sglang", "teacher_urls": ("https://a/b", "http://b:1"), "teacher_timeout": 9.0},
        {"use_opd": True, "teacher_load": "t", "rollout_temperature": 0.5},
    ],
)
def test_what_fits(flags: dict[str, Any]) -> None:
    make_config(**flags)


def test_the_place_of_the_teacher_is_the_one_that_is_given() -> None:
    assert make_config(use_opd=True, teacher_urls=URL).grpo.opd_type == "sglang"
    assert make_config(use_opd=True, teacher_load="t").grpo.opd_type == "megatron"
    assert make_config().grpo.opd_type is None


def test_answers_of_the_teacher_take_no_engines_of_the_run() -> None:
    job = job_of(make_config(**OUTSIDE, gkd_seq_kd=True))
    assert (job.generates, job.engines) == (True, False)
    assert not job_of(make_config(**OUTSIDE)).generates


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            {"loss_type": "gkd"},
            "--loss-type gkd: there is no teacher; add --teacher-load DIR, or --teacher-urls URL",
        ),
        (
            INSIDE | {"teacher_urls": URL},
            "--teacher-load and --teacher-urls: --loss-type gkd has one teacher; leave one of them out",
        ),
        (
            {"teacher_urls": URL},
            "--teacher-urls, got http://teacher:30000: neither --loss-type gkd nor --use-opd asks for a teacher; add one, or "
            "leave it out",
        ),
        (
            {"use_opd": True, "opd_type": "sglang", "teacher_load": "t"},
            "--opd-type, got sglang: its teacher is that of --teacher-urls; give --teacher-urls, or leave it out",
        ),
        *(
            (
                INSIDE | {name: value},
                f"--{name.replace('_', '-')}, got {shown}: there are no --teacher-urls; add --teacher-urls URL, or leave it out",
            )
            for name, value, shown in (
                ("gkd_seq_kd", True, "true"),
                ("teacher_top_k", 8, "8"),
                ("teacher_timeout", 5.0, "5"),
            )
        ),
        (
            OUTSIDE | {"gkd_seq_kd": True, "gkd_lmbda": 1.0},
            "--gkd-seq-kd, got true: with --gkd-lmbda 1 the student answers all rows; lower it, or leave it out",
        ),
        (
            {"loss_type": "gkd", "teacher_urls": ("http://me:secret@teacher",)},
            "--teacher-urls, got teacher: it is no web address, or one with a name in it; write http://HOST:PORT",
        ),
        (
            {"loss_type": "gkd", "teacher_urls": (*URL, *URL)},
            "--teacher-urls, got http://teacher:30000 http://teacher:30000: an address is there twice; name each engine once",
        ),
        (
            OUTSIDE | {"gkd_temperature": 2.0},
            "--gkd-temperature, got 2.0: engines tell log-probs at temperature 1 alone; leave it at 1, or take --teacher-load",
        ),
        (
            {"use_opd": True, "teacher_urls": URL, "rollout_temperature": 0.5},
            "--rollout-temperature, got 0.5: engines tell log-probs at temperature 1 alone (--use-opd); leave it at 1, or take "
            "--teacher-load",
        ),
        (
            OUTSIDE | {"teacher_top_k": 99, "vocab_size": 64},
            "--teacher-top-k, got 99: the vocabulary has 64 tokens; give at most as many",
        ),
        (
            OUTSIDE | {"load_debug_rollout_data": "/saved.jsonl"},
            "--load-debug-rollout-data, got /saved.jsonl: the files of samples do not hold what a teacher says of them; take "
            "--teacher-load",
        ),
        (
            OUTSIDE | {"gkd_seq_kd": True, "loss_scale": "all"},
            "--loss-scale, got all: where every message trains, nothing is left to answer; take assistant or last_round, or "
            "leave --gkd-lmbda and --gkd-seq-kd out",
        ),
    ],
)
def test_what_does_not(flags: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**flags)
    assert line in str(caught.value).splitlines()
