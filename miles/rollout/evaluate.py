"""Evaluation: held-out prompts, each sampled n times, by one weight version.

    EvalDataset --prompts x n--> engines --> rewards --> mean, confidence interval, pass@k; samples to be written

Reported per data set `<name>`, over samples that did not fail:
    eval/<name>                    mean over prompts of the prompt's mean score
    eval/<name>/ci_low, ci_high    95 % interval of that mean: normal, prompts as clusters (samples of one prompt are not
                                   independent), mean +- 1.96 * std(prompt means, ddof 1) / sqrt(prompts); from 2 prompts on
    eval/<name>/pass@k             chance that one of k samples passes (score >= 1), unbiased (arXiv 2107.03374), k = 1, 2,
                                   4, .. n and n; over prompts with at least k samples
    eval/<name>/response_len/mean  tokens
    eval/<name>/truncated_ratio, failed_ratio
    eval/<name>/weight_version     which weights made all of it
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from miles.config import EvalDataset
from miles.data.prompts import Prompt
from miles.errors import EngineError
from miles.types import Sample, SampleGroup, Status

from .context import Runtime
from .failures import FailureLedger
from .groups import GroupJob, GroupRunner
from .loop import Progress
from .reward_setup import evaluation_rewards
from .rewards.scorer import scalar
from .sampling import Sampling

#: A sample passes when its score is at least this; scores of 0/1, -1/1 and shares of full marks agree on it.
PASS_SCORE = 1.0
_Z_95 = 1.959964


@dataclass(frozen=True)
class EvalOutput:
    """One evaluation of all data sets that were due."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples_by_dataset: dict[str, list[Sample]] = field(default_factory=dict)


class Evaluator:
    """Evaluates data sets whose prompts are loaded; one evaluation at a time."""

    def __init__(
        self,
        runtime: Runtime,
        runner: GroupRunner,
        datasets: Sequence[tuple[EvalDataset, Sequence[Prompt]]],
    ):
        self._runtime = runtime
        self._runner = runner
        self._datasets = datasets

    async def __call__(self, rollout_id: int, on_progress: Progress) -> EvalOutput:
        """Evaluates what is due at step `rollout_id` (a data set's `interval`, the first and the last step).

        Raises:
            EngineError: the weights changed in the middle of it.
            TooManyFailures: by the failure policy, per data set.
        """
        due = [(dataset, prompts) for dataset, prompts in self._datasets if self._is_due(dataset, rollout_id)]
        total, done, tokens = sum(len(prompts) for _, prompts in due), 0, 0

        def one_more(task: asyncio.Task[SampleGroup]) -> None:
            nonlocal done, tokens
            if not task.cancelled() and task.exception() is None:
                done += 1
                tokens += sum(row.response_length for row in task.result())
                on_progress(done, total, tokens)

        output = EvalOutput()
        groups_of: dict[str, list[asyncio.Task[SampleGroup]]] = {}
        async with first_error(), asyncio.TaskGroup() as tasks:
            for dataset, prompts in due:
                ledger = self._ledger(dataset, len(prompts), rollout_id)
                groups_of[dataset.name] = []
                for job in self._jobs(dataset, prompts, rollout_id):
                    task = tasks.create_task(self._runner.run(job, ledger))
                    task.add_done_callback(one_more)
                    groups_of[dataset.name].append(task)
        for dataset, _ in due:
            groups = [task.result() for task in groups_of[dataset.name]]
            samples = [sample for group in groups for sample in group]
            output.samples_by_dataset[dataset.name] = samples
            output.metrics.update(summarize(dataset, groups))
        _check_one_version(output, rollout_id)
        return output

    def _is_due(self, dataset: EvalDataset, rollout_id: int) -> bool:
        last = self._runtime.config.rollout.num_rollout
        return dataset.interval is None or rollout_id % dataset.interval == 0 or rollout_id == last

    def _ledger(self, dataset: EvalDataset, num_prompts: int, rollout_id: int) -> FailureLedger:
        num_samples = num_prompts * dataset.n_samples_per_eval_prompt
        fraction = self._runtime.config.rollout.max_failed_sample_fraction
        return FailureLedger(f"evaluation {dataset.name} at step {rollout_id}", num_samples, fraction)

    def _jobs(self, dataset: EvalDataset, prompts: Sequence[Prompt], rollout_id: int) -> list[GroupJob]:
        n = dataset.n_samples_per_eval_prompt
        sampling = Sampling.for_evaluation(self._runtime.config, dataset)
        rewards = evaluation_rewards(self._runtime.config, dataset)
        return [
            GroupJob(
                [_sample(prompt, number, number * n + i) for i in range(n)], rollout_id, sampling, rewards, dataset.name
            )
            for number, prompt in enumerate(prompts)
        ]


def _sample(prompt: Prompt, group_index: int, index: int) -> Sample:
    """Shares the prompt's containers: the runner copies them before anything may change."""
    return Sample(
        group_index=group_index,
        index=index,
        prompt=prompt.prompt,
        tokens=prompt.tokens,
        label=prompt.label,
        metadata=prompt.metadata,
    )


class first_error:
    """A TaskGroup raises its tasks' errors as a group; the first of them is what the policy meant."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, kind: object, error: BaseException | None, tb: object) -> None:
        if isinstance(error, BaseExceptionGroup):
            raise error.exceptions[0]


def _check_one_version(output: EvalOutput, rollout_id: int) -> None:
    """All samples of one evaluation come from the same weights."""
    versions = {v for samples in output.samples_by_dataset.values() for s in samples for v in s.weight_versions}
    if len(versions) > 1:
        raise EngineError(
            f"evaluation at step {rollout_id}, got samples of weight versions {', '.join(sorted(versions))}: "
            "the weights changed while it ran; publish weights before or after an evaluation"
        )
    (version,) = versions or {""}
    if version.isdecimal():
        for name in output.samples_by_dataset:
            output.metrics[f"eval/{name}/weight_version"] = float(version)


def summarize(dataset: EvalDataset, groups: Sequence[SampleGroup]) -> dict[str, float]:
    """The metrics of one data set from its scored groups, one for each prompt; see the module's docstring."""
    prefix = f"eval/{dataset.name}"
    rows = [row for group in groups for row in group]
    out = {f"{prefix}/failed_ratio": _ratio(rows, lambda s: s.status is Status.FAILED)}
    scores_of = [_trajectory_scores(group, dataset) for group in groups]
    scores_of = [scores for scores in scores_of if scores]
    if not scores_of:
        return out
    means = np.array([np.mean(scores) for scores in scores_of])
    out[prefix] = float(means.mean())
    if len(means) > 1:
        half = _Z_95 * float(means.std(ddof=1)) / math.sqrt(len(means))
        out[f"{prefix}/ci_low"], out[f"{prefix}/ci_high"] = out[prefix] - half, out[prefix] + half
    for k in _ks(dataset.n_samples_per_eval_prompt):
        chances = [
            pass_at_k(len(scores), sum(score >= PASS_SCORE for score in scores), k)
            for scores in scores_of
            if len(scores) >= k
        ]
        if chances:
            out[f"{prefix}/pass@{k}"] = float(np.mean(chances))
    whole = [row for row in rows if row.status is not Status.FAILED]
    out[f"{prefix}/response_len/mean"] = float(np.mean([row.response_length for row in whole]))
    out[f"{prefix}/truncated_ratio"] = _ratio(whole, lambda s: s.status is Status.TRUNCATED)
    return out


def _trajectory_scores(group: SampleGroup, dataset: EvalDataset) -> list[float]:
    """One score for each trajectory that did not fail: its last row's."""
    last = {row.index: row for row in group if row.status is not Status.FAILED}
    return [scalar(row.reward, dataset.reward_key, dataset.reward_weights) for row in last.values()]


def _ks(n: int) -> list[int]:
    """1, 2, 4, .. up to n, and n."""
    return sorted({1 << i for i in range(n.bit_length())} | {n})


def pass_at_k(n: int, passed: int, k: int) -> float:
    """1 - C(n - passed, k) / C(n, k): chance that k of n samples, drawn without replacement, hold a passing one."""
    if not 1 <= k <= n or not 0 <= passed <= n:
        raise ValueError(f"pass@k, got k={k} n={n} passed={passed}: it needs 1 <= k <= n and 0 <= passed <= n")
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def _ratio(rows: Sequence[Sample], predicate: object) -> float:
    assert callable(predicate)
    return sum(map(bool, map(predicate, rows))) / len(rows) if rows else 0.0
