"""From engine replies to samples."""

from __future__ import annotations

from typing import Any

import pytest

from miles.config import args_view
from miles.errors import EngineError, HookError
from miles.rollout.context import GenerationContext, Runtime, current, find_eos_token_ids, installed
from miles.rollout.generate import apply_reply, generate, generate_group
from miles.rollout.sampling import Sampling
from miles.rollout.trajectory import append_observation, check_rows
from miles.types import Sample, Status

from .scripted import Digits, ScriptedPool, config_of, reply


def context_of(pool: Any = None, *, context: int | None = None, position: int = 0) -> GenerationContext:
    config = config_of()
    runtime = Runtime(config, args_view(config), pool, Digits(), frozenset({99}))
    return GenerationContext(runtime, Sampling(0.7, 1.0, -1, 3, context), 0, 5, position)


def test_a_reply_becomes_a_response() -> None:
    sample = Sample(index=1, tokens=[7, 8])
    apply_reply(sample, reply([1, 2, 99], version="4", text="12"), {"temperature": 0.7}, context_of())
    assert sample.tokens == [7, 8, 1, 2, 99]
    assert sample.response_length == 3
    assert sample.prompt_length == 2
    assert sample.loss_mask == [1, 1, 1]
    assert sample.rollout_log_probs == [-0.5, -1.5, -2.5]
    assert sample.temperature == 0.7
    assert sample.weight_versions == ["4"]
    assert sample.response == "12"
    assert sample.status is Status.COMPLETED


@pytest.mark.parametrize(
    ("kind", "tokens", "status", "text"),
    [
        ("length", [1, 2, 3], Status.TRUNCATED, "123"),
        ("length", [1, 2, 99], Status.COMPLETED, "12"),  # the end token is the last one allowed
        ("abort", [1], Status.ABORTED, "1"),
        ("abort", [], Status.ABORTED, ""),
    ],
)
def test_status_follows_the_finish_reason(kind: str, tokens: list[int], status: Status, text: str) -> None:
    sample = Sample(index=1, tokens=[7])
    apply_reply(sample, reply(tokens, kind=kind), {}, context_of())
    assert (sample.status, sample.response) == (status, text)


def test_ignored_end_tokens_do_not_complete() -> None:
    sample = Sample(tokens=[7])
    apply_reply(sample, reply([99], kind="length"), {"ignore_eos": True}, context_of())
    assert sample.status is Status.TRUNCATED


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"output_ids": [1, 2]}, "do not belong together"),
        ({"output_ids": [1, 2, 4]}, "do not belong together"),
        ({"meta_info": {"finish_reason": {"type": "stop"}}}, "no output_token_logprobs"),
        ({"meta_info": {"finish_reason": None}}, "unknown to the protocol"),
    ],
)
def test_a_reply_that_contradicts_itself_is_refused(broken: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        apply_reply(Sample(tokens=[7]), {**reply([1, 2, 3]), **broken}, {}, context_of())


def test_versions_of_an_answer_that_an_update_fell_into() -> None:
    sample = Sample(tokens=[7])
    answer = reply([1])
    answer["meta_info"]["weight_versions"] = [
        {"version": 3, "start": 0, "end": 1},
        {"version": 4, "start": 1, "end": 2},
    ]
    apply_reply(sample, answer, {}, context_of())
    apply_reply(sample, reply([2], version="4"), {}, context_of())
    assert sample.weight_versions == ["3", "4"]


async def test_a_group_is_one_request_with_a_seed_for_each_sample() -> None:
    pool = ScriptedPool()
    contexts = [context_of(pool, position=i) for i in range(4)]
    samples = [Sample(index=i, tokens=[7, 8]) for i in range(4)]
    await generate_group(contexts, samples)
    (payload,) = pool.payloads
    assert payload["input_ids"] == [[7, 8]] * 4
    assert payload["return_logprob"] is True
    assert len({p["sampling_seed"] for p in payload["sampling_params"]}) == 4
    assert [p["sampling_seed"] for p in payload["sampling_params"]] == [c.seed() for c in contexts]


async def test_turns_have_seeds_of_their_own_and_observations_are_not_trained() -> None:
    pool = ScriptedPool()
    with installed(context_of(pool)) as context:
        sample, params = Sample(index=0, tokens=[7]), context.sampling.params(context.seed())
        await generate(context.args, sample, params)
        append_observation(sample, [5, 6], "56")
        await generate(context.args, sample, params)
    first, second = (p["sampling_params"]["sampling_seed"] for p in pool.payloads)
    assert first == context.seed(0)
    assert second == context.seed(1) != first
    assert pool.payloads[1]["input_ids"] == sample.tokens[:6]  # what the model said is fed back as it was
    assert sample.loss_mask == [1, 1, 1, 0, 0, 1, 1, 1]
    assert sample.rollout_log_probs == [-0.5, -1.5, -2.5, 0.0, 0.0, -0.5, -1.5, -2.5]
    assert sample.response_length == 8
    check_rows(sample, sample, hook="h")


async def test_a_seed_of_the_hooks_own_is_kept() -> None:
    pool = ScriptedPool()
    with installed(context_of(pool)) as context:
        await generate(context.args, Sample(tokens=[7]), {"sampling_seed": 5})
    assert pool.payloads[0]["sampling_params"]["sampling_seed"] == 5


async def test_a_full_context_is_an_empty_truncated_turn() -> None:
    pool = ScriptedPool()
    samples = [Sample(index=0, tokens=[1, 2, 3])]
    await generate_group([context_of(pool, context=3)], samples)
    assert pool.payloads == []
    assert (samples[0].status, samples[0].response_length, samples[0].loss_mask) == (Status.TRUNCATED, 0, [])


def test_current_outside_a_hook_says_so() -> None:
    with pytest.raises(HookError, match="outside a generation hook"):
        current()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"status": Status.PENDING}, "status pending"),
        ({"response_length": 9}, "response_length 9"),
        ({"loss_mask": [1]}, "loss_mask of 1 entries with response_length 2"),
        ({"loss_mask": [1, 2]}, "only 0 and 1"),
        ({"rollout_log_probs": [0.0] * 3}, "rollout_log_probs of 3"),
        ({"response_length": 0}, "nothing was generated"),
    ],
)
def test_rows_of_a_hook_are_checked(fields: dict[str, Any], message: str) -> None:
    row = Sample(index=3, tokens=[1, 2, 3], response_length=2, status=Status.COMPLETED)
    for name, value in fields.items():
        setattr(row, name, value)
    with pytest.raises(HookError, match=message):
        check_rows(row, row, hook="h")
    with pytest.raises(HookError, match="must return a Sample"):
        check_rows({"tokens": []}, row, hook="h")


def test_several_rows_are_one_trajectory() -> None:
    sample = Sample(index=3, group_index=1)
    rows = [Sample(tokens=[1, 2], response_length=1, status=Status.COMPLETED) for _ in range(2)]
    for row in check_rows(rows, sample, hook="h"):
        assert (row.index, row.group_index, row.trajectory_id) == (3, 1, 3)


def test_end_tokens_come_from_all_three_places(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert find_eos_token_ids(Digits(), str(tmp_path)) == {99, 1, 2, 3}
