"""Evaluation: estimators against brute force and hand-worked numbers, and whole evaluations over the scripted pool."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from miles.config import EvalDataset, args_view
from miles.data.prompts import Prompt
from miles.errors import EngineError, TooManyFailures
from miles.rollout.context import Runtime
from miles.rollout.evaluate import Evaluator, pass_at_k, summarize
from miles.rollout.groups import GroupRunner
from miles.rollout.rewards.scorer import Scorer
from miles.types import Sample, Status

from .scripted import Digits, ScriptedPool, config_of, later, reply


@pytest.mark.parametrize(("n", "passed", "k"), [(4, 0, 1), (4, 1, 2), (6, 2, 3), (5, 5, 5), (5, 1, 5), (7, 3, 4)])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_pass(n: int, passed: int, k: int) -> None:
    subsets = list(itertools.combinations([1] * passed + [0] * (n - passed), k))
    assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_refuses_what_it_cannot_estimate() -> None:
    with pytest.raises(ValueError, match="k=3 n=2"):
        pass_at_k(2, 1, 3)


def scored(index: int, reward: Any, **fields: Any) -> Sample:
    return Sample(index=index, reward=reward, status=Status.COMPLETED, response_length=4, **fields)


def test_a_summary_by_hand() -> None:
    groups = [
        [scored(0, 1.0), scored(1, 0.0)],
        [scored(2, 1.0), scored(3, 1.0)],
        [scored(4, 0.0), Sample(index=5, status=Status.FAILED)],
    ]
    groups[1][1].status = Status.TRUNCATED
    out = summarize(EvalDataset("d", "p", n_samples_per_eval_prompt=2), groups)
    half = 1.959964 * 0.5 / math.sqrt(3)  # prompt means 0.5, 1, 0: std 0.5
    assert out == pytest.approx(
        {
            "eval/d": 0.5,
            "eval/d/ci_low": 0.5 - half,
            "eval/d/ci_high": 0.5 + half,
            "eval/d/pass@1": 0.5,
            "eval/d/pass@2": 1.0,
            "eval/d/failed_ratio": 1 / 6,
            "eval/d/response_len/mean": 4.0,
            "eval/d/truncated_ratio": 1 / 5,
        }
    )


def test_dict_rewards_and_rows_of_one_trajectory() -> None:
    group = [scored(0, {"acc": 0}, trajectory_id=0), scored(0, {"acc": 1}, trajectory_id=0), scored(1, {"acc": 0})]
    out = summarize(EvalDataset("d", "p", n_samples_per_eval_prompt=2, reward_key="acc"), [group])
    assert out["eval/d"] == 0.5
    assert "eval/d/ci_low" not in out  # no interval from one prompt


def make_evaluator(pool: ScriptedPool, *datasets: EvalDataset, **flags: Any) -> Evaluator:
    config = config_of(**flags)
    args = args_view(config)
    runtime = Runtime(config, args, pool, Digits())
    prompts = [Prompt(f"{i}", [i], str(i), {}, i + 1) for i in range(10)]
    return Evaluator(runtime, GroupRunner(runtime, Scorer(args, None)), [(d, prompts) for d in datasets])


def dataset(name: str, **fields: Any) -> EvalDataset:
    return EvalDataset(
        name, "p", **{"n_samples_per_eval_prompt": 4, "rm_type": "random", "max_response_len": 3, **fields}
    )


async def test_one_file_under_two_names_and_settings() -> None:
    pool, seen = ScriptedPool(), []
    sampled, greedy = dataset("addition"), dataset("addition_greedy", temperature=0.0, n_samples_per_eval_prompt=1)
    output = await make_evaluator(pool, sampled, greedy)(2, lambda *a: seen.append(a))
    assert [len(output.samples_by_dataset[n]) for n in ("addition", "addition_greedy")] == [40, 10]
    assert {s.temperature for s in output.samples_by_dataset["addition_greedy"]} == {0.0}
    assert output.metrics["eval/addition/weight_version"] == 0.0
    assert {k for k in output.metrics if "pass@" in k and "greedy" not in k} == {
        f"eval/addition/pass@{k}" for k in (1, 2, 4)
    }
    assert seen[-1] == (20, 20, 150)
    seeds = {p["sampling_seed"] for payload in pool.payloads for p in payload["sampling_params"]}
    assert len(seeds) == 50


async def test_an_evaluation_of_two_weight_versions_is_an_error() -> None:
    changed = lambda payload, i: later(0, [reply([1], version="7")] * 4) if i == 5 else None  # noqa: E731
    with pytest.raises(EngineError, match="evaluation at step 3, got samples of weight versions 0, 7"):
        await make_evaluator(ScriptedPool(changed), dataset("d"))(3, lambda *a: None)


async def test_failures_stop_an_evaluation_as_they_stop_a_rollout() -> None:
    async def refuse() -> None:
        raise EngineError("boom")

    with pytest.raises(TooManyFailures, match=r"evaluation d at step 0, got 12 failed samples of 40.*(?s:.*)boom"):
        await make_evaluator(ScriptedPool(lambda payload, i: refuse()), dataset("d"))(0, lambda *a: None)


async def test_a_data_set_has_an_interval_of_its_own() -> None:
    evaluator = make_evaluator(ScriptedPool(), dataset("often", interval=1), dataset("rare", interval=4), num_rollout=6)
    ran = {}
    for step in range(7):
        ran[step] = set((await evaluator(step, lambda *a: None)).samples_by_dataset)
    assert [step for step in ran if "rare" in ran[step]] == [0, 4, 6]
    assert all("often" in names for names in ran.values())
