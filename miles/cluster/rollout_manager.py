"""The rollout manager: one actor that owns data source, engine clients, rewards and the batch plan.

    generate(i): source -> engines -> rewards -> filter -> TrainBatch per data-parallel rank (object store)
                 and the source's state after it, kept until the checkpoint of rollout i is written
    write_samples(i): its samples and traces to the run directory, while the trainers train on it
    keep_ahead(i): for a checkpoint before rollout i is trained on, where a driver generates ahead

What a checkpoint says was consumed is what was trained: `state_after(i)` is the source as it was when rollout i was
complete, however far it was read since.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from miles.config import Config, args_view, import_plugins, job_of
from miles.data import (
    PromptData,
    ReferenceCache,
    RolloutDataSource,
    build_batches,
    load_rollout_samples,
    load_tokenizer,
    reference_cache,
    save_rollout_samples,
)
from miles.engines.client import EngineClient, Timeouts
from miles.engines.pool import EnginePool
from miles.errors import CheckpointError
from miles.observe import RunDir, open_process_log
from miles.observe.report.trace import MAX_TOKENS, TokenTexts, TracedSample, TraceFiles, choose_samples
from miles.rollout import DatasetRollout, LogHooks, Rollout, channels_of, load_eval_rows, training_channels
from miles.rollout.teacher import KEY_VARIABLE
from miles.types import RolloutOutput, Sample, SampleGroup, TrainBatch, WeightVersion

from .actors import Beat, actor, all_stacks, control, settle, sign_of_life
from .engine_group import EngineAddress
from .placement import Placement
from .waits import Look, Process, wait_for

#: Every so many rollouts all rows are scored by the trainer, also those whose gradient is zero, so that the metrics'
#: population is the whole batch.
SCORE_ALL_INTERVAL = 10

#: Groups that are scored by the reference in one call.
UNSCORED_GROUPS = 256

#: File of a checkpoint: the samples of the rollout that comes next, where they were made before the checkpoint was.
AHEAD = "rollout_ahead.jsonl"

#: States of the source that are kept for a checkpoint yet to come; a driver runs at most a step or two ahead.
STATES_KEPT = 4


@dataclass(frozen=True)
class Generated:
    """One training rollout, ready for the trainers."""

    shards: tuple[ray.ObjectRef, ...]
    """One `TrainBatch` per data-parallel rank."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class _Unwritten:
    """A rollout whose files are not written yet."""

    output: RolloutOutput
    advantages: list[float | None]
    traced: list[tuple[int, Sample]]


class RolloutManagerActor:
    """See the module's docstring. Async: rewards, requests and filters interleave in one event loop."""

    def __init__(self, config: Config, prompts: PromptData | None, run_dir: RunDir, teacher_key: str | None = None):
        open_process_log(run_dir.logs, "rollout-manager")
        self.config, self.run_dir, self._teacher_key = config, run_dir, teacher_key
        import_plugins(config)
        self._log_hooks = LogHooks(config)
        self._progress = (0, 0, 0)
        self._states: dict[int, dict[str, Any]] = {}
        self._unwritten: dict[int, _Unwritten] = {}
        self._ahead: dict[int, RolloutOutput] = {}
        """Rollouts that a checkpoint brought along."""
        self._rollout: Rollout | None = None
        self._dataset: DatasetRollout | None = None
        self._eval_shards: dict[str, tuple[ray.ObjectRef, ...]] = {}
        self._channels: tuple[str, ...] = ()
        self._eval_channels: tuple[str, ...] = ()
        self._pool: EnginePool | None = None
        self._engines: Sequence[EngineAddress] = ()
        self._loop: asyncio.AbstractEventLoop | None = None
        assert config.ckpt.hf_checkpoint is not None
        self.tokenizer = load_tokenizer(config.ckpt.hf_checkpoint)
        self._texts, self._traces = TokenTexts(self.tokenizer), TraceFiles.of(run_dir.path)
        assert config.rollout.n_samples_per_prompt is not None
        self.source = (
            RolloutDataSource(
                prompts,
                n_samples_per_prompt=config.rollout.n_samples_per_prompt,
                shuffle=config.rollout.rollout_shuffle,
                seed=config.rollout.rollout_seed,
            )
            if prompts is not None
            else None
        )
        self._prompts = prompts
        self._cache: ReferenceCache | None = None
        self._unscored: list[list[TrainBatch]] = []
        if prompts is not None and job_of(config).rows != "prompts":
            self._channels, self._eval_channels = training_channels(config, prompts), channels_of(prompts)

    async def start(
        self, engines: Sequence[EngineAddress], dp_size: int, state: dict[str, Any], checkpoint: Path | None = None
    ) -> None:
        """Connects to the engines and, when the run continues a `checkpoint`, takes up its `state`."""
        if (ahead := state.get("ahead")) is not None:
            assert checkpoint is not None
            self._ahead[ahead["rollout_id"]] = RolloutOutput(
                load_rollout_samples(checkpoint / AHEAD), dict(ahead["metrics"])
            )
        await self._start(engines, dp_size, state)
        settle()

    async def _start(self, engines: Sequence[EngineAddress], dp_size: int, state: dict[str, Any]) -> None:
        self.dp_size, self._loop = dp_size, asyncio.get_running_loop()
        if self.source is not None:
            if state:
                self.source.load_state_dict(state["source"])
            job = job_of(self.config)
            if job.rows != "prompts":
                self._cache = reference_cache(self.config, self.run_dir.path)
            if not job.generates and self.config.gkd.teacher_urls is None:
                assert self.config.rollout.rollout_batch_size is not None
                self._dataset = DatasetRollout(self.source, num_groups=self.config.rollout.rollout_batch_size)
                return
            cluster = self.config.cluster
            if job.engines:
                self._pool = EnginePool(
                    # One that was lost meanwhile has another address already: Ray promises no order of calls here.
                    [self._client(e) for e in self._engines or engines],
                    self.config.sglang.sglang_server_concurrency,
                    # The driver notices that an engine is dead, and gives another in its place or ends the run.
                    recovery_limit_s=cluster.heartbeat_timeout + 2 * cluster.start_timeout,
                )
            self._rollout = Rollout(
                self.config,
                source=self.source,
                pool=self._pool,
                tokenizer=self.tokenizer,
                args=args_view(self.config),
                teacher_key=self._teacher_key,
            )
            self._rollout.on_progress = self._note_progress
            await self._rollout.start()

    def _client(self, engine: EngineAddress) -> EngineClient:
        timeouts = Timeouts(generate_s=self.config.sglang.sglang_request_timeout)
        return EngineClient(engine.name, engine.url, engine.token, timeouts=timeouts)

    async def use_engines(self, engines: Sequence[EngineAddress], version: WeightVersion | None) -> dict[str, int]:
        """All engines hold `version` now, and are where `engines` says.

        Returns by name how many samples are sent again, of engines that have been replaced.
        """
        self._engines = engines
        self._hold(version)
        if self._pool is None:
            return {}
        return {engine.name: await self._pool.replace(self._client(engine)) for engine in engines}

    def _hold(self, version: WeightVersion | None) -> None:
        if self._pool is not None:
            self._pool.version = version

    async def take_out_engine(self, name: str, why: str) -> None:
        """It is dead: nothing is asked of it until `use_engines` says where another one is."""
        if self._pool is not None:
            self._pool.take_out(name, why)

    def _note_progress(self, done: int, total: int, tokens: int) -> None:
        self._progress = (done, total, tokens)

    async def generate(self, rollout_id: int, version: WeightVersion | None) -> tuple[Any, ...]:
        """A `TrainBatch` for each data-parallel rank, and the rollout's metrics. The engines hold `version`.

        `write_samples` has to follow.
        """
        self._hold(version)
        started = time.perf_counter()
        output = await self._make(rollout_id)
        generated = time.perf_counter()
        built = build_batches(
            output.groups,
            config=self.config,
            rollout_id=rollout_id,
            dp_size=self.dp_size,
            score_all=rollout_id % SCORE_ALL_INTERVAL == SCORE_ALL_INTERVAL - 1,
            channels=self._channels,
        )
        if self.source is not None:
            ahead = {"rollout_id": rollout_id, "metrics": output.metrics}
            self._states[rollout_id] = {"source": self.source.state_dict(), "ahead": ahead}
            self._states.pop(rollout_id - STATES_KEPT, None)
        traced = choose_samples(output.groups, built.advantages, self.config.tracking.report_samples)
        for batch in built.batches:
            batch.metadata["traced"] = [position for position, _ in traced]
        self._unwritten[rollout_id] = _Unwritten(output, built.advantages, traced)
        tokens = sum(s.response_length for group in output.groups for s in group)
        metrics = {
            **output.metrics,
            **built.metrics,
            **_weight_lag(rollout_id, output.groups),
            "perf/generate_time": generated - started,
            "perf/rollout_tokens_per_s": tokens / max(generated - started, 1e-9),
            "perf/batch_time": time.perf_counter() - generated,
        }
        if self._log_hooks.has_rollout:
            await self.write_samples(rollout_id)  # as they are, whatever the hook does to them
            samples = [sample for group in output.groups for sample in group]
            metrics = await self._log_hooks.rollout(rollout_id, samples, metrics, generated - started)
        return *self._with_reference(built.batches), metrics

    async def _make(self, rollout_id: int) -> RolloutOutput:
        if template := self.config.debug.load_debug_rollout_data:
            return RolloutOutput(groups=load_rollout_samples(template.format(rollout_id=rollout_id)))
        if (brought := self._ahead.pop(rollout_id, None)) is not None:
            return brought
        makes = self._dataset or self._rollout
        assert makes is not None, "start() first"
        return await makes.generate(rollout_id)

    async def unscored_shards(self) -> list[tuple[ray.ObjectRef, ...]]:
        """Rows of all data sets whose reference log-probs are not there yet, `UNSCORED_GROUPS` at a time, as in `train`."""
        assert self._cache is not None, "--precompute-ref-log-probs"
        assert self._prompts is not None
        own = RolloutDataSource(self._prompts, n_samples_per_prompt=1, shuffle=False, seed=0)
        self._unscored = []
        # Samples are numbered within each data set, so no batch is made of two.
        for groups in (
            own.get_samples(len(self._prompts.prompts)),
            *(groups for _, groups in load_eval_rows(self.config, self.tokenizer, self._eval_channels)),
        ):
            for start in range(0, len(groups), UNSCORED_GROUPS):
                batches = self._build(groups[start : start + UNSCORED_GROUPS])
                if any(map(self._cache.is_missing, batches)):
                    self._unscored.append(batches)
        return [tuple(map(ray.put, batches)) for batches in self._unscored]

    async def keep_reference(self, number: int, log_probs: Sequence[np.ndarray]) -> None:
        """Those of `unscored_shards()[number]`, rank by rank."""
        assert self._cache is not None
        self._cache.keep(self._unscored[number], log_probs)

    async def have_reference(self) -> None:
        """All rows are scored."""
        self._unscored = []

    def _build(self, groups: list[SampleGroup]) -> list[TrainBatch]:
        """Finished groups as one optimizer step, one batch for each data-parallel rank."""
        own = self._eval_channels
        return build_batches(
            groups, config=self.config, rollout_id=0, dp_size=self.dp_size, as_one_step=True, channels=own
        ).batches

    def _with_reference(self, batches: Sequence[TrainBatch]) -> list[TrainBatch]:
        return list(batches) if self._cache is None else list(map(self._cache.attach, batches))

    async def _evaluation_batches(self) -> dict[str, tuple[ray.ObjectRef, ...]]:
        """Rows of each evaluation data set, one shard for each data-parallel rank: they are the same at every step."""
        found = {}
        for dataset, groups in load_eval_rows(self.config, self.tokenizer, self._eval_channels):
            if self._rollout is not None:
                await self._rollout.ask_teacher(groups)
            found[dataset.name] = tuple(map(ray.put, self._with_reference(self._build(groups))))
        return found

    async def evaluation_shards(self) -> dict[str, tuple[ray.ObjectRef, ...]]:
        """Data set -> one `TrainBatch` for each data-parallel rank, where evaluations are made by the trainers."""
        self._eval_shards = self._eval_shards or await self._evaluation_batches()
        return self._eval_shards

    async def write_samples(self, rollout_id: int) -> None:
        """The samples of the rollout, and of a few what the report shows token by token. Nothing where it was done."""
        if (kept := self._unwritten.pop(rollout_id, None)) is None:
            return
        groups = kept.output.groups
        save_rollout_samples(self._samples_file(rollout_id), groups)
        if template := self.config.debug.save_debug_rollout_data:
            save_rollout_samples(Path(template.format(rollout_id=rollout_id)), groups)
        if kept.traced:
            samples = [
                TracedSample(
                    position,
                    kept.advantages[position],
                    self._texts.pieces(sample.tokens[sample.prompt_length :][:MAX_TOKENS]),
                )
                for position, sample in kept.traced
            ]
            self._traces.write_rollout(rollout_id, samples)

    async def evaluate(self, rollout_id: int, version: WeightVersion | None) -> dict[str, float]:
        """Scores every evaluation set with the weights that the engines hold now, which are `version`."""
        assert self._rollout is not None
        self._hold(version)
        started = time.perf_counter()
        output = await self._rollout.evaluate(rollout_id)
        for name, samples in output.samples_by_dataset.items():
            save_rollout_samples(self.run_dir.samples / f"eval_{name}_{rollout_id:06d}.jsonl", [samples])
        metrics = {**output.metrics, "perf/eval_time": time.perf_counter() - started}
        return await self._log_hooks.evaluation(rollout_id, output.samples_by_dataset, metrics)

    async def state_after(self, rollout_id: int, *, ahead: bool = False) -> dict[str, Any]:
        """The state to save with the checkpoint made of rollouts 0..rollout_id.

        ahead: that one is not trained on yet; `keep_ahead` has to put it into the checkpoint, too.
        """
        if self.source is None:
            return {}
        if rollout_id not in self._states:
            raise CheckpointError(
                f"state after rollout {rollout_id}, got states of {sorted(self._states)}: it was not generated here"
            )
        state = self._states[rollout_id]
        return state if ahead else {"source": state["source"]}

    async def keep_ahead(self, rollout_id: int, directory: Path) -> None:
        """Puts the samples of a rollout into a checkpoint that is being made: as generated, whatever a hook did to them since."""
        await self.write_samples(rollout_id)
        shutil.copyfile(self._samples_file(rollout_id), directory / AHEAD)

    def _samples_file(self, rollout_id: int) -> Path:
        return self.run_dir.samples / f"rollout_{rollout_id:06d}.jsonl"

    async def close(self) -> None:
        if self._rollout is not None:
            await self._rollout.close()

    @control
    async def progress(self) -> tuple[int, int, int]:
        """Groups done, groups wanted, tokens generated in the phase that runs."""
        return self._progress

    @control
    async def beat(self) -> Beat:
        return sign_of_life()

    @control
    async def stacks(self) -> str:
        # Control methods have a loop of their own: the work's tasks are in the one that `start` ran in.
        tasks = "\n".join(map(str, asyncio.all_tasks(self._loop))) if self._loop is not None else ""
        return f"{all_stacks()}\n{tasks}"


def _weight_lag(rollout_id: int, groups: Sequence[SampleGroup]) -> dict[str, float]:
    """Versions between the oldest weights of each sample and those that are trained on it."""
    lags = [
        rollout_id - int(sample.weight_versions[0])
        for group in groups
        for sample in group
        if sample.weight_versions and sample.weight_versions[0].isdecimal()
    ]
    if not lags:
        return {}
    return {"rollout/weight_lag/mean": sum(lags) / len(lags), "rollout/weight_lag/max": float(max(lags))}


class RolloutManager:
    """The driver's view of the rollout manager."""

    def __init__(self, config: Config, prompts: PromptData | None, run_dir: RunDir, placement: Placement):
        self._limit_s = config.cluster.wait_timeout
        self._start_s = config.cluster.start_timeout
        env = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        handle = (
            actor(RolloutManagerActor)
            .options(**placement.helper_options(), runtime_env={"env_vars": env})
            .remote(config, prompts, run_dir, os.environ.get(KEY_VARIABLE))
        )
        self.process = Process("rollout-manager", handle, run_dir.logs / "rollout-manager.log")
        self.on_progress = lambda done, total, tokens: None
        self.look: Look | None = None
        self._dp_size = 1
        self._engines: list[EngineAddress] = []
        self._version: WeightVersion | None = None
        self._begun: dict[int, list[ray.ObjectRef]] = {}
        self._writing: dict[int, ray.ObjectRef] = {}

    def _wait(self, ref: ray.ObjectRef, what: str, *, limit_s: float | None = None, watch: bool = False) -> Any:
        progress = self._poll_progress if watch else None
        return wait_for(
            {self.process: ref}, what=what, limit_s=limit_s or self._limit_s, progress=progress, look=self.look
        )[0]

    def _poll_progress(self) -> object:
        try:
            done, total, tokens = ray.get(self.process.handle.progress.remote(), timeout=1.0)
        except ray.exceptions.RayError:
            return None  # busy, or gone: then the call itself that is waited for says so
        self.on_progress(done, total, tokens)
        return done, total, tokens

    def start(
        self, engines: Sequence[EngineAddress], dp_size: int, state: dict[str, Any], checkpoint: Path | None = None
    ) -> None:
        self._engines, self._dp_size = list(engines), dp_size
        self._wait(
            self.process.handle.start.remote(list(engines), dp_size, state, checkpoint),
            "the rollout manager to start",
            limit_s=self._start_s,
        )

    def use_engines(self, engines: Sequence[EngineAddress], version: WeightVersion | None) -> dict[str, int]:
        """All engines hold `version` now, and are where `engines` says.

        Returns by name how many samples are sent again, of engines that have been replaced. Where none has, the version is told
        with the next call that needs it.
        """
        self._version = version
        if self._engines == list(engines):
            return {}
        self._engines = list(engines)
        return self._wait(
            self.process.handle.use_engines.remote(self._engines, version), "the rollout manager to meet the engines"
        )

    def take_out_engine(self, name: str, why: str) -> None:
        """Waits for nothing: the manager finds out by itself as well, only later."""
        # The one in its place may have the same address, and is to be told of all the same.
        self._engines = []
        self.process.handle.take_out_engine.remote(name, why)

    def begin(self, rollout_id: int) -> None:
        """The rollout is generated by the weights that the engines have now; `generate` takes it. A second call does nothing."""
        if rollout_id not in self._begun:
            call = self.process.handle.generate.options(num_returns=self._dp_size + 1)
            # Results of the call, not objects that it puts: the driver owns them, and small ones travel inside the messages.
            self._begun[rollout_id] = call.remote(rollout_id, self._version)

    def wait_for_rollout(self, rollout_id: int) -> dict[str, float]:
        """Returns the metrics of a rollout that was begun, once it is there."""
        metrics: dict[str, float] = self._wait(self._begun[rollout_id][-1], f"rollout {rollout_id}", watch=True)
        if rollout_id not in self._writing:
            self._writing[rollout_id] = self.process.handle.write_samples.remote(rollout_id)
        return metrics

    def generate(self, rollout_id: int) -> Generated:
        """The rollout. Its files are written meanwhile: `wait_for_samples` before it counts as done."""
        self.begin(rollout_id)
        metrics = self.wait_for_rollout(rollout_id)
        *shards, _ = self._begun.pop(rollout_id)
        return Generated(tuple(shards), metrics)

    def wait_for_samples(self) -> None:
        """Returns once the samples of all rollouts so far are on disk."""
        while self._writing:
            rollout_id = next(iter(self._writing))
            self._wait(self._writing[rollout_id], f"the samples of rollout {rollout_id} to be written")
            del self._writing[rollout_id]

    def evaluate(self, rollout_id: int) -> dict[str, float]:
        call = self.process.handle.evaluate.remote(rollout_id, self._version)
        return self._wait(call, f"evaluation {rollout_id}", watch=True)

    def unscored_shards(self) -> list[tuple[ray.ObjectRef, ...]]:
        return self._wait(self.process.handle.unscored_shards.remote(), "the rows to score with the reference")

    def keep_reference(self, number: int, log_probs: Sequence[np.ndarray]) -> None:
        self._wait(self.process.handle.keep_reference.remote(number, log_probs), "reference log-probs to be kept")

    def have_reference(self) -> None:
        self._wait(self.process.handle.have_reference.remote(), "the evaluations to be made ready")

    def evaluation_shards(self) -> dict[str, tuple[ray.ObjectRef, ...]]:
        return self._wait(self.process.handle.evaluation_shards.remote(), "the rows of the evaluations")

    def state_after(self, rollout_id: int, *, ahead: bool = False) -> dict[str, Any]:
        call = self.process.handle.state_after.remote(rollout_id, ahead=ahead)
        return self._wait(call, f"the data state after rollout {rollout_id}")

    def keep_ahead(self, rollout_id: int, directory: Path) -> None:
        call = self.process.handle.keep_ahead.remote(rollout_id, directory)
        self._wait(call, f"rollout {rollout_id} to be put into a checkpoint")

    def close(self) -> None:
        ray.wait([self.process.handle.close.remote()], timeout=10)
