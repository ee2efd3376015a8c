"""Real embedded engine processes over a tiny random checkpoint."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from miles.engines.client import EngineClient
from miles.engines.launch import EngineProcess, launch_embedded
from tests.integration.tiny_model import tiny_qwen3

TOKEN = secrets.token_hex(16)


def make_model(seed: int) -> Qwen3ForCausalLM:
    """A tied Qwen3, random enough that greedy answers differ from one seed to the next."""
    return tiny_qwen3(96, seed=seed, max_position_embeddings=512, initializer_range=0.4, eos_token_id=0)


def hf_weights(model: Qwen3ForCausalLM) -> list[tuple[str, torch.Tensor]]:
    """What a trainer sends: the names of the checkpoint, so no output layer when it is tied."""
    return [(name, p) for name, p in model.named_parameters() if name != "lm_head.weight"]


def hf_greedy(model: Qwen3ForCausalLM, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_model(0).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def start_engines(checkpoint, tmp_path_factory) -> Iterator[Callable[[int], list[EngineProcess]]]:
    """Starts engines side by side; ends them with the session."""
    started: list[EngineProcess] = []
    logs = tmp_path_factory.mktemp("logs")

    def start(count: int) -> list[EngineProcess]:
        async def launch() -> list[EngineProcess]:
            return await asyncio.gather(
                *(
                    launch_embedded(
                        name=f"engine-{i}",
                        model_path=str(checkpoint),
                        token=TOKEN,
                        log_path=logs / f"engine-{len(started) + i}.log",
                        env={"OMP_NUM_THREADS": "1"},
                        server_args={"skip_tokenizer_init": True, "max_running_requests": 8, "random_seed": 0},
                        start_timeout_s=90,
                        device="cpu",
                    )
                    for i in range(count)
                )
            )

        engines = asyncio.run(launch())
        started.extend(engines)
        return engines

    yield start
    for engine in started:
        engine.terminate()
    # Nothing of ours may be left, whatever the tests did.
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"miles-{os.getpid()}-")]


@pytest.fixture(scope="module")
def engine_processes(start_engines) -> list[EngineProcess]:
    return start_engines(2)


@pytest.fixture
async def engines(engine_processes):
    clients = [EngineClient(e.name, e.url, TOKEN) for e in engine_processes]
    yield clients
    for client in clients:
        await client.close()
