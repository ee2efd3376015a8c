"""Trainer and engine are one policy: log-probs of what the engine samples over HTTP, after an update that it was sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.data import build_train_batches
from miles.engines.client import EngineClient
from miles.engines.launch import launch_embedded
from miles.types import Sample, Status
from miles.weights import SharedMemoryTransport, publish
from tests.integration.rollout.protocol_server import make_tokenizer

from .trainer_tools import VOCAB, config_for, make_batch, save_hf_model, trainer_for


@pytest.mark.parametrize(("kind", "tied"), [("qwen3", True), ("qwen2", False), ("llama", False), ("qwen3_moe", False)])
async def test_log_probs_equal_the_engines_at_every_temperature(tmp_path: Path, kind: str, tied: bool) -> None:
    hf = save_hf_model(tmp_path / "hf", kind, tied=tied)
    make_tokenizer().save_pretrained(hf)
    process = await launch_embedded(
        name="engine-0",
        model_path=str(hf),
        token="token",
        log_path=tmp_path / "engine.log",
        env={"OMP_NUM_THREADS": "1"},
        server_args={"max_running_requests": 8},
        device="cpu",
    )
    try:
        async with EngineClient("engine-0", process.url, "token") as client:
            with trainer_for(config_for(hf, lr=1e-2, log_probs_chunk_size=-1), tmp_path) as trainer:
                before = trainer.log_probs(make_batch())
                trainer.train(make_batch())
                after = trainer.log_probs(make_batch())
                assert max(np.abs(a - b).max() for a, b in zip(after, before, strict=True)) > 1e-2, "the policy moved"
                await publish(trainer.named_weights(), [client], SharedMemoryTransport(), "1", 1 << 20)
                for temperature in (1.0, 0.7):
                    samples = await _sampled(client, temperature)
                    config = config_for(hf, rollout_batch_size=1, n_samples_per_prompt=len(samples))
                    (batch,) = build_train_batches(
                        [samples], config=config, rollout_id=0, dp_size=1, score_all=True
                    ).batches
                    theirs = np.split(batch.ragged["rollout_log_probs"], np.cumsum(batch.rows["response_lengths"])[:-1])
                    for ours, engines in zip(trainer.log_probs(batch), theirs, strict=True):
                        np.testing.assert_allclose(ours, engines, atol=1e-5)
                    assert {v for s in samples for v in s.weight_versions} == {"1"}
    finally:
        process.terminate()


async def _sampled(client: EngineClient, temperature: float) -> list[Sample]:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (1, 4, 9, 17, 30, 2)]
    params: list[dict[str, Any]] = [
        {"temperature": temperature, "max_new_tokens": 6 + 5 * i, "ignore_eos": True, "sampling_seed": i}
        for i in range(len(prompts))
    ]
    payload = {"input_ids": prompts, "sampling_params": params, "return_logprob": True}
    replies = await client.generate(payload)
    samples = []
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        entries = reply["meta_info"]["output_token_logprobs"]
        samples.append(
            Sample(
                group_index=0,
                index=i,
                tokens=prompt + [entry[1] for entry in entries],
                response_length=len(entries),
                rollout_log_probs=[entry[0] for entry in entries],
                temperature=temperature,
                reward=float(i % 2),
                status=Status.TRUNCATED,
                weight_versions=[reply["meta_info"]["weight_version"]],
            )
        )
    return samples
