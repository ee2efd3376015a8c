"""The rollout manager's own methods, in this process; whole runs are in tests/integration/e2e."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miles.cluster import rollout_manager
from miles.cluster.engine_group import EngineAddress
from miles.cluster.rollout_manager import RolloutManagerActor
from miles.config import make_config
from miles.data import load_prompts, load_tokenizer
from miles.data.source import epoch_order
from miles.observe import RunDir


@pytest.fixture
def manager(model, tmp_path, monkeypatch) -> Any:
    """One for ten prompts, with some flags."""
    monkeypatch.setattr(rollout_manager, "open_process_log", lambda *_: None)  # it would take this process's output
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"input": "{n}+1="}}\n' for n in range(10)))

    def make(**flags: Any) -> RolloutManagerActor:
        values = {"rm_type": "random", "n_samples_per_prompt": 1, "rollout_batch_size": 1, **flags}
        config = make_config(hf_checkpoint=str(model), prompt_data=str(rows), **values)
        prompts = load_prompts(str(rows), tokenizer=load_tokenizer(str(model)))
        return RolloutManagerActor(config, prompts, RunDir(Path(tmp_path / "run")).create())

    return make


async def test_the_flags_of_requests_reach_the_engines_client(manager):
    actor = manager(sglang_server_concurrency=3, sglang_request_timeout=7.5)
    await actor.start([EngineAddress("engine-0", "http://127.0.0.1:1", "t")], 1, {})
    assert actor._pool._concurrency == 3
    assert [client.timeouts.generate_s for client in actor._pool.engines] == [7.5]
    await actor.close()


async def test_an_engine_that_was_replaced_while_the_manager_started_has_its_new_address(manager):
    actor = manager()
    gone, here = (EngineAddress("engine-0", f"http://127.0.0.1:{port}", "t") for port in (1, 2))
    assert await actor.use_engines([here], None) == {}
    await actor.start([gone], 1, {})
    assert [client.url for client in actor._pool.engines] == [here.url]
    await actor.close()


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_flags_of_order_and_group_size_reach_the_source(manager, shuffle):
    source = manager(rollout_shuffle=shuffle, rollout_seed=7, n_samples_per_prompt=2).source
    groups = source.get_samples(10)
    order = epoch_order(10, seed=7, epoch=0) if shuffle else range(10)
    assert [[sample.prompt for sample in group] for group in groups] == [[f"{n}+1="] * 2 for n in order]
