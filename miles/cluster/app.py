"""The application: builds every process from the configuration and offers `train.py` the verbs of the algorithm.

    driver (this process)
      ├─ TrainerGroup      one actor per rank: megatron-core, gloo or NCCL
      ├─ EngineGroup       one actor per engine, each with a server process that speaks SGLang's protocol
      └─ RolloutManager    one actor: data source, rewards, batch plan; talks HTTP to the engines

Which parts exist is decided here, once: the verbs of a part that a debug run leaves out (engines, or trainers) do
nothing, so the loops have no branches.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from miles.config import Config, EvalDataset, Resolution, eval_datasets, job_of, public_argv, public_dict
from miles.errors import MilesError
from miles.observe import Display, MetricsFile, RunDir, RunLock, StateFile, Timers, Tracker, Trackers
from miles.observe.bubble import bubble_metrics
from miles.observe.report import ReportProcess, TraceFiles
from miles.observe.trackers import enabled, tracker_environment

from .resume import Resume, run_before, tidy

if TYPE_CHECKING:
    from .preflight import Prepared
    from .trainer_group import TrainerGroup


class App:
    """A running system. Use as a context manager: everything it started is gone when the block ends.

    `step` is the weight version: the number of rollouts trained. Metrics of rollout i belong to step i + 1.
    """

    _ahead: int | None = None
    """The rollout that was begun ahead of the one in training."""
    _generated_meanwhile_s: float | None = None
    """Seconds that the engines worked on it, until they are accounted for."""

    def __init__(self, prepared: Prepared, resolution: Resolution, display: Display):
        self.config: Config = prepared.config
        self._prepared, self._resolution = prepared, resolution
        self.display = display
        self.timers = Timers()
        name = self.config.tracking.run_name or Path(self.config.ckpt.hf_checkpoint or "run").name
        given = self.config.cluster.run_dir
        self.run_dir = (RunDir(Path(given).resolve()) if given else RunDir.default(name)).create()
        self._stack = contextlib.ExitStack()
        self._report: ReportProcess | None = None
        self._traces = TraceFiles.of(self.run_dir.path)
        self._locks = self._lock()
        self._stack.callback(self._close_report)  # after everything else: it tells how the run ended
        earlier = [Path(lock.previous.run_dir) for lock in self._locks if lock.previous is not None]
        ours = [lock.directory for lock in self._locks if lock.fd is not None]
        self._before = run_before([self.run_dir.path, *earlier], locked=ours)
        self._trackers: Trackers | None = None
        self._stack.push(self._end_trackers)
        self._step_started = time.perf_counter()

    def _lock(self) -> list[RunLock]:
        """One run at a time writes to a run directory, and to a directory of checkpoints."""
        places = {"--run-dir": self.run_dir.path}
        if (save := self.config.ckpt.save) is not None and self._prepared.layout.actor_bundles:
            places["--save"] = Path(save).resolve()
        locks: list[RunLock] = []
        try:
            for flag, directory in places.items():
                locks.append(RunLock.take(directory, self.run_dir.path, flag=flag, note=self.display.note))
                self._stack.callback(locks[-1].release)
        except BaseException:
            self._stack.close()
            raise
        return locks

    # ------------------------------------------------------------------------------------------------ life

    def __enter__(self) -> App:
        try:
            self._start()
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, MilesError) and self._engines.processes:
                # Whoever talked to an engine that died knows only that it does not answer.
                for text in self._engines.epitaphs():
                    self.display.note(text)
        finally:
            self._stack.__exit__(kind, error, trace)

    def _note_end(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.state.end("finished")
        else:
            self.state.end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", error)

    def _end_trackers(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._trackers is not None:
            self._note_all(self._trackers.close("ok" if error is None else "failed"))

    def _note_all(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.display.note(line)

    def _start(self) -> None:
        from . import guardian
        from .actors import settle
        from .engine_group import EngineGroup
        from .placement import cluster_has_gpu, place
        from .ray_cluster import ray_cluster
        from .recovery import EngineRecovery
        from .rollout_manager import RolloutManager
        from .supervision import Supervisor
        from .trainer_group import TrainerGroup

        config, layout = self.config, self._prepared.layout
        resume = self._resume()
        self._write_config()
        if not config.tracking.no_report:
            self._report = ReportProcess(self.run_dir.path, note=self.display.note, environment=guardian.unmarked())
        self.display.phase(0, self.num_rollout, "starting ray")
        started = time.perf_counter()
        keep_open = [lock.fd for lock in self._locks if lock.fd is not None]
        self._stack.enter_context(ray_cluster(has_gpu=bool(self._resolution.has_gpu), keep_open=keep_open))
        placement = place(layout, use_gpu=cluster_has_gpu(driver_has_gpu=self._resolution.has_gpu))

        self.display.phase(0, self.num_rollout, "starting processes")
        # Creating the actors starts their processes; the calls below overlap with their imports.
        self.trainers = TrainerGroup(config, placement, self.run_dir.logs) if layout.actor_bundles else None
        self._engines = EngineGroup(config, placement, self.run_dir.logs)
        self._stack.callback(self._engines.stop)
        self.rollout_manager = RolloutManager(config, self._prepared.prompts, self.run_dir, placement)
        self._stack.callback(self.rollout_manager.close)
        self.rollout_manager.on_progress = self.display.progress

        self._supervisor = supervisor = Supervisor(config.cluster.heartbeat_timeout)
        for process in (*(self.trainers.processes if self.trainers else ()), self.rollout_manager.process):
            supervisor.watch(process)
        self._engines.look = supervisor.look
        self._engines.start(secrets.token_hex(32))
        self.recovery = EngineRecovery(
            supervisor,
            self._engines,
            self.rollout_manager,
            self.trainers,
            max_restarts=config.cluster.max_engine_restarts,
            note=self.display.note,
        )
        self._engines.look, self.rollout_manager.look = self.recovery.look, self.recovery.look_idle
        if self.trainers:
            self.trainers.look = self.recovery.look
            self.trainers.start(self._total_optimizer_steps(), self.run_dir.path, resume.checkpoint, resume.start)
        dp_size = self.trainers.data_size if self.trainers else 1
        self.rollout_manager.start(self._engines.addresses, dp_size, resume.data_state, resume.checkpoint)
        if config.preference.precompute_ref_log_probs and self.trainers:
            self._score_with_reference(self.trainers)
        self._evaluate = self._choose_evaluation()
        first_step = self.start + 1 if self.start else 0
        if config.debug.load_debug_rollout_data is None:  # a replay may read them
            self.run_dir.drop_samples(self.start)
        self.tracker = Tracker(MetricsFile(self.run_dir.metrics, first_step=first_step))
        self._stack.callback(self.tracker.close)
        self._trackers = Trackers(
            enabled(config.tracking),
            self.run_dir,
            first_step=first_step,
            close_timeout_s=config.tracking.tracker_close_timeout,
            environment={
                **guardian.unmarked(),
                **tracker_environment(config.tracking),
                **self._resolution.secrets,
            },
        )
        settle()
        self.tracker.add({"perf/start_time": time.perf_counter() - started})
        self._step_started = time.perf_counter()

    def _resume(self) -> Resume:
        """Decides where the run begins, and says so."""
        resume = self._prepared.resume(self._before)
        for line in (*resume.notes, *tidy(self.config, resume)):
            self.display.note(line)
        self.start = resume.start
        self.state = StateFile(self.run_dir.state, num_rollout=self.num_rollout, first_step=self.start)
        self._stack.push(self._note_end)
        return resume

    def _close_report(self) -> None:
        if self._report is not None:
            self._report.close()

    def _write_config(self) -> None:
        self.run_dir.write_config(
            {
                "config": public_dict(self.config),
                "sources": {flag: str(source) for flag, source in self._resolution.sources.items()},
                "not_in_effect": [str(item) for item in self._resolution.not_in_effect],
                "argv": public_argv(sys.argv[1:]),
            }
        )

    # ------------------------------------------------------------------------------------------------ plan

    @property
    def num_rollout(self) -> int:
        assert self.config.rollout.num_rollout is not None
        return self.config.rollout.num_rollout

    def _total_optimizer_steps(self) -> int:
        return self.num_rollout * (self.config.rollout.num_steps_per_rollout or 1)

    def rollouts(self) -> Iterator[int]:
        """The rollout ids that remain, oldest first."""
        stop = self.config.debug.debug_exit_after_rollout
        end = self.num_rollout if stop is None else min(self.num_rollout, self.start + stop)
        for rollout_id in range(self.start, end):
            self._step_started = time.perf_counter()
            yield rollout_id

    def _due(self, interval: int | None, step: int) -> bool:
        return interval is not None and (step % interval == 0 or step == self.num_rollout)

    @contextlib.contextmanager
    def _phase(self, name: str, step: int) -> Iterator[None]:
        self.display.phase(step, self.num_rollout, name)
        self.state.phase(name, step)
        with self.timers.phase(name):
            yield

    # ----------------------------------------------------------------------------------------------- verbs

    def generate(self, rollout_id: int) -> Any:
        """Groups of scored samples from the engines, as one shard per data-parallel rank."""
        with self._phase("rollout", rollout_id + 1):
            generated = self.rollout_manager.generate(rollout_id)
        self._ahead = None
        self.tracker.add(generated.metrics)
        return generated.shards

    def generate_ahead(self, rollout_id: int) -> None:
        """Begins a rollout, by the weights that the engines have now; waits for nothing. Nothing beyond the last rollout.

        `await_ahead` has to follow before the weights change, and `generate` takes it.
        """
        if rollout_id < self.num_rollout:
            self.rollout_manager.begin(rollout_id)
            self._ahead = rollout_id

    def await_ahead(self) -> None:
        """Returns once the rollout that was begun is there."""
        if self._ahead is None:
            return
        with self._phase("rollout_ahead", self._ahead + 1):
            metrics = self.rollout_manager.wait_for_rollout(self._ahead)
        self._generated_meanwhile_s = metrics["perf/generate_time"]

    def train(self, rollout_id: int, shards: Sequence[Any]) -> None:
        """All optimizer steps of the rollout; where there are engines, `publish_weights` has to follow."""
        if self.trainers is None:
            return
        step = rollout_id + 1
        with self._phase("train", step):
            engines = self._engines.addresses if self._ahead != step else ()  # they are at work
            trained = self.trainers.train(shards, then_publish=(engines, str(step)) if engines else None)
            self.recovery.trained(str(step))
            self.tracker.add(trained.metrics)
            self._traces.write_training(rollout_id, trained.log_probs)

    def publish_weights(self, step: int) -> None:
        """Engines serve version `step` once this returns."""
        if self.trainers is None or not self._engines.processes:
            return
        with self._phase("update_weights", step):
            stats = self.recovery.publish(str(step))
        self.tracker.add(stats.metrics())

    def evaluate_if_due(self, step: int) -> None:
        """Before the first rollout, every --eval-interval (or a data set's own), and after the last."""
        flags = self.config.eval
        due = [dataset for dataset in self._eval_datasets if self._due(dataset.interval, step)]
        if self._evaluate is None or not due:
            return
        if step == self.start and (flags.skip_eval_before_train or step > 0):
            return  # a continued run evaluated this step before it stopped
        with self._phase("evaluate", step):
            self.tracker.add(self._evaluate(step, due))

    def _score_with_reference(self, trainers: TrainerGroup) -> None:
        """Reference log-probs of all rows, of which those of an earlier run are there; then the reference is let go."""
        shards = self.rollout_manager.unscored_shards()
        for number, chunk in enumerate(shards):
            self.display.phase(0, self.num_rollout, f"scoring with the reference, {number + 1} of {len(shards)}")
            self.rollout_manager.keep_reference(number, trainers.reference_log_probs(chunk))
        trainers.drop_reference()
        self.rollout_manager.have_reference()

    @functools.cached_property
    def _eval_datasets(self) -> tuple[EvalDataset, ...]:
        """Read once: parsing --eval-config takes a millisecond."""
        return eval_datasets(self.config)

    def _choose_evaluation(self) -> Callable[[int, Sequence[EvalDataset]], dict[str, float]] | None:
        """By the engines, which answer prompts; by the trainers, where the answers are there; None in half a run."""
        manager, trainers = self.rollout_manager, self.trainers
        if job_of(self.config).rows == "prompts":
            return (lambda step, due: manager.evaluate(step)) if self._engines.processes else None
        if trainers is None or self._prepared.prompts is None or not self._eval_datasets:
            return None
        shards = manager.evaluation_shards()

        def evaluate(step: int, due: Sequence[EvalDataset]) -> dict[str, float]:
            started = time.perf_counter()
            found = {name: trainers.evaluate(name, shards[name]) for name in (dataset.name for dataset in due)}
            metrics = {f"eval/{name}/{key}": value for name, values in found.items() for key, value in values.items()}
            return {**metrics, "perf/eval_time": time.perf_counter() - started}

        return evaluate

    def finish_step(self, step: int) -> None:
        """Writes the step's line of metrics, after all other files of the step."""
        self.rollout_manager.wait_for_samples()
        times = {
            **self.recovery.take_metrics(),
            **self.timers.take(),
            "perf/step_time": time.perf_counter() - self._step_started,
        }
        if step == self.start > 0:
            return  # a continued run wrote this line before it stopped
        self.tracker.add(times)
        self.tracker.add({**self._bubble(), **self._supervisor.memory()})
        self.display.step(step, self.num_rollout, self.tracker.flush(step))
        if self._report is not None:
            self._report.check()
        if self._trackers is not None:
            self._note_all(self._trackers.complaints())

    def _bubble(self) -> dict[str, float]:
        layout, step = self._prepared.layout, dict(self.tracker.pending)
        if self._generated_meanwhile_s is not None and "perf/generate_time" in step:
            # What the engines did in this step, not what made the rollout that was trained on in it.
            step["perf/generate_time"], self._generated_meanwhile_s = self._generated_meanwhile_s, None
        engines, trainers = sum(map(len, layout.engine_bundles)), len(layout.actor_bundles)
        return bubble_metrics(step, engines=engines, trainers=trainers, shared=layout.colocate)

    def save_if_due(self, step: int) -> None:
        """Checkpoint of everything trained so far, every --save-interval and after the last rollout."""
        ckpt = self.config.ckpt
        last = step == self.num_rollout
        if self.trainers is None or not (self._due(ckpt.save_interval, step) or last):
            return
        if ckpt.save is not None:
            with self._phase("save", step):
                manager, ahead = self.rollout_manager, self._ahead == step
                state = {"rollout": manager.state_after(step if ahead else step - 1, ahead=ahead)}
                also = functools.partial(manager.keep_ahead, step) if ahead else None
                self.trainers.save(ckpt.save, step, state, also)
        if ckpt.save_hf is not None:
            with self._phase("save_hf", step):
                self.trainers.save_hf(ckpt.save_hf.format(rollout_id=step - 1))
        # The step's line must be there before the checkpoint that continues after it, so this is a line of its own.
        if times := self.timers.take():
            self.tracker.add(times)
            self.tracker.flush(step)

    # ------------------------------------------------------------------------------------------------- end

    def summary(self) -> None:
        """Before and after, and where to look."""
        first, last = self.tracker.first, self.tracker.last
        scores = sorted(key for key in last if key.startswith("eval/") and _is_headline(key))
        rows = [
            (key, f"{first[key]:.3f}", f"{last[key]:.3f}", f"{last[key] - first[key]:+.3f}")
            for key in ("rollout/raw_reward", *scores)
            if key in last
        ]
        if rows:
            self.display.table("before and after", ("metric", "before", "after", "gain"), rows)
        self.display.note(f"run directory: {self.run_dir.path}")
        if self._report is not None:
            self.display.note(f"report: {self.run_dir.path / 'report.html'}")


def _is_headline(key: str) -> bool:
    """Of an evaluation: its score, or what the trainers say of it."""
    return key.count("/") == 1 or key.rpartition("/")[2] in ("loss", "token_accuracy", "reward_accuracy")
