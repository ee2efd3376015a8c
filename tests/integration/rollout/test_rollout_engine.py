"""Rollouts from the embedded engine, a real process: deterministic mode repeats itself bit for bit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from miles.config import args_view, make_config
from miles.data.prompts import load_prompts
from miles.data.source import RolloutDataSource
from miles.engines.client import EngineClient
from miles.engines.launch import launch_embedded
from miles.engines.pool import EnginePool
from miles.rollout import Rollout
from miles.types import Status
from tests.integration.tiny_model import tiny_qwen3

from .protocol_server import END, make_tokenizer, write_prompts


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[tuple[EngineClient, str]]:
    tokenizer = make_tokenizer()
    directory = str(tmp_path / "model")
    tiny_qwen3(len(tokenizer), seed=0, max_position_embeddings=64, eos_token_id=END).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    process = await launch_embedded(
        name="engine-0",
        model_path=directory,
        token="token",
        log_path=tmp_path / "engine.log",
        env={"OMP_NUM_THREADS": "1"},
        server_args={"enable_deterministic_inference": True, "max_running_requests": 8},
        device="cpu",
    )
    try:
        async with EngineClient("engine-0", process.url, "token") as client:
            yield client, directory
    finally:
        process.terminate()


async def test_two_runs_of_one_seed_agree_bitwise_under_oversampling_and_filters(
    engine: tuple[EngineClient, str], tmp_path: Path
) -> None:
    client, directory = engine
    path = write_prompts(tmp_path / "p.jsonl", [{"input": f"{a}+{a * 7}="} for a in range(24)])
    config = make_config(
        hf_checkpoint=directory,
        prompt_data=path,
        rm_type="random",
        rollout_batch_size=4,
        over_sampling_batch_size=6,
        n_samples_per_prompt=3,
        rollout_max_response_len=10,
        rollout_temperature=0.7,
        dynamic_sampling_filter_path=f"{Path(__file__).with_name('hooks.py')}:keep_some",
        deterministic_mode=True,
    )
    tokenizer = make_tokenizer()
    pool = EnginePool([client], 16)

    async def run() -> list[Any]:
        prompts = load_prompts(path, tokenizer=tokenizer)
        source = RolloutDataSource(prompts, n_samples_per_prompt=3, shuffle=True, seed=config.rollout.rollout_seed)
        rollout = Rollout(config, source=source, pool=pool, tokenizer=tokenizer, args=args_view(config))
        await rollout.start()
        try:
            groups = [group for i in range(3) for group in (await rollout.generate(i)).groups]
        finally:
            await rollout.close()
        return [groups, source.state_dict()]

    first, second = await run(), await run()
    for one, other in zip(first[0], second[0], strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.tokens == b.tokens
            assert a.rollout_log_probs == b.rollout_log_probs
    assert first == second
    samples = [s for group in first[0] for s in group]
    assert len(samples) == 3 * 4 * 3
    assert len({tuple(s.tokens) for s in samples}) > 30  # seeds differ, so answers do
    for sample in samples:
        assert sample.status is (Status.COMPLETED if sample.tokens[-1] == END else Status.TRUNCATED)
        assert sample.weight_versions
    await pool.close()
