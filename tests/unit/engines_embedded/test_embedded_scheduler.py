"""The decode thread from outside: batching, sharing, stops, seeds, pause, abort and failure, through its public calls."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

from miles.errors import EngineError, WeightUpdateError

from .checkpoints import CONTEXT_LENGTH, EOS, VOCAB_SIZE, InProcessEngine, make_tokenizer, running_engine

LONG = {"max_new_tokens": 200, "ignore_eos": True}


@pytest.fixture
def engine(checkpoint):
    with running_engine(checkpoint, random_seed=1) as engine:
        yield engine


def _stats(engine):
    return engine.run(engine.scheduler.stats)


def _wait_until(condition, limit_s=20.0):
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "condition did not come true"
        time.sleep(0.002)


def _tokens(job):
    return [row.output_ids.tolist() for row in job.rows]


def test_equal_prompts_are_computed_once(engine):
    prompt = [5, 6, 7, 8, 9]
    job = engine.generate(input_ids=[prompt, [10, 11], prompt], sampling_params={"n": 4, "max_new_tokens": 3})
    stats = _stats(engine)
    assert stats["prefilled_tokens"] == 7
    assert stats["shared_prompt_tokens"] == 7 * 5 + 3 * 2
    assert [row.cached_tokens for row in job.rows] == [0, 5, 5, 5, 0, 2, 2, 2, 5, 5, 5, 5]


def test_a_prompt_that_runs_is_shared_with_a_late_row(engine):
    """The late row copies the running row's cache, and samples what it would have sampled alone."""
    body = {"input_ids": [5, 6, 7], "return_logprob": True}
    alone = engine.generate(**body, sampling_params={"sampling_seed": 8, "max_new_tokens": 30})
    before = _stats(engine)
    first = engine.submit(**body, sampling_params=LONG)
    _wait_until(lambda: _stats(engine)["decode_steps"] > before["decode_steps"] + 3)
    late = engine.generate(**body, sampling_params={"sampling_seed": 8, "max_new_tokens": 30})
    assert not first.done()
    assert _stats(engine)["prefilled_tokens"] == before["prefilled_tokens"] + 3
    assert _tokens(late) == _tokens(alone)
    np.testing.assert_allclose(late.rows[0].output_log_probs, alone.rows[0].output_log_probs, atol=1e-5)


def test_a_seeded_row_samples_the_same_in_any_company(engine):
    body = {"input_ids": [4, 5, 6], "sampling_params": {"sampling_seed": 3, "max_new_tokens": 50}}
    alone = _tokens(engine.generate(**body))[0]
    others = [engine.submit(input_ids=[7 + i], sampling_params={"max_new_tokens": 10 * i + 1}) for i in range(6)]
    assert _tokens(engine.generate(**body))[0] == alone
    for other in others:
        other.result(60)


def test_unseeded_rows_differ(engine):
    rows = _tokens(engine.generate(input_ids=[4], sampling_params={"n": 8, "max_new_tokens": 20}))
    assert len({tuple(row) for row in rows}) == 8


def test_requests_beyond_the_batch_wait_their_turn(checkpoint):
    with running_engine(checkpoint, max_running_requests=3) as engine:
        job = engine.generate(input_ids=[[4 + i] for i in range(10)], sampling_params={"max_new_tokens": 5, "n": 2})
        assert len(job.rows) == 20
        assert all(0 < len(row.output_ids) <= 5 for row in job.rows)


def test_waiting_rows_join_a_running_batch_in_company(checkpoint):
    """With 16 places two join at a time, so 32 rows that end one after the other take half as many prefill passes."""
    with running_engine(checkpoint, max_running_requests=16) as engine:
        model, passes = engine.scheduler._model, []
        original = model.prefill
        model.prefill = lambda ids, *rest: passes.append(len(ids)) or original(ids, *rest)
        params = [{"max_new_tokens": 5 + i, "ignore_eos": True} for i in range(48)]
        job = engine.generate(input_ids=[[4 + i % 40, 3 + i // 40] for i in range(48)], sampling_params=params)
        assert [len(row.output_ids) for row in job.rows] == [5 + i for i in range(48)]
        assert passes == [16] + [2] * 16
        one = engine.submit(input_ids=[5], sampling_params=LONG)
        _wait_until(lambda: _stats(engine)["num_running_reqs"] == 1)
        assert len(engine.generate(input_ids=[6], sampling_params={"max_new_tokens": 1}).rows[0].output_ids) == 1
        assert not one.done(), "where there is room for all, a single row joins at once"


@pytest.mark.parametrize(("options", "rows"), [({}, 256), ({"enable_deterministic_inference": True}, 128)])
def test_rows_decoded_together_by_default(checkpoint, options, rows):
    engine = InProcessEngine(checkpoint, max_running_requests=None, max_total_tokens=1 << 16, **options)
    assert engine.scheduler.limits.max_running_requests == rows


def test_requests_beyond_the_cache_wait_and_are_served(checkpoint):
    with running_engine(checkpoint, max_total_tokens=128, max_running_requests=16) as engine:
        params = {"max_new_tokens": 40, "ignore_eos": True}  # 43 tokens take 48: two rows fit
        futures = [engine.submit(input_ids=[4, 5, i], sampling_params=params) for i in range(3, 9)]
        _wait_until(lambda: _stats(engine)["decode_steps"] > 5)
        assert _stats(engine)["num_running_reqs"] <= 2
        assert all(len(future.result(60).rows[0].output_ids) == 40 for future in futures)
        slabs, tokens, kv_heads, head_dim = 2 + 1, 128, 2, 16
        assert _stats(engine)["kv_cache_bytes"] <= slabs * 2 * tokens * kv_heads * head_dim * 4


def test_sampled_frequencies_match_the_models_distribution(engine):
    scored = engine.generate(input_ids=[9, 10, EOS + 2], sampling_params={"max_new_tokens": 1}, return_logprob=True,
                             top_logprobs_num=VOCAB_SIZE).rows[0]  # fmt: skip
    expected = np.zeros(VOCAB_SIZE)
    for log_prob, token in scored.output_top[0]:
        expected[token] = np.exp(log_prob)
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    rows = engine.generate(input_ids=[9, 10, EOS + 2], sampling_params={"max_new_tokens": 1, "n": 4000}).rows
    counts = np.bincount([row.output_ids[0] for row in rows], minlength=VOCAB_SIZE) / 4000
    assert np.abs(counts - expected).max() < 0.035


def test_ends_at_a_stop_token_and_keeps_it(engine):
    free = _tokens(engine.generate(input_ids=[5], sampling_params={"sampling_seed": 2, **LONG}))[0]
    stop = free[10]
    first = free.index(stop)
    params = {"sampling_seed": 2, "max_new_tokens": 200, "stop_token_ids": [stop]}
    row = engine.generate(input_ids=[5], sampling_params=params).rows[0]
    ends = [i for i, token in enumerate(free) if token in (stop, EOS)]
    assert row.output_ids.tolist() == free[: ends[0] + 1]
    assert row.finish_reason == {"type": "stop", "matched": free[ends[0]]}
    ignoring = engine.generate(input_ids=[5], sampling_params=params | {"ignore_eos": True}).rows[0]
    assert ignoring.output_ids.tolist() == free
    later = engine.generate(input_ids=[5], sampling_params=params | {"min_new_tokens": first + 20}).rows[0]
    assert len(later.output_ids) >= first + 20
    assert not {stop, EOS} & set(later.output_ids[: first + 20].tolist())


def test_a_stop_token_at_the_length_limit_is_a_stop(engine):
    free = _tokens(engine.generate(input_ids=[5], sampling_params={"sampling_seed": 2, **LONG}))[0]
    last = free.index(free[6])
    params = {"sampling_seed": 2, "max_new_tokens": last + 1, "stop_token_ids": [free[6]]}
    assert engine.generate(input_ids=[5], sampling_params=params).rows[0].finish_reason["type"] == "stop"


def test_ends_at_a_stop_text_or_pattern(engine):
    tokenizer = make_tokenizer()
    free = _tokens(engine.generate(input_ids=[5], sampling_params={"sampling_seed": 2, **LONG}))[0]
    text = tokenizer.decode(free[20:22])
    assert len(text) == 2
    whole = tokenizer.decode(free)
    for params in ({"stop": ["never there", text]}, {"stop_regex": re.escape(text)}):
        row = engine.generate(input_ids=[5], sampling_params={"sampling_seed": 2, **LONG, **params}).rows[0]
        assert tokenizer.decode(row.output_ids.tolist()) == whole[: whole.index(text) + 2]
        assert row.finish_reason == {"type": "stop", "matched": params.get("stop_regex", text)}


def test_penalties_count_what_was_generated(engine):
    greedy = {"temperature": 0, **LONG}
    plain = _tokens(engine.generate(input_ids=[5, 6], sampling_params=greedy))[0]
    punished = _tokens(
        engine.generate(input_ids=[5, 6], sampling_params=greedy | {"frequency_penalty": 2.0, "presence_penalty": 2.0})
    )[0]
    assert max(np.bincount(punished)) < max(np.bincount(plain))
    assert len(set(punished)) > len(set(plain))


def test_logit_bias_forces_a_token(engine):
    params = {"max_new_tokens": 5, "ignore_eos": True, "logit_bias": {"17": 1e6}}
    assert _tokens(engine.generate(input_ids=[5], sampling_params=params)) == [[17] * 5]


def test_top_k_1_and_tiny_top_p_are_greedy(engine):
    expected = _tokens(engine.generate(input_ids=[5, 9], sampling_params={"temperature": 0, **LONG}))
    for params in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert _tokens(engine.generate(input_ids=[5, 9], sampling_params=params | LONG)) == expected


def test_a_prompt_may_be_scored_without_generating(engine):
    job = engine.generate(
        input_ids=[5, 9, 4, 8], sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=1
    )
    row = job.rows[0]
    assert row.output_ids.tolist() == []
    assert len(row.input_log_probs) == 2
    assert row.finish_reason == {"type": "length", "length": 0}


def test_answers_end_at_the_context_length(engine):
    row = engine.generate(input_ids=[4] * 250, sampling_params={"max_new_tokens": 100, "ignore_eos": True}).rows[0]
    assert len(row.output_ids) == CONTEXT_LENGTH - 250
    assert row.finish_reason["type"] == "length"


def test_abort_returns_what_there_is(engine):
    doomed = engine.submit(input_ids=[5], rid="doomed", sampling_params={"n": 2, **LONG, "sampling_seed": 1})
    spared = engine.submit(input_ids=[6], sampling_params={**LONG, "sampling_seed": 1})
    _wait_until(lambda: _stats(engine)["decode_steps"] > 5)
    assert engine.run(lambda: engine.scheduler.abort(lambda row: row.job.rid == "doomed", "because")) == 2
    job = doomed.result(10)
    for row in job.rows:
        assert row.finish_reason["type"] == "abort"
        assert 0 < len(row.output_ids) < 200
        assert len(row.output_log_probs) == len(row.output_ids)
    assert len(spared.result(60).rows[0].output_ids) == 200


def test_pause_aborts_then_holds_new_requests_until_resumed(engine):
    running = engine.submit(input_ids=[5], sampling_params=LONG)
    _wait_until(lambda: _stats(engine)["decode_steps"] > 3)
    engine.run(engine.scheduler.pause)
    assert running.result(10).rows[0].finish_reason["type"] == "abort"
    held = engine.submit(input_ids=[5], sampling_params={"max_new_tokens": 3, "ignore_eos": True})
    engine.run(engine.scheduler.pause)  # pausing twice leaves it waiting
    time.sleep(0.1)
    assert not held.done()
    engine.run(engine.scheduler.resume)
    assert len(held.result(10).rows[0].output_ids) == 3


def test_a_new_version_name_is_noted_by_running_rows(engine):
    running = engine.submit(input_ids=[5], sampling_params=LONG)
    _wait_until(lambda: _stats(engine)["decode_steps"] > 3)
    engine.run(lambda: engine.scheduler.set_version("next"))
    (first, start), (second, changed) = running.result(60).rows[0].versions
    assert (first, start, second) == ("default", 0, "next")
    assert 3 <= changed < 200


def test_weights_are_not_loaded_while_serving(engine):
    with pytest.raises(WeightUpdateError, match="pause_generation first"):
        engine.run(lambda: engine.scheduler.load_bucket("/dev/shm/miles-x", [], None))


def test_a_failing_step_fails_its_requests_only(engine):
    """The decode thread survives, answers what was in flight, and serves the next request as before."""
    body = {"input_ids": [5, 6], "sampling_params": {"sampling_seed": 4, "max_new_tokens": 20}}
    expected = _tokens(engine.generate(**body))
    model = engine.scheduler._model
    original, calls = model.decode, []

    def fail_at_the_fifth(*args):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError("no more")
        return original(*args)

    model.decode = fail_at_the_fifth
    futures = [engine.submit(input_ids=[5 + i], sampling_params=LONG) for i in range(3)]
    for future in futures[:1]:
        with pytest.raises(EngineError, match="MemoryError: no more"):
            future.result(20)
    _wait_until(lambda: all(future.done() for future in futures), 60)
    assert engine.scheduler.alive
    assert _stats(engine)["failures"] == 1
    assert _tokens(engine.generate(**body)) == expected


def test_a_request_that_ended_in_the_failing_step_keeps_its_answer(engine):
    model = engine.scheduler._model
    original = model.decode

    def fail_once(*args):
        model.decode = original
        raise MemoryError("no more")

    model.decode = fail_once
    engine.run(engine.scheduler.pause)
    short = engine.submit(input_ids=[5], sampling_params={"max_new_tokens": 1})
    long = engine.submit(input_ids=[6], sampling_params=LONG)
    engine.run(engine.scheduler.resume)  # both are admitted in the same turn
    with pytest.raises(EngineError, match="MemoryError: no more"):
        long.result(20)
    assert len(short.result(20).rows[0].output_ids) == 1
    assert engine.scheduler.alive
    assert engine.generate(input_ids=[5], sampling_params={"max_new_tokens": 2}).rows[0].finish_reason is not None


def test_weights_that_are_not_finite_fail_requests_by_name(engine):
    parameters = engine.scheduler._model.parameters
    saved = parameters.norm.clone()
    engine.run(lambda: parameters.norm.fill_(float("nan")))
    with pytest.raises(EngineError, match="not finite"):
        engine.generate(input_ids=[5])
    engine.run(lambda: parameters.norm.copy_(saved))
    assert engine.generate(input_ids=[5]).rows[0].finish_reason is not None


def test_stopping_answers_everything(checkpoint):
    with running_engine(checkpoint) as engine:
        futures = [engine.submit(input_ids=[5], sampling_params=LONG) for _ in range(3)]
        _wait_until(lambda: _stats(engine)["decode_steps"] > 3)
    assert all(future.result(0).rows[0].finish_reason["type"] == "abort" for future in futures)
