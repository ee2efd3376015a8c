"""Pauses that keep what runs (retract, in_place): what goes on is what an uninterrupted row, or the new weights, would make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from miles.engines.embedded.requests import Job, parse_generate
from miles.errors import WeightUpdateError

from .checkpoints import WELL_CONDITIONED, InProcessEngine, make_model, running_engine, save_checkpoint
from .test_embedded_weights import _state_dict, memfd

PROMPT = [5, 6, 7, 8]
OPTIONS = {"max_new_tokens": 30, "ignore_eos": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    old = save_checkpoint(directory, initializer_range=WELL_CONDITIONED)
    return directory, old, make_model("qwen3_tied", seed=1, initializer_range=WELL_CONDITIONED)


@pytest.fixture
def engine(models):
    with running_engine(models[0], random_seed=1) as engine:
        yield engine


def paused_at(engine: InProcessEngine, mode: str, tokens: int, **body: Any) -> tuple[Any, Job]:
    """A request that was running when the engine was paused, after exactly that many tokens of each row."""
    job = parse_generate(body, engine.limits)
    paused, steps = [], []

    def listen(news: list[Any]) -> None:
        steps.append(news)
        if len(steps) == tokens:  # from the decode thread, in the middle of a step: the pause comes after it
            paused.append(engine.scheduler.run(lambda: engine.scheduler.pause(mode)))

    job.listener = listen
    future = engine.scheduler.submit(job)
    while not paused:
        assert not future.done()
    paused[0].result(20)
    return future, job


def load(engine: InProcessEngine, model: Any, version: str) -> None:
    with memfd(_state_dict(model)) as (path, specs):
        engine.run(lambda: engine.scheduler.load_bucket(path, specs, version))


def stats(engine: InProcessEngine) -> dict[str, Any]:
    found: dict[str, Any] = engine.run(engine.scheduler.stats)
    return found


@torch.no_grad()
def log_probs(model: Any, tokens: list[int], since: int) -> list[float]:
    """Of `tokens[since:]`."""
    logits = model(torch.tensor([tokens])).logits[0, since - 1 : -1]
    found: list[float] = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens)[since:, None])[:, 0].tolist()
    return found


@pytest.mark.parametrize("mode", ["retract", "in_place"])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"sampling_seed": 3, "n": 3},
        {"sampling_seed": 3, "frequency_penalty": 1.5, "repetition_penalty": 1.3, "min_new_tokens": 20},
    ],
    ids=["greedy", "seeded", "penalties"],
)
def test_without_new_weights_nothing_but_time_has_passed(engine, mode, params):
    params = {**OPTIONS, **params}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "logprob_start_len": 0}
    whole = engine.generate(**body)
    future, _ = paused_at(engine, mode, 7, **body)
    rows = params.get("n", 1)
    state = stats(engine)
    if mode == "retract":
        assert (state["num_running_reqs"], state["num_waiting_reqs"]) == (0, rows)
        assert engine.run(engine.scheduler.flush_cache)
    else:
        assert (state["num_running_reqs"], state["num_waiting_reqs"]) == (rows, 0)
        assert not engine.run(engine.scheduler.flush_cache)
    late = engine.submit(**body)
    assert not late.done()
    engine.run(engine.scheduler.resume)
    for row, expected in zip(future.result(30).rows, whole.rows, strict=True):
        assert row.output_ids.tolist() == expected.output_ids.tolist()
        np.testing.assert_allclose(row.output_log_probs, expected.output_log_probs, atol=1e-5)
        np.testing.assert_allclose(row.input_log_probs, expected.input_log_probs, atol=1e-5)
        assert row.num_retractions == (mode == "retract")
        assert row.finish_reason == expected.finish_reason
    assert [row.output_ids.tolist() for row in late.result(30).rows] == [row.output_ids.tolist() for row in whole.rows]


def test_retracted_rows_go_on_under_new_weights_as_if_these_had_read_all_of_it(engine, models):
    _, old, new = models
    body = {"input_ids": PROMPT, "sampling_params": {**OPTIONS, "temperature": 0}, "return_logprob": True}
    future, _ = paused_at(engine, "retract", 9, **body)
    load(engine, new, "1")
    engine.run(engine.scheduler.resume)
    [row] = future.result(30).rows
    answer = row.output_ids.tolist()
    assert row.versions == [("default", 0), ("1", 9)]
    np.testing.assert_allclose(row.output_log_probs[:9], log_probs(old, PROMPT + answer[:9], 4), atol=2e-5)
    np.testing.assert_allclose(row.output_log_probs[9:], log_probs(new, PROMPT + answer, 4 + 9), atol=2e-5)


def test_rows_in_place_go_on_under_new_weights_over_their_old_cache(engine, models):
    _, old, new = models
    body = {"input_ids": PROMPT, "sampling_params": {**OPTIONS, "temperature": 0}, "return_logprob": True}
    future, _ = paused_at(engine, "in_place", 9, **body)
    load(engine, new, "1")
    late = engine.submit(**body)
    engine.run(engine.scheduler.resume)
    [row] = future.result(30).rows
    answer = row.output_ids.tolist()
    assert row.versions == [("default", 0), ("1", 9)]
    with torch.no_grad():
        cache = old(torch.tensor([PROMPT + answer[:8]]), use_cache=True).past_key_values
        logits = new(torch.tensor([answer[8:]]), past_key_values=cache).logits[0, :-1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[9:, None])[:, 0]
    np.testing.assert_allclose(row.output_log_probs[:9], log_probs(old, PROMPT + answer[:9], 4), atol=2e-5)
    np.testing.assert_allclose(row.output_log_probs[9:], expected, atol=2e-5)
    # The same prompt, asked anew, is read by the new weights alone.
    [fresh] = late.result(30).rows
    np.testing.assert_allclose(fresh.output_log_probs, log_probs(new, PROMPT + fresh.output_ids.tolist(), 4), atol=2e-5)
    assert fresh.versions == [("1", 0)]


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_what_is_kept_can_still_be_aborted(engine, mode):
    body = {"input_ids": PROMPT, "rid": "me", "sampling_params": {**OPTIONS, "n": 2}}
    future, _ = paused_at(engine, mode, 5, **body)
    assert engine.run(lambda: engine.scheduler.abort(lambda row: row.job.rid == "me", "enough")) == 2
    for row in future.result(10).rows:
        assert row.finish_reason["type"] == "abort"
        assert len(row.output_ids) == 5
    assert stats(engine)["num_running_reqs"] == stats(engine)["num_waiting_reqs"] == 0


def test_a_pause_that_aborts_ends_what_another_kept_in_place(engine):
    future, _ = paused_at(engine, "in_place", 5, input_ids=PROMPT, sampling_params=OPTIONS)
    held = engine.submit(input_ids=PROMPT, sampling_params={"max_new_tokens": 2, "ignore_eos": True})
    engine.run(engine.scheduler.pause)
    assert future.result(10).rows[0].finish_reason["type"] == "abort"
    engine.run(engine.scheduler.resume)
    assert len(held.result(10).rows[0].output_ids) == 2


def test_a_torn_update_keeps_rows_waiting(engine, models):
    future, _ = paused_at(engine, "in_place", 5, input_ids=PROMPT, sampling_params=OPTIONS)
    weights = _state_dict(models[2])
    name = next(iter(weights))
    with memfd({name: weights[name]}) as (path, specs):
        engine.run(lambda: engine.scheduler.load_bucket(path, specs, None))
    with pytest.raises(WeightUpdateError, match="not whole"):
        engine.run(engine.scheduler.resume)
    assert not future.done()
    load(engine, models[2], "1")
    engine.run(engine.scheduler.resume)
    assert len(future.result(30).rows[0].output_ids) == 30
