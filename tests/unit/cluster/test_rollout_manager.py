"""The rollout manager's own methods, in this process; whole runs are in tests/integration/e2e."""

from __future__ import annotations

from pathlib import Path

from miles.cluster import rollout_manager
from miles.cluster.engine_group import EngineAddress
from miles.config import make_config
from miles.data import load_prompts
from miles.observe import RunDir
from tools.tiny_task.base_model import build_model, build_tokenizer


async def test_an_engine_that_was_replaced_while_the_manager_started_has_its_new_address(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(rollout_manager, "open_process_log", lambda *_: None)  # it would take this process's output
    tokenizer = build_tokenizer()
    for part in (tokenizer, build_model(tokenizer, seed=0)):
        part.save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "1+1="}\n')
    config = make_config(
        hf_checkpoint=str(tmp_path / "model"),
        prompt_data=str(rows),
        rm_type="random",
        n_samples_per_prompt=1,
        rollout_batch_size=1,
    )
    prompts = load_prompts(str(rows), tokenizer=tokenizer)
    manager = rollout_manager.RolloutManagerActor(config, prompts, RunDir(tmp_path / "run").create())
    gone, here = (EngineAddress("engine-0", f"http://127.0.0.1:{port}", "t") for port in (1, 2))
    assert await manager.use_engines([here], None) == {}
    await manager.start([gone], 1, {})
    assert manager._pool is not None
    assert [client.url for client in manager._pool.engines] == [here.url]
    await manager.close()
