"""Who answers a row of distillation, from what, and what becomes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from miles.config import args_view, make_config
from miles.data import PromptData, RolloutDataSource
from miles.data.prompts import Answer, Prompt
from miles.errors import EngineError, TooManyFailures
from miles.rollout.answers import AnswerSource, author_of, training_channels
from miles.rollout.rollout import Rollout
from miles.types import ANSWERED_BY, CHANNEL, Author, Status

from .scripted import Digits, ScriptedPool, later, reply


def answer(tokens: list[int], mask: list[int]) -> Answer:
    return Answer(np.array(tokens, np.int32), np.array(mask, np.uint8), None, "".join(map(str, tokens[-len(mask) :])))


def rows(number: int = 40, channel: str | None = None) -> PromptData:
    """Two turns each: 1 2 -> 3 9, then 4 -> 5 9."""
    metadata = {} if channel is None else {CHANNEL: channel}
    two_turns = (answer([1, 2, 3, 99, 4, 5, 99], [1, 1, 0, 1, 1]),)
    return PromptData(
        "r.jsonl", tuple(Prompt("12", [1, 2], None, metadata, i, two_turns) for i in range(number)), 0, "f"
    )


def source_of(data: PromptData) -> RolloutDataSource:
    return RolloutDataSource(data, n_samples_per_prompt=1, shuffle=False, seed=0)


AT_TEACHER: dict[str, Any] = {"teacher_load": None, "teacher_urls": ("http://t:1",), "gkd_seq_kd": True}


def gkd(**flags: Any) -> Any:
    base = {
        "loss_type": "gkd",
        "teacher_load": "t",
        "gkd_lmbda": 0.5,
        "rollout_batch_size": 16,
        "num_steps_per_rollout": 1,
    }
    return make_config(**{**base, **flags})


def drawn(number: int, **flags: Any) -> list[Author]:
    return [author_of(i, config) for config in [gkd(**flags)] for i in range(number)]


def test_the_draw_depends_on_seed_and_group_alone_and_keeps_the_share() -> None:
    found = drawn(4000, gkd_lmbda=0.3)
    assert found == drawn(4000, gkd_lmbda=0.3)
    assert found != drawn(4000, gkd_lmbda=0.3, rollout_seed=8)
    # Four standard deviations of a binomial share.
    assert found.count(Author.STUDENT) / 4000 == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 4000) ** 0.5)
    assert set(drawn(99, gkd_lmbda=1.0)) == {Author.STUDENT}
    assert set(drawn(99, gkd_lmbda=0.0)) == {Author.DATA}
    assert set(drawn(99, **AT_TEACHER)) == {Author.STUDENT, Author.TEACHER}


def test_a_larger_share_takes_more_rows_and_gives_none_back() -> None:
    of = [{i for i, who in enumerate(drawn(500, gkd_lmbda=s)) if who is Author.STUDENT} for s in (0.2, 0.5, 0.9)]
    assert of[0] < of[1] < of[2]


def test_the_student_is_asked_what_comes_before_the_last_answer() -> None:
    (group,) = AnswerSource(source_of(rows()), gkd(gkd_lmbda=1.0), Digits().decode).get_samples(1)
    (sample,) = group
    assert (sample.tokens, sample.prompt) == ([1, 2, 3, 99, 4], "123<end>4")
    assert (sample.status, sample.response_length, sample.loss_mask) == (Status.PENDING, 0, None)
    assert sample.metadata[ANSWERED_BY] == sample.metadata[CHANNEL] == "student"


def test_of_a_row_in_several_parts_the_last_one_is_asked_and_is_one_trajectory() -> None:
    parts = (answer([1, 2, 3], [1]), answer([4, 5, 6, 7], [1, 1]))
    data = PromptData("r.jsonl", (Prompt("12", [1, 2], None, {}, 1, parts),), 0, "f")
    ((sample,),) = AnswerSource(source_of(data), gkd(gkd_lmbda=1.0), Digits().decode).get_samples(1)
    assert (sample.tokens, sample.trajectory_id) == ([4, 5], None)


def test_groups_that_came_back_keep_their_author() -> None:
    source = AnswerSource(source_of(rows()), gkd(), Digits().decode)
    groups = source.get_samples(8)
    source.add_samples(groups)
    assert source.get_samples(8) == groups


def test_rows_are_reported_by_their_channels_or_else_by_who_answered() -> None:
    assert training_channels(gkd(), rows(channel="math")) == ("math",)
    assert training_channels(gkd(), rows()) == ("data", "student")
    assert training_channels(gkd(gkd_lmbda=1.0), rows()) == ("student",)
    assert training_channels(gkd(gkd_lmbda=0.0), rows()) == ()
    assert training_channels(gkd(**AT_TEACHER), rows()) == ("teacher", "student")
    assert training_channels(gkd(**AT_TEACHER, gkd_lmbda=0.0), rows()) == ("teacher",)
    ((sample,),) = AnswerSource(source_of(rows(channel="math")), gkd(), Digits().decode).get_samples(1)
    assert sample.metadata[CHANNEL] == "math"


async def made(config: Any, pool: ScriptedPool) -> Any:
    rollout = Rollout(config, source=source_of(rows()), pool=pool, tokenizer=Digits(), args=args_view(config))
    await rollout.start()
    try:
        return await rollout.generate(0)
    finally:
        await rollout.close()


async def test_a_rollout_mixes_given_answers_with_the_students_own() -> None:
    pool = ScriptedPool()
    config = gkd(rollout_temperature=0.7, rollout_max_response_len=3)
    output = await made(config, pool)
    samples = [sample for group in output.groups for sample in group]
    own = [s for s in samples if s.metadata[ANSWERED_BY] == "student"]
    given = [s for s in samples if s.metadata[ANSWERED_BY] == "data"]
    assert len(samples) == 16
    assert len(own) == len(pool.payloads) == round(16 * output.metrics["rollout/student_ratio"]) > 0
    assert all(s.tokens == [1, 2, 3, 99, 4, 5, 99] and s.loss_mask == [1, 1, 0, 1, 1] for s in given)
    assert all(s.tokens[:5] == [1, 2, 3, 99, 4] and s.response_length == 3 for s in own)
    assert {s.temperature for s in own} == {0.7}
    assert {s.reward for s in samples} == {None}
    again = await made(config, ScriptedPool())
    assert [s.tokens for g in again.groups for s in g] == [s.tokens for s in samples]


async def test_an_answer_that_fails_is_tried_again_and_then_stops_the_run() -> None:
    async def broken() -> Any:
        raise EngineError("engine e, got HTTP 500: broken")

    pool = ScriptedPool(lambda payload, i: broken())
    with pytest.raises(TooManyFailures, match="engine e, got HTTP 500: broken"):
        await made(gkd(max_failed_sample_fraction=1.0), pool)

    pool = ScriptedPool(lambda payload, i: broken() if i == 0 else None)
    output = await made(gkd(max_failed_sample_fraction=1.0), pool)
    assert output.metrics["rollout/retried_groups"] == 1
    assert all(s.status is Status.COMPLETED for g in output.groups for s in g)


async def test_a_truncated_answer_is_trained_on_as_it_is() -> None:
    pool = ScriptedPool(lambda payload, i: later(0.0, [reply([7, 8], kind="length")]))
    output = await made(gkd(gkd_lmbda=1.0), pool)
    assert {s.status for g in output.groups for s in g} == {Status.TRUNCATED}
