"""A stand-in for the engines at the pool's seam, and what a rollout needs around it: real source, scorer and runner.

The "model" answers with three tokens drawn from the request's seed, so equal seeds give equal answers; its text is their
digits. How long an answer takes is the test's choice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from miles.config import Config, args_view, make_config
from miles.data.prompts import Prompt, PromptData
from miles.data.source import RolloutDataSource
from miles.rollout.context import Runtime
from miles.rollout.filters import GroupFilter
from miles.rollout.groups import GroupRunner
from miles.rollout.loop import GroupRollout
from miles.rollout.rewards.scorer import Scorer


class Digits:
    """A tokenizer: token i is the digit i % 10."""

    eos_token_id = 99

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [int(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join("<end>" if i == 99 else str(i % 10) for i in ids)


def reply(tokens: list[int], *, kind: str = "stop", version: str = "0", text: str | None = None) -> dict[str, Any]:
    return {
        "text": Digits().decode(tokens) if text is None else text,
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": kind},
            "output_token_logprobs": [[-0.5 - i, t, None] for i, t in enumerate(tokens)],
            "weight_version": version,
        },
    }


class ScriptedPool:
    def __init__(self, behave: Callable[[dict[str, Any], int], Awaitable[Any] | None] | None = None):
        self.payloads: list[dict[str, Any]] = []
        self.aborts = 0
        self.running = 0
        self._behave = behave

    async def generate(self, payload: dict[str, Any], *, num_samples: int | None = None) -> Any:
        self.payloads.append(payload)
        self.running += 1
        try:
            if self._behave is not None and (wait := self._behave(payload, len(self.payloads) - 1)) is not None:
                special = await wait
                if special is not None:
                    return special
            params = payload["sampling_params"]
            if isinstance(params, dict):
                return self.answer(params)
            return [self.answer(p) for p in params]
        finally:
            self.running -= 1

    @staticmethod
    def answer(params: dict[str, Any]) -> dict[str, Any]:
        seed = params["sampling_seed"]
        return reply([seed % 10, seed // 10 % 10, seed // 100 % 10])

    async def abort_all(self) -> None:
        self.aborts += 1


def make_source(config: Config, num_prompts: int = 40) -> RolloutDataSource:
    prompts = tuple(Prompt(f"{i:02d}", [i // 10, i % 10], str(i % 7), {}, i + 1) for i in range(num_prompts))
    n = config.rollout.n_samples_per_prompt
    return RolloutDataSource(PromptData("p.jsonl", prompts, 0, "f"), n_samples_per_prompt=n, shuffle=False, seed=0)


def config_of(**flags: Any) -> Config:
    base = {
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 2,
        "rm_type": "random",
        "rollout_max_response_len": 3,
    }
    return make_config(**{**base, **flags})


def make_rollout(
    config: Config,
    pool: ScriptedPool,
    *,
    source: RolloutDataSource | None = None,
    hook: Any = None,
    group_filter: Any = None,
    progress: Any = lambda *a: None,
    stall_limit_s: float = 20.0,
) -> tuple[GroupRollout, RolloutDataSource]:
    source = source or make_source(config)
    args = args_view(config)
    runtime = Runtime(config, args, pool, Digits(), frozenset({99}))
    runner = GroupRunner(runtime, Scorer(args, None), hook=hook, hook_name="hook", hook_limit_s=config_limit(config))
    rollout = GroupRollout(
        runtime,
        source,
        runner,
        GroupFilter(group_filter, "my.filter", args),
        stall_limit_s=stall_limit_s,
        on_progress=progress,
    )
    return rollout, source


def config_limit(config: Config) -> float:
    return config.rollout.custom_generate_timeout


async def later(seconds: float, value: Any = None) -> Any:
    await asyncio.sleep(seconds)
    return value
