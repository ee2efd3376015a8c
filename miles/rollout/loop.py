"""One training rollout: groups in flight until --rollout-batch-size of them are kept.

    DataSource --fetch--> [job] [job] [job] --settled--> filter --keep--> RolloutOutput
        ^                                                   '--drop--> counted by reason
        '--------- surplus groups, from their prompts -------------'

Consumes groups from the source, --over-sampling-batch-size at a time; produces exactly --rollout-batch-size kept ones,
in the order of submission. What is in flight when the batch is full, finished or not, goes back to the source as it
came, so that no prompt is lost and the source's state says exactly what was used. A rollout that fails gives back
everything.

Groups are accepted as they finish. Under --deterministic-mode they are accepted in the order of submission, and new ones
are fetched at moments that depend on that order alone, so that timing cannot change which groups are trained on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from miles.config import Config, job_of
from miles.errors import WaitTimeout
from miles.interfaces import DataSource
from miles.types import RolloutOutput, SampleGroup

from .context import Runtime
from .failures import FailureLedger
from .filters import GroupFilter
from .groups import GroupJob, GroupRunner
from .reward_setup import training_rewards
from .sampling import Sampling
from .trajectory import clone

logger = logging.getLogger(__name__)

#: Seconds that cancelled groups get to end; hooks that catch their cancellation are left behind after it.
CANCEL_LIMIT_S = 10.0

Progress = Callable[[int, int, int], None]
"""`on_progress(done_groups, total_groups, tokens)`"""


@dataclass(eq=False)
class _Slot:
    """One submitted group."""

    job: GroupJob
    task: asyncio.Task[SampleGroup]


class GroupRollout:
    """The default `RolloutFn`.

    Args:
        stall_limit_s: longest time without any group finishing.
    """

    def __init__(
        self,
        runtime: Runtime,
        source: DataSource,
        runner: GroupRunner,
        group_filter: GroupFilter,
        *,
        stall_limit_s: float,
        on_progress: Progress,
    ):
        self._runtime = runtime
        self._source = source
        self._runner = runner
        self._filter = group_filter
        self._stall_limit_s = stall_limit_s
        self._on_progress = on_progress
        flags = runtime.config.rollout
        assert flags.rollout_batch_size is not None
        assert flags.n_samples_per_prompt is not None
        self._target = flags.rollout_batch_size
        self._fetch_groups = flags.over_sampling_batch_size or flags.rollout_batch_size
        self._num_samples = self._target * flags.n_samples_per_prompt
        self._in_order = runtime.config.cluster.deterministic_mode
        self._sampling = Sampling.for_training(runtime.config)
        self._rewards = training_rewards(runtime.config) if job_of(runtime.config).rewards else None
        self._with_greedy = runtime.config.grpo.advantage_estimator == "remax"

    async def __call__(self, rollout_id: int) -> RolloutOutput:
        """Makes rollout `rollout_id`.

        Raises:
            TooManyFailures: by the failure policy.
            HookError: the filter raised, or keeps dropping.
            WaitTimeout: no group finished for the stall limit.
        """
        flags = self._runtime.config.rollout
        ledger = FailureLedger(f"rollout {rollout_id}", self._num_samples, flags.max_failed_sample_fraction)
        self._filter.begin()
        submitted: list[_Slot] = []
        waiting: list[_Slot] = []
        kept: list[_Slot] = []
        tokens = 0
        try:
            while len(kept) < self._target:
                while len(kept) + len(waiting) < self._target:
                    fresh = self._submit(rollout_id, ledger)
                    submitted += fresh
                    waiting += fresh
                for slot in await self._finished(waiting, rollout_id):
                    if len(kept) == self._target:
                        break
                    waiting.remove(slot)
                    group = slot.task.result()
                    tokens += sum(row.response_length for row in group)
                    if await self._filter.keep(group):
                        kept.append(slot)
                    else:
                        self._filter.check_progress(self._target)
                    self._on_progress(len(kept), self._target, tokens)
        except BaseException:
            await self._stop(waiting)
            for slot in waiting:  # one failure is raised; asyncio would report the others as forgotten
                if slot.task.done() and not slot.task.cancelled():
                    slot.task.exception()
            self._give_back(submitted)
            raise
        await self._stop(waiting)
        self._give_back(waiting)
        order = {slot: number for number, slot in enumerate(submitted)}
        kept.sort(key=order.__getitem__)
        metrics = {
            **ledger.metrics(),
            **self._filter.metrics(),
            "rollout/surplus_groups": float(len(waiting)),
            "rollout/generated_tokens": float(tokens),
            "perf/reward_latency": sum(slot.job.scoring_s for slot in kept) / len(kept),
        }
        if self._runtime.teacher is not None:
            metrics["perf/teacher_latency"] = sum(slot.job.teacher_s for slot in kept) / len(kept)
        return RolloutOutput([slot.task.result() for slot in kept], metrics)

    def _submit(self, rollout_id: int, ledger: FailureLedger) -> list[_Slot]:
        slots = []
        for group in self._source.get_samples(self._fetch_groups):
            job = GroupJob(group, rollout_id, self._sampling, self._rewards, with_greedy=self._with_greedy)
            task = asyncio.create_task(self._runner.run(job, ledger), name=f"group-{job.group_index}")
            slots.append(_Slot(job, task))
        return slots

    async def _finished(self, waiting: list[_Slot], rollout_id: int) -> list[_Slot]:
        """Those that may be accepted now, in order of submission; waits until there is one."""
        while True:
            for slot in waiting:  # a failure ends the rollout at once, wherever it is in the order
                if slot.task.done() and slot.task.exception() is not None:
                    slot.task.result()
            if self._in_order:
                if waiting[0].task.done():
                    return waiting[:1]
            elif done := [slot for slot in waiting if slot.task.done()]:
                return done
            tasks = {slot.task for slot in waiting if not slot.task.done()}
            finished, _ = await asyncio.wait(tasks, timeout=self._stall_limit_s, return_when=asyncio.FIRST_COMPLETED)
            if not finished:
                jobs = "; ".join(str(slot.job) for slot in waiting[:8])
                raise WaitTimeout(
                    f"rollout {rollout_id}, got no group for {self._stall_limit_s:.0f} s with {len(waiting)} in flight "
                    f"({jobs}): the engines or a hook hang; look at the engines' logs"
                )

    async def _stop(self, slots: list[_Slot]) -> None:
        """Ends the work of these groups, here and on the engines."""
        running = [slot.task for slot in slots if not slot.task.done()]
        if not running:
            return
        for task in running:
            task.cancel()
        _, left = await asyncio.wait(running, timeout=CANCEL_LIMIT_S)
        if left:
            logger.warning("%d groups did not end within %.0f s of being cancelled", len(left), CANCEL_LIMIT_S)
        if self._runtime.pool is None:
            return
        try:
            await self._runtime.pool.abort_all()
        except Exception:
            # What goes on running costs time, nothing else; an engine that is down shows at the next request.
            logger.warning("surplus requests could not be ended on the engines", exc_info=True)

    def _give_back(self, slots: list[_Slot]) -> None:
        if slots:
            self._source.add_samples([[clone(sample) for sample in slot.job.pristine] for slot in slots])


def stall_limit_s(config: Config) -> float:
    """A bound that only a hang exceeds: three attempts of one group, each with all the time its parts may take."""
    flags = config.rollout
    request_s = config.sglang.sglang_request_timeout
    # A request may wait for room and be sent to three engines; a hook has one limit for everything.
    generate_s = flags.custom_generate_timeout if flags.custom_generate_function_path else 5 * request_s
    # A row may be answered and scored by the teacher, each a request that may wait for room and for an engine.
    teacher_s = 8 * config.gkd.teacher_timeout if config.gkd.teacher_urls is not None else 0.0
    return 3 * (generate_s + flags.rm_timeout * (1 + flags.rm_max_retries) + teacher_s)
