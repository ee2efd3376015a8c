"""When the files of a rollout are written: after its batch has left, and as it was whatever a log hook does to it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from miles.cluster.rollout_manager import RolloutManagerActor
from miles.config import make_config
from miles.data import load_rollout_samples, save_rollout_samples
from miles.observe import RunDir
from miles.observe.report.trace import TokenTexts, TraceFiles
from miles.rollout import LogHooks
from miles.types import Sample, Status


class _Letters:
    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(ord("a") + token) for token in tokens)


def groups() -> list[list[Sample]]:
    return [
        [
            Sample(
                group_index=0,
                index=i,
                tokens=[0, 1 + i, 2],
                response_length=2,
                reward=float(i),
                rollout_log_probs=[-1.0, -0.5],
                status=Status.COMPLETED,
            )
            for i in range(2)
        ]
    ]


def manager(tmp_path: Path, **flags: Any) -> RolloutManagerActor:
    """One that replays `groups()`, in this process."""
    save_rollout_samples(tmp_path / "replay_0.jsonl", groups())
    made: Any = object.__new__(RolloutManagerActor)
    made.config = make_config(
        load_debug_rollout_data=str(tmp_path / "replay_{rollout_id}.jsonl"), micro_batch_size=1, **flags
    )
    made.run_dir = RunDir(tmp_path / "run").create()
    made.source, made._pool, made.dp_size, made._channels, made._cache = None, None, 1, (), None
    made._log_hooks, made._states, made._unwritten = LogHooks(made.config), {}, {}
    made._texts, made._traces = TokenTexts(_Letters()), TraceFiles.of(made.run_dir.path)
    return made


@pytest.mark.parametrize("hooked", [False, True])
def test_samples_and_traces_are_written_once_and_unchanged(tmp_path, hooked):
    hook = tmp_path / "hook.py"
    hook.write_text(
        "def log(rollout_id, args, samples, metrics, seconds):\n    samples[0].tokens.clear()\n    return False\n"
    )
    flags = {"custom_rollout_log_function_path": f"{hook}:log"} if hooked else {}
    actor = manager(tmp_path, **flags)
    path = actor.run_dir.samples / "rollout_000000.jsonl"

    batch, metrics = asyncio.run(actor.generate(0, None))
    assert batch.metadata["traced"] == [0, 1]
    assert metrics["rollout/raw_reward"] == 0.5
    assert path.exists() == hooked  # before the hook, where there is one
    asyncio.run(actor.write_samples(0))
    assert load_rollout_samples(path) == groups()
    trace = orjson.loads((actor.run_dir.path / "trace" / "rollout_000000.json").read_bytes())
    assert [(entry["line"], entry["pieces"]) for entry in trace] == [(0, ["b", "c"]), (1, ["c", "c"])]

    path.unlink()
    asyncio.run(actor.write_samples(0))
    assert not path.exists()
    assert not actor._unwritten
