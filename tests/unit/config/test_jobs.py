"""--loss-type: which flags a job reads, and what it derives."""

from __future__ import annotations

from typing import Any

import pytest

from miles.cluster.placement import Layout
from miles.config import job_of, make_config
from miles.config.fields import fields
from miles.config.jobs import ANSWER_FLAGS, ENGINE_FLAGS, JOBS, PROMPT_FLAGS, READ_BY, REWARD_FLAGS
from miles.errors import ConfigError


def test_the_tables_name_flags_and_loss_types() -> None:
    assert {*ENGINE_FLAGS, *ANSWER_FLAGS, *PROMPT_FLAGS, *REWARD_FLAGS, *READ_BY} <= set(fields())
    assert set(JOBS) == set(fields()["loss_type"].choices or ())
    assert {name for names in READ_BY.values() for name in names} <= set(JOBS)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            {"rollout_temperature": 0.5},
            "--rollout-temperature, got 0.5: --loss-type sft_loss starts no engine; leave it out",
        ),
        ({"rm_type": "math"}, "--rm-type, got math: --loss-type sft_loss scores nothing; leave it out"),
        ({"eps_clip": 0.1}, "--eps-clip, got 0.1: --loss-type sft_loss has no advantages; leave it out"),
        (
            {"seq_length": 100, "max_position_embeddings": 64},
            "--seq-length, got 100: the model knows 64 positions (--max-position-embeddings); give at most 64",
        ),
    ],
)
def test_flags_that_supervised_training_does_not_read(flags: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(loss_type="sft_loss", **flags)
    assert str(caught.value) == line


def test_a_flag_of_another_job_is_refused() -> None:
    with pytest.raises(ConfigError, match="--loss-scale, got all: --loss-type policy_loss does not read it; take"):
        make_config(loss_scale="all")


def test_what_supervised_training_derives() -> None:
    config = make_config(loss_type="sft_loss", seq_length=32, max_position_embeddings=64)
    assert config.grpo.loss_aggregation == "token_mean"
    assert make_config(loss_type="sft_loss", loss_aggregation="seq_mean").grpo.loss_aggregation == "seq_mean"
    assert config.model.seq_length == config.rollout.rollout_max_context_len == 32
    assert not job_of(config).engines
    assert Layout.of(config).engine_bundles == ()
    assert Layout.of(make_config()).engine_bundles


@pytest.mark.parametrize(
    "flags",
    [
        *({"policy_loss": "cispo"}, {"entropy_coef": 0.1}, {"entropy_quantile": 0.5}, {"use_opsm": True}),
        *({"use_tis": True}, {"off_policy_correction": "icepop"}, {"custom_tis_function_path": "a.py:f"}),
        {"use_kl_loss": True, "kl_loss_coef": 0.1},
    ],
)
def test_a_loss_of_ones_own_is_the_whole_loss(flags: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match="--loss-type custom_loss is the whole loss; leave it out, and write it there"
    ):
        make_config(loss_type="custom_loss", custom_loss_function_path="a.py:f", **flags)


# ----------------------------------------------------------------------------------------------------------- distillation


def test_engines_answer_rows_of_distillation_where_the_student_has_a_share() -> None:
    given = make_config(loss_type="gkd", teacher_load="t")
    mixed = make_config(
        loss_type="gkd", teacher_load="t", gkd_lmbda=0.1, rollout_temperature=0.5, sglang_server_concurrency=4
    )
    assert (job_of(given).engines, job_of(mixed).engines) == (False, True)
    assert job_of(mixed).rows == "conversations"
    assert not job_of(mixed).rewards
    assert Layout.of(given).engine_bundles == ()
    assert Layout.of(mixed).engine_bundles


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"gkd_lmbda": 1.5}, "--gkd-lmbda, got 1.5: it must be at least 0 and at most 1; choose such a value"),
        (
            {"gkd_lmbda": 0.5, "n_samples_per_prompt": 2, "rollout_batch_size": 4, "num_steps_per_rollout": 1},
            "--n-samples-per-prompt, got 2: --loss-type gkd answers a row once, and evaluates rows as they are; leave it out",
        ),
        (
            {"rollout_temperature": 0.5},
            "--rollout-temperature, got 0.5: --loss-type gkd starts no engine; leave it out",
        ),
        (
            {"gkd_lmbda": 0.5, "loss_scale": "all"},
            "--loss-scale, got all: where every message trains, nothing is left to answer; take assistant or last_round, or "
            "leave --gkd-lmbda and --gkd-seq-kd out",
        ),
    ],
)
def test_flags_that_do_not_fit_the_students_share(flags: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(loss_type="gkd", teacher_load="t", **flags)
    assert str(caught.value) == line
