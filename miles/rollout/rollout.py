"""The rollout room's front: what the cluster builds, starts and asks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from miles.config import Config, job_of, load_hook
from miles.interfaces import Args, DataSource
from miles.types import RolloutOutput, Sample, SampleGroup

from .answers import AnswerSource, author_metrics
from .context import Runtime, find_eos_token_ids
from .eval_prompts import load_eval_prompts
from .evaluate import EvalOutput, Evaluator, first_error
from .filters import GroupFilter
from .groups import GroupRunner
from .loop import GroupRollout, Progress, stall_limit_s
from .preflight import hook_flags
from .reward_setup import reward_pool
from .rewards import remote
from .rewards.scorer import Scorer
from .teacher import TeacherEngines
from .watchdog import LoopWatchdog

if TYPE_CHECKING:
    from miles.engines.pool import EnginePool


class Rollout:
    """Training rollouts and evaluations over one pool of engines. Lives in one event loop; one call at a time.

    rollout = Rollout(config, source=source, pool=pool, tokenizer=tokenizer, args=args)
    await rollout.start()
    output = await rollout.generate(0)
    await rollout.close()
    """

    def __init__(
        self,
        config: Config,
        *,
        source: DataSource,
        pool: EnginePool | None,
        tokenizer: Any,
        args: Args,
        teacher_key: str | None = None,
    ):
        """pool: None where the run has no engines. teacher_key: of the engines of --teacher-urls, if they ask for one."""
        self._config = config
        self._rows = job_of(config).rows
        if self._rows == "conversations":
            source = AnswerSource(source, config, tokenizer.decode)
        self._source = source
        eos = find_eos_token_ids(tokenizer, config.ckpt.hf_checkpoint)
        teacher = TeacherEngines(config, tokenizer, key=teacher_key) if config.gkd.teacher_urls is not None else None
        self._runtime = Runtime(config, args, pool, tokenizer, eos, teacher)
        self._stack = AsyncExitStack()
        self._loop: GroupRollout | None = None
        self._evaluator: Evaluator | None = None
        self.on_progress: Progress = lambda done, total, tokens: None
        """Called with groups done, groups wanted and tokens generated, whenever one of them changes."""

    async def start(self) -> None:
        """Loads hooks and evaluation prompts and starts the reward workers.

        Raises:
            HookError: a hook cannot be loaded, here or in a reward worker.
            DataError: an evaluation file is broken or empty.
            ConfigError: the teacher's engines are not there, or not what the student can learn from.
        """
        if (teacher := self._runtime.teacher) is not None:
            self._stack.push_async_callback(teacher.close)
            await teacher.check()
        config, flags = self._config, self._config.rollout
        hooks = {
            name: load_hook(path, flag=flag, parameters=parameters, is_async=is_async)
            for name, (path, flag, parameters, is_async) in hook_flags(config).items()
        }
        pool = await self._stack.enter_async_context(reward_pool(config, num_workers=flags.rm_num_workers))
        self._stack.push_async_callback(remote.close)
        self._stack.enter_context(LoopWatchdog())
        runner = GroupRunner(
            self._runtime,
            Scorer(self._runtime.args, pool),
            hook=hooks.get("generate"),
            hook_name=f"--custom-generate-function-path {flags.custom_generate_function_path}",
            hook_limit_s=flags.custom_generate_timeout,
        )
        self._loop = GroupRollout(
            self._runtime,
            self._source,
            runner,
            GroupFilter(hooks.get("filter"), flags.dynamic_sampling_filter_path or "", self._runtime.args),
            stall_limit_s=stall_limit_s(config),
            on_progress=lambda done, total, tokens: self.on_progress(done, total, tokens),
        )
        if self._rows == "prompts":
            self._evaluator = Evaluator(self._runtime, runner, load_eval_prompts(config, self._runtime.tokenizer))

    async def generate(self, rollout_id: int) -> RolloutOutput:
        """Training rollout `rollout_id`; see `loop.GroupRollout`."""
        assert self._loop is not None, "start() first"
        output = await self._loop(rollout_id)
        if self._rows == "conversations":
            output.metrics |= author_metrics(output.groups)
        return output

    async def ask_teacher(self, groups: Sequence[SampleGroup]) -> None:
        """Sets what the teacher on engines, where there is one, says of finished samples. Raises what its pool raises."""
        teacher = self._runtime.teacher
        if teacher is None:
            return

        async def ask(sample: Sample) -> None:
            sample.teacher = await teacher.score(sample)

        async with first_error(), asyncio.TaskGroup() as tasks:
            for sample in (sample for group in groups for sample in group):
                tasks.create_task(ask(sample))

    async def evaluate(self, rollout_id: int) -> EvalOutput:
        """Scores what is due with the weights that the engines hold; see `evaluate.Evaluator`."""
        assert self._evaluator is not None, "start() first, and rows with answers are evaluated by the trainers"
        return await self._evaluator(rollout_id, self.on_progress)

    async def close(self) -> None:
        """Ends reward workers and connections. Safe to call twice, and after a `start` that failed."""
        await self._stack.aclose()
