"""The rollout engines: one Ray actor per engine, which runs a server process on its node.

Everything else talks to the server over HTTP at its `EngineAddress`; the actor exists to place it, to own its life, and
to say how it died when somebody finds that it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from miles.config import Config, engine_server_args, eval_datasets, import_plugins
from miles.engines.launch import EngineProcess, launch_embedded
from miles.observe import open_process_log

from .actors import actor, all_stacks, control
from .placement import Placement
from .waits import Process, wait_for

#: For engines' actors to say how their servers ended, while the run is failing.
_EPITAPH_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class EngineAddress:
    """How to reach one engine. The token is the run's: whoever holds it may change the engine's weights."""

    name: str
    url: str
    token: str


class EngineActor:
    """Owns one server process. When this actor dies, its end of the server's stdin closes and the server exits."""

    def __init__(self, config: Config, name: str, logs: Path):
        open_process_log(logs, f"{name}-actor")
        self.config, self.name, self.logs = config, name, logs
        self._process: EngineProcess | None = None

    def start(self, token: str, device: str) -> EngineAddress:
        """Returns once the server answers. Raises `EngineError` with the end of its log if it dies first."""
        assert self.config.ckpt.hf_checkpoint is not None
        import_plugins(self.config)
        self._process = asyncio.run(
            launch_embedded(
                name=self.name,
                model_path=self.config.ckpt.hf_checkpoint,
                token=token,
                log_path=self.logs / f"{self.name}.log",
                env={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} if device == "cpu" else {},
                server_args=_server_args(self.config),
                start_timeout_s=self.config.cluster.start_timeout,
                device=device,
            )
        )
        return EngineAddress(self.name, self._process.url, token)

    def epitaph(self) -> str | None:
        """How the server ended; None while it runs, or was never started."""
        return None if self._process is None else self._process.epitaph()

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()

    @control
    def stacks(self) -> str:
        return all_stacks()


def _server_args(config: Config) -> dict[str, object]:
    """What --sglang-* passed, and what the run's own flags imply."""
    args = engine_server_args(config)
    args.setdefault("random_seed", config.rollout.rollout_seed)
    # Evaluations may have longer contexts than training, and the engines serve both.
    contexts = [config.rollout.rollout_max_context_len, *(d.max_context_len for d in eval_datasets(config))]
    if None not in contexts:
        args.setdefault("context_length", max(c for c in contexts if c is not None))
    if config.cluster.deterministic_mode:
        args["enable_deterministic_inference"] = True
    return args


class EngineGroup:
    """The driver's view of all engines."""

    def __init__(self, config: Config, placement: Placement, logs: Path):
        self._limit_s = config.cluster.start_timeout
        self._device = "cuda" if placement.use_gpu else "cpu"
        self.processes = [
            Process(
                f"engine-{i}",
                actor(EngineActor).options(**placement.options(bundles[0])).remote(config, f"engine-{i}", logs),
                logs / f"engine-{i}.log",
            )
            for i, bundles in enumerate(placement.layout.engine_bundles)
        ]

    def start(self, token: str) -> Sequence[EngineAddress]:
        """All engines side by side."""
        calls = {p: p.handle.start.remote(token, self._device) for p in self.processes}
        return wait_for(calls, what="the engines to start", limit_s=self._limit_s + 10)

    def epitaphs(self) -> list[str]:
        """Of the engines that have ended by themselves. For a run that fails: asks briefly, never raises."""
        found = []
        asked = [p.handle.epitaph.remote() for p in self.processes]
        ray.wait(asked, num_returns=len(asked), timeout=_EPITAPH_TIMEOUT_S)
        for ref in asked:
            with contextlib.suppress(ray.exceptions.RayError):
                found.append(ray.get(ref, timeout=0))
        return [text for text in found if text is not None]

    def stop(self) -> None:
        if not self.processes:
            return
        ray.wait([p.handle.stop.remote() for p in self.processes], num_returns=len(self.processes), timeout=10)
