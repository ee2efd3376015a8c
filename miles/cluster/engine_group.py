"""The rollout engines: one Ray actor per engine, which runs a server process on its node.

Everything else talks to the server over HTTP at its `EngineAddress`; the actor exists to place it, to own its life, and
to say how it died when somebody finds that it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import ray

from miles.config import Config, engine_server_args, eval_datasets, import_plugins
from miles.engines.client import EngineClient
from miles.engines.launch import EngineProcess, launch_embedded
from miles.engines.sglang import launch_sglang
from miles.engines.watch import EngineWatch
from miles.observe import open_process_log

from .actors import Beat, actor, all_stacks, control, sign_of_life
from .placement import Placement
from .supervision import silence_limit_s
from .waits import Look, Process, wait_for

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
        self._watch: EngineWatch | None = None

    def start(self, token: str, device: str, *, paused: bool) -> EngineAddress:
        """Returns once the server answers, in place of one that was started before.

        A `paused` one answers no generation before it was given weights.
        Raises `EngineError` with the end of its log if it dies first.
        """
        assert self.config.ckpt.hf_checkpoint is not None
        import_plugins(self.config)
        self.stop(grace_s=0.0)
        launch = launch_embedded
        if self.config.cluster.rollout_engine == "sglang":
            launch = functools.partial(launch_sglang, python=self.config.cluster.rollout_engine_python)
        self._process = process = asyncio.run(
            launch(
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
        if paused:
            asyncio.run(_pause(EngineClient(self.name, process.url, token)))
        self._watch = EngineWatch(process, silence_limit_s(self.config.cluster.heartbeat_timeout))
        return EngineAddress(self.name, process.url, token)

    def stop(self, grace_s: float = 5.0) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        if self._process is not None:
            self._process.terminate(grace_s)

    @control
    def epitaph(self) -> str | None:
        """How the server ended; None while it runs, or was never started."""
        return None if self._process is None else self._process.epitaph()

    @control
    def end_server(self) -> None:
        """Kills a server that does not answer, so that whoever waits for its answer is told."""
        if self._process is not None:
            self._process.terminate(grace_s=0.0)

    @control
    def beat(self) -> Beat:
        watch, process = self._watch, self._process
        return sign_of_life(
            trouble=None if watch is None else watch.trouble(), server_pid=None if process is None else process.pid
        )

    @control
    def stacks(self) -> str:
        return all_stacks()


async def _pause(client: EngineClient) -> None:
    async with client:
        await client.pause()


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
        self.config, self._placement, self._logs = config, placement, logs
        self._limit_s = config.cluster.start_timeout
        self._device = "cuda" if placement.use_gpu else "cpu"
        self._token = ""
        # What trains will publish weights; without it, those of the checkpoint are the ones to serve.
        self._paused = bool(placement.layout.actor_bundles)
        self.look: Look | None = None
        self.processes = [self._make(number) for number in range(len(placement.layout.engine_bundles))]
        self.addresses: list[EngineAddress] = []
        """How to reach engine i, as of its last start."""

    def _make(self, number: int) -> Process:
        bundle, name = self._placement.layout.engine_bundles[number][0], f"engine-{number}"
        handle = actor(EngineActor).options(**self._placement.options(bundle)).remote(self.config, name, self._logs)
        return Process(name, handle, self._logs / f"{name}.log", replaceable=True)

    def start(self, token: str) -> None:
        """All engines side by side."""
        self._token = token
        calls = {p: p.handle.start.remote(token, self._device, paused=self._paused) for p in self.processes}
        self.addresses = wait_for(calls, what="the engines to start", limit_s=self._limit_s + 10, look=self.look)

    def end_server(self, process: Process) -> None:
        """Kills its server, if it still runs; waits for nothing."""
        process.handle.end_server.remote()

    def restart(self, number: int, *, new_actor: bool) -> None:
        """A new server for engine `number`, on a port of its own; with `new_actor` its actor is made anew, too.

        Raises `EngineError` where the server does not come up, `ProcessDied` where its actor does not.
        """
        if new_actor:
            ray.kill(self.processes[number].handle)
            self.processes[number] = self._make(number)
        process = self.processes[number]
        call = process.handle.start.remote(self._token, self._device, paused=self._paused)
        [self.addresses[number]] = wait_for(
            {process: call}, what=f"a new {process.name}", limit_s=self._limit_s + 10, look=self.look
        )

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
