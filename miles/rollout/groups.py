"""One prompt group, from its prompt to its rewards, through whatever fails on the way.

    pristine samples --copy--> generate --rows of each trajectory--> score --> settled rows
           ^                                     |
           '--- again from the prompt: aborted, or every sample failed ---'

Consumes PENDING samples, which it leaves as they are; produces scored copies. Samples that are COMPLETED already are not generated. Waits for the engines and for rewards,
each under a limit of its own.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from miles.errors import EngineError, WaitTimeout
from miles.types import ANSWERED_BY, GREEDY_REWARD, Author, Sample, SampleGroup, Status

from .context import GenerationContext, Runtime, installed
from .failures import FailureLedger, explain
from .generate import generate_group
from .rewards.scorer import RewardSource, Scorer, fail
from .sampling import Sampling
from .seeds import sample_seed
from .teacher import TeacherEngines
from .trajectory import check_rows, clone


@dataclass(eq=False)
class GroupJob:
    """What is to be done for one group, and how far it is."""

    pristine: SampleGroup
    rollout_id: int
    sampling: Sampling
    rewards: RewardSource | None
    """None: nothing is scored."""
    evaluation: str | None = None
    with_greedy: bool = False
    """Also make one greedy answer, whose reward goes into every sample's metadata (ReMax)."""
    phase: str = "waiting"
    since: float = field(default_factory=time.monotonic)
    scoring_s: float = 0.0
    """Seconds from the last generated token to the last reward."""
    teacher_s: float = 0.0
    """Seconds from there until the teacher has scored the answers."""

    @property
    def group_index(self) -> int:
        index = self.pristine[0].group_index
        assert index is not None
        return index

    @property
    def by_teacher(self) -> bool:
        """The teacher's engines answer it."""
        return self.pristine[0].metadata.get(ANSWERED_BY) == Author.TEACHER

    def enter(self, phase: str) -> None:
        self.phase, self.since = phase, time.monotonic()

    def __str__(self) -> str:
        return f"group {self.group_index} {self.phase} for {time.monotonic() - self.since:.0f} s"


class GroupRunner:
    """Runs groups with one generation function and one scorer.

    Args:
        hook: --custom-generate-function-path, called for each sample; None sends one request for the whole group.
        hook_limit_s: seconds for one call of it.
    """

    def __init__(
        self,
        runtime: Runtime,
        scorer: Scorer,
        *,
        hook: Callable[..., Any] | None = None,
        hook_name: str = "",
        hook_limit_s: float = 1800.0,
    ):
        self._runtime = runtime
        self._scorer = scorer
        self._hook = hook
        self._hook_name = hook_name
        self._hook_limit_s = hook_limit_s
        parameters = inspect.signature(hook).parameters.values() if hook is not None else ()
        self._tells_evaluation = any(p.name == "evaluation" or p.kind is p.VAR_KEYWORD for p in parameters)

    async def run(self, job: GroupJob, ledger: FailureLedger) -> SampleGroup:
        """The group's rows, scored; FAILED samples among them, but not all.

        Raises:
            TooManyFailures: by the failure policy, see `failures`.
        """
        failures = aborts = 0
        while True:
            rows, tracebacks = await self._attempt(job, failures + aborts)
            if any(row.status is Status.ABORTED for row in rows):
                aborts += 1
                ledger.abort(job.group_index, aborts)
                continue
            failed = {row.index for row in rows if row.status is Status.FAILED}
            ledger.note(len(failed), tracebacks, next((row.error for row in rows if row.error), ""))
            if len(failed) == len(job.pristine):
                failures += 1
                ledger.retry(job.group_index, failures)
                continue
            return rows

    async def _attempt(self, job: GroupJob, attempt: int) -> tuple[SampleGroup, list[str]]:
        """One go at the whole group: its rows and the tracebacks of what failed."""
        samples = [clone(sample) for sample in job.pristine]
        samplings = [job.sampling] * len(samples)
        if job.with_greedy:
            samples.append(_greedy_sample(job.pristine[0]))
            samplings.append(replace(job.sampling, temperature=0.0))
        contexts = [
            GenerationContext(
                self._runtime,
                sampling,
                job.rollout_id,
                job.group_index,
                position,
                attempt,
                job.evaluation,
                by_teacher=job.by_teacher,
            )
            for position, sampling in enumerate(samplings)
        ]
        job.enter("generating")
        tracebacks: list[str] = []
        if all(sample.status is Status.COMPLETED for sample in samples):  # rows with answers
            trajectories = [[sample] for sample in samples]
        elif self._hook is None:
            trajectories, tracebacks = await self._generate_group(contexts, samples)
        else:
            results = await asyncio.gather(
                *(asyncio.create_task(self._generate_one(c, s)) for c, s in zip(contexts, samples, strict=True))
            )
            trajectories = [rows for rows, _ in results]
            tracebacks = [text for _, text in results if text]
        if job.by_teacher:
            for row in (row for rows in trajectories for row in rows):
                # They are of a policy that is not trained.
                row.rollout_log_probs, row.weight_versions = None, []
        if not any(row.status is Status.ABORTED for rows in trajectories for row in rows):
            job.enter("scoring")
            tracebacks += await self._score(job, contexts, trajectories)
            job.scoring_s = time.monotonic() - job.since
            if self._runtime.teacher is not None and job.evaluation is None:
                job.enter("at the teacher")
                tracebacks += await self._ask_teacher(
                    self._runtime.teacher, [row for rows in trajectories for row in rows]
                )
                job.teacher_s = time.monotonic() - job.since
            job.enter("scored")
            if job.with_greedy:
                _hand_out(trajectories.pop(), trajectories)
        return [row for rows in trajectories for row in rows], tracebacks

    async def _generate_group(
        self, contexts: Sequence[GenerationContext], samples: SampleGroup
    ) -> tuple[list[SampleGroup], list[str]]:
        try:
            await generate_group(contexts, samples)
        except (EngineError, WaitTimeout) as error:
            for i, sample in enumerate(samples):
                samples[i] = _failed(sample, contexts[i], error)
            return [[sample] for sample in samples], [explain(error)]
        return [[sample] for sample in samples], []

    async def _generate_one(self, context: GenerationContext, sample: Sample) -> tuple[SampleGroup, str]:
        """The hook's rows, or the sample FAILED with the traceback: a hook may raise anything."""
        assert self._hook is not None
        original = clone(sample)
        keywords = {"evaluation": context.evaluation is not None} if self._tells_evaluation else {}
        params = context.sampling.params(context.seed())
        try:
            with installed(context):
                async with asyncio.timeout(self._hook_limit_s) as limit:
                    rows = await self._hook(self._runtime.args, sample, params, **keywords)
            return check_rows(rows, original, hook=self._hook_name), ""
        except Exception as error:
            if isinstance(error, TimeoutError) and limit.expired():
                error = TimeoutError(
                    f"{self._hook_name} took longer than --custom-generate-timeout {self._hook_limit_s:g} s"
                )
            return [_failed(original, context, error)], explain(error)

    @staticmethod
    async def _ask_teacher(teacher: TeacherEngines, rows: Sequence[Sample]) -> list[str]:
        """Sets what the teacher says of each row; a row of which that cannot be had FAILED. Returns the failures' texts."""

        async def ask(row: Sample) -> str:
            try:
                row.teacher = await teacher.score(row)
            except (EngineError, WaitTimeout) as error:
                fail(row, error)
                return explain(error)
            return ""

        found = await asyncio.gather(*(ask(row) for row in rows if row.status is not Status.FAILED))
        return [text for text in found if text]

    async def _score(
        self, job: GroupJob, contexts: Sequence[GenerationContext], trajectories: list[SampleGroup]
    ) -> list[str]:
        """A trajectory has one reward, that of its last row; its other rows share it."""
        if job.rewards is None:
            return []
        heads = [rows[-1] for rows in trajectories]
        seed = self._runtime.config.rollout.rollout_seed
        stream = "reward" if job.evaluation is None else f"reward/{job.evaluation}"
        seeds = [
            sample_seed(seed, job.rollout_id, job.group_index, c.position, attempt=c.attempt, stream=stream)
            for c in contexts
        ]
        tracebacks = await self._scorer.score(heads, seeds, job.rewards)
        for rows, head in zip(trajectories, heads, strict=True):
            for row in rows[:-1]:
                if row.reward is None:
                    row.reward = head.reward
                if head.status is Status.FAILED:
                    row.status, row.error = head.status, head.error
        return tracebacks


def _greedy_sample(sample: Sample) -> Sample:
    """One more sample of the prompt. Its index is no other's: those of samples are not negative."""
    greedy = clone(sample)
    assert sample.group_index is not None
    greedy.index, greedy.trajectory_id = -1 - sample.group_index, None
    return greedy


def _hand_out(greedy: SampleGroup, trajectories: list[SampleGroup]) -> None:
    """Writes the greedy answer's reward into the metadata of every row; without one, the rows FAILED as it did."""
    last = greedy[-1]
    for row in (row for rows in trajectories for row in rows):
        row.metadata[GREEDY_REWARD] = last.reward
        if last.status is Status.FAILED and row.status is not Status.FAILED:
            row.status, row.error = Status.FAILED, f"the greedy answer to its prompt failed: {last.error}"


def _failed(original: Sample, context: GenerationContext, error: BaseException) -> Sample:
    """The sample without a response: what a failed generation left behind belongs to no policy."""
    sample = clone(original)
    sample.loss_mask, sample.rollout_log_probs = [], []
    sample.temperature = context.sampling.temperature
    fail(sample, error)
    return sample
