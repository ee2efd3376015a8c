"""`--enable-deterministic-inference`: a row is bitwise the same alone, in company, in any order, and joining late."""

from __future__ import annotations

import numpy as np
import pytest

from .checkpoints import VOCAB_SIZE, running_engine, save_checkpoint

NUM_ROWS = 8


def _bodies() -> list[dict]:
    """Rows that differ in everything: lengths over several cache extents, temperatures, filters, penalties."""
    rng = np.random.default_rng(11)
    extras = [
        {},
        {"temperature": 0.7},
        {"top_p": 0.8},
        {"top_k": 5, "min_p": 0.05},
        {"temperature": 0},
        {"frequency_penalty": 0.5, "repetition_penalty": 1.3},
        {"temperature": 1.3, "logit_bias": {"7": 2.0}},
        {"stop": ["ab"], "min_new_tokens": 4},
    ]
    return [
        {
            "input_ids": rng.integers(3, VOCAB_SIZE, length).tolist(),
            "sampling_params": {"max_new_tokens": 45, "sampling_seed": 100 + i, **extra},
            "return_logprob": True,
        }
        for i, (length, extra) in enumerate(zip((5, 9, 30, 33, 60, 64, 90, 12), extras, strict=True))
    ]


def _results(futures) -> list[tuple[bytes, bytes]]:
    rows = [future.result(60).rows[0] for future in futures]
    return [(row.output_ids.tobytes(), row.output_log_probs.tobytes()) for row in rows]


@pytest.fixture(scope="module", params=[(32, 1), (32, 2), (7, 1)], ids=["", "two_threads", "odd_batch"])
def engine(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("deterministic")
    save_checkpoint(directory, "qwen3_untied")
    rows, threads = request.param
    with running_engine(
        directory, enable_deterministic_inference=True, max_running_requests=rows, num_threads=threads
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine):
    return [_results([engine.submit(**body)])[0] for body in _bodies()]


def test_in_company(engine, alone):
    assert _results([engine.submit(**body) for body in _bodies()]) == alone


@pytest.mark.parametrize("seed", range(3))
def test_in_any_order(engine, alone, seed):
    order = np.random.default_rng(seed).permutation(NUM_ROWS)
    bodies = _bodies()
    got = _results([engine.submit(**bodies[i]) for i in order])
    assert got == [alone[i] for i in order]


def test_joining_late(engine, alone):
    """Each row enters when the one before has already made some tokens."""
    futures = []
    for body in _bodies():
        before = engine.run(engine.scheduler.stats)["decode_steps"]
        futures.append(engine.submit(**body))
        while engine.run(engine.scheduler.stats)["decode_steps"] < before + 3 and not futures[-1].done():
            pass
    assert _results(futures) == alone


def test_sharing_a_prompt_changes_nothing(engine, alone):
    """A prompt copied from a running row equals a prompt computed."""
    bodies = [_bodies()[0] | {"rid": str(i)} for i in range(3)]
    for i, body in enumerate(bodies):
        body["sampling_params"] = body["sampling_params"] | {"sampling_seed": 100 + i, "ignore_eos": True}
    single = [_results([engine.submit(**body)])[0] for body in bodies]
    shared_before = engine.run(engine.scheduler.stats)["shared_prompt_tokens"]
    assert _results([engine.submit(**body) for body in bodies]) == single
    assert engine.run(engine.scheduler.stats)["shared_prompt_tokens"] > shared_before


def test_a_second_engine_agrees(engine, alone):
    directory = engine.engine.info.options.model_path
    options = engine.engine.info.options
    with running_engine(
        directory,
        enable_deterministic_inference=True,
        max_running_requests=options.max_running_requests,
        num_threads=options.num_threads,
    ) as second:
        assert _results([second.submit(**body) for body in reversed(_bodies())]) == alone[::-1]
