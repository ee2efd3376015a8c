"""The whole room through its front: real HTTP, client, pool, data source, reward workers; and the two examples."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from miles.config import args_view, make_config
from miles.data.prompts import load_prompts
from miles.data.source import RolloutDataSource
from miles.engines.client import EngineClient
from miles.engines.pool import EnginePool
from miles.rollout import Rollout, check
from miles.types import Status

from .protocol_server import ALPHABET, END, Answer, ProtocolServer, make_tokenizer, serving, write_prompts

ROOT = Path(__file__).parents[3]
REWARD = f"{ROOT / 'examples/custom_reward/reward.py'}:score"
CALCULATOR = f"{ROOT / 'examples/custom_generate/generate.py'}:with_calculator"


@contextlib.asynccontextmanager
async def rolling(tmp_path: Path, answer: Answer, **flags: Any) -> AsyncIterator[tuple[Rollout, ProtocolServer]]:
    tokenizer = make_tokenizer()
    path = write_prompts(
        tmp_path / "train.jsonl", [{"input": f"{a}+{b}=", "label": str(a + b)} for a in range(4) for b in (7, 8)]
    )
    config = make_config(
        **{
            "prompt_data": path,
            "label_key": "label",
            "rollout_batch_size": 3,
            "n_samples_per_prompt": 4,
            "rollout_max_response_len": 8,
            "eval_prompt_data": ("held_out", path),
            "eval_interval": 1,
            "n_samples_per_eval_prompt": 2,
            "rm_type": "exact",
            **flags,
        }
    )
    assert check(config) == []
    prompts = load_prompts(path, label_key="label", tokenizer=tokenizer)
    source = RolloutDataSource(prompts, n_samples_per_prompt=4, shuffle=True, seed=1)
    async with serving(answer) as server, EngineClient("engine-0", server.url, "token") as client:
        pool = EnginePool([client], 16)
        rollout = Rollout(config, source=source, pool=pool, tokenizer=tokenizer, args=args_view(config))
        await rollout.start()
        try:
            yield rollout, server
        finally:
            await rollout.close()
            await rollout.close()
            await pool.close()


def right_or_wrong(text: str, params: dict[str, Any]) -> str:
    """Right for every second seed, and for greedy requests."""
    a, b = text.rstrip("=").split("+")
    return f"{int(a) + int(b) + params['sampling_seed'] % 2}$"


async def test_generate_and_evaluate(tmp_path: Path) -> None:
    async with rolling(tmp_path, right_or_wrong) as (rollout, server):
        seen: list[Any] = []
        rollout.on_progress = lambda *a: seen.append(a)
        output = await rollout.generate(0)
        assert [len(g) for g in output.groups] == [4, 4, 4]
        for sample in (s for g in output.groups for s in g):
            assert sample.reward == float(sample.response == sample.label)
            assert sample.tokens[-1] == END
            assert sample.status is Status.COMPLETED
            assert len(sample.rollout_log_probs or []) == sample.response_length == len(sample.response) + 1
        assert len(server.requests) == 3  # one for each group
        evaluation = await rollout.evaluate(1)
        held_out = evaluation.samples_by_dataset["held_out"]
        assert evaluation.metrics["eval/held_out"] == sum(s.reward for s in held_out) / 16
        assert seen[2][:2] == (3, 3)
        assert seen[-1][:2] == (8, 8)


async def test_the_custom_reward_example(tmp_path: Path) -> None:
    flags = {"rm_type": None, "custom_rm_path": REWARD, "reward_key": "score"}
    async with rolling(tmp_path, right_or_wrong, **flags) as (rollout, _):
        output = await rollout.generate(0)
        for sample in (s for g in output.groups for s in g):
            correct = sample.response == sample.label
            assert sample.reward["correct"] == float(correct)
            assert (sample.reward["score"] == 1.0) is correct
            assert sample.reward["score"] <= 0.5 or correct
        assert "eval/held_out/pass@2" in (await rollout.evaluate(0)).metrics


async def test_the_custom_generate_example(tmp_path: Path) -> None:
    def asks_then_answers(text: str, params: dict[str, Any]) -> str:
        if "calc:" not in text:
            return f"calc:{text.rstrip('=')}?"
        return text.rpartition("? ")[2].strip() + "$"

    flags = {"custom_generate_function_path": CALCULATOR, "rollout_max_response_len": 16}
    async with rolling(tmp_path, asks_then_answers, **flags) as (rollout, server):
        output = await rollout.generate(0)
    tokenizer = make_tokenizer()
    for sample in (s for g in output.groups for s in g):
        question, label = str(sample.prompt).rstrip("="), sample.label
        asked, observed, answered = f"calc:{question}?", f" {label}\n", label
        assert sample.response == asked + observed + answered
        assert sample.loss_mask == [1] * len(asked) + [0] * len(observed) + [1] * (len(answered) + 1)
        ids = [ALPHABET.index(c) for c in str(sample.prompt) + sample.response] + [END]
        assert sample.tokens == ids == [*tokenizer.encode(str(sample.prompt) + sample.response), END]
        assert sample.rollout_log_probs == [-0.01 * i * m for i, m in zip(ids[4:], sample.loss_mask, strict=True)]
        assert sample.metadata["calculator_calls"] == 1
    turns: dict[str, set[int]] = {}
    for request in server.requests:
        turns.setdefault(request["rid"].split("-t")[0], set()).add(request["sampling_params"]["sampling_seed"])
    assert all(len(seeds) == 2 for seeds in turns.values())


def test_the_calculator_calculates_and_nothing_else() -> None:
    from miles.config import load_module

    calculate = load_module(CALCULATOR.partition(":")[0], flag="test").calculate
    assert [calculate(e) for e in ("12+34", "2*(3-5)", "-4", "2**9", "a+1", "1+", "007", "")] == [
        "46",
        "-4",
        "-4",
        *"?" * 5,
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rm-type", "math", "--response", r"so \boxed{\frac12}", "--label", "0.5"], "reward 1.0"),
        (["--custom-rm-path", REWARD, "--reward-key", "score", "--response", "47", "--label", "46"], '"score":0.25'),
    ],
)
def test_trying_out_a_reward(arguments: list[str], expected: str) -> None:
    command = [sys.executable, "-m", "miles.rollout.rewards", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout
