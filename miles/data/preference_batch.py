"""Groups into what preference jobs train on: pairs of answers to one prompt, or answers that are judged by themselves.

    group --best and worst by reward--> a pair: two rows that stay in one micro-batch                      (--loss-type dpo, ...)
    group --every answer, good where its reward is above 0--> a row                                            (--loss-type kto)

Groups of a data set have the answers that its rows name, with rewards 1 and 0; those of the engines have been scored. Optimizer
steps are made of equally many groups, in order. A pair, or a judged answer, weighs one over their number in its step.

Out of the loss: FAILED samples, those marked `remove_sample`, those without a trained token; and, for pairs, groups in which no
two of the rest differ in their reward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from miles.config import Config, job_of
from miles.errors import DataError
from miles.types import MARGIN, Sample, SampleGroup, Status, StepTotals, TrainBatch

from .batch import (
    TrainBatches,
    build_train_batches,
    plan_rows,
    reward_of,
    rollout_metrics,
    share_of_rank,
    trajectories_of,
)
from .rows import TrainRows, check_samples


def build_batches(
    groups: list[SampleGroup],
    *,
    config: Config,
    rollout_id: int,
    dp_size: int,
    as_one_step: bool = False,
    **options: Any,
) -> TrainBatches:
    """The trainers' batches of one rollout, by what the job trains on; `options` go to `build_train_batches`."""
    build = build_preference_batches
    if job_of(config).preference is None:
        build = build_train_batches
    else:
        options = {}
    return build(groups, config=config, rollout_id=rollout_id, dp_size=dp_size, as_one_step=as_one_step, **options)


@dataclass(frozen=True)
class _Choice:
    """One row to train on."""

    sample: Sample
    position: int
    """Of the sample in the rollout."""
    preferred: bool
    unit: int
    """Number of the pair, or of the row itself."""
    group: int
    """Position of its group in the rollout."""


def build_preference_batches(
    groups: list[SampleGroup], *, config: Config, rollout_id: int, dp_size: int, as_one_step: bool = False
) -> TrainBatches:
    """The trainers' batches of one rollout, and its metrics. as_one_step makes one optimizer step of any number of groups.

    Raises DataError for a sample that breaks its contract, a reward that is no number, and groups that do not fill the steps.
    """
    of_pairs = job_of(config).preference == "pairs"
    group_size = _groups_of_step(len(groups), config, as_one_step=as_one_step)
    num_steps = len(groups) // group_size
    choices = list(_choose(groups, config, of_pairs=of_pairs))
    rows = check_samples([choice.sample for choice in choices])
    unit = np.array([choice.unit for choice in choices], dtype=np.int64)
    step_of_row = np.array([choice.group // group_size for choice in choices], dtype=np.int64)
    weights, totals = _weights(rows, unit, step_of_row, num_steps)
    columns = {
        "total_lengths": rows.total_lengths,
        "response_lengths": rows.response_lengths,
        "rewards": np.array([1.0 if choice.preferred else -1.0 for choice in choices], dtype=np.float32),
        "raw_rewards": np.array([reward_of(c.sample, c.sample.reward, config) for c in choices], dtype=np.float32),
        "temperature": rows.temperature,
        "loss_weight": weights,
        "sample_index": rows.index,
        "trajectory_id": rows.trajectory_id,
        "group_index": rows.group_index,
        "position": np.array([choice.position for choice in choices], dtype=np.int64),
        "preferred": np.array([choice.preferred for choice in choices], dtype=np.uint8),
    }
    if of_pairs:
        columns |= {"pair": unit, "margin": _margins(choices)}

    def divide(rows: TrainRows, columns: dict[str, np.ndarray]) -> list[TrainBatch]:
        plan = plan_rows(
            rows.total_lengths, step_of_row, num_steps, dp_size, config, unit_of_row=unit if of_pairs else None
        )
        sent = np.arange(len(rows))
        return [share_of_rank(rows, columns, sent, plan, rank, totals, rollout_id, False) for rank in range(dp_size)]

    batches = divide(rows, columns)
    if not of_pairs:
        mismatched, is_mismatched = _mismatched(choices, step_of_row, config.rollout.rollout_max_context_len)
        crossed = check_samples(mismatched)
        lengths = {"total_lengths": crossed.total_lengths, "response_lengths": crossed.response_lengths}
        others = divide(crossed, columns | lengths | {"loss_weight": is_mismatched})
        batches = [dataclasses.replace(own, mismatched=other) for own, other in zip(batches, others, strict=True)]

    advantages: list[float | None] = [None] * sum(map(len, groups))
    for choice in choices:
        advantages[choice.position] = 1.0 if choice.preferred else -1.0
    metrics = _metrics(groups, choices, totals, config, of_pairs=of_pairs)
    return TrainBatches(batches, metrics, advantages)


def _groups_of_step(num_groups: int, config: Config, *, as_one_step: bool) -> int:
    """DataError where a step would be left incomplete."""
    if as_one_step:
        return max(num_groups, 1)
    num_steps = config.rollout.num_steps_per_rollout or 1
    if not num_groups or num_groups % num_steps:
        raise DataError(
            f"rollout, got {num_groups} groups: they do not fill --num-steps-per-rollout {num_steps}; return every group"
        )
    return num_groups // num_steps


def _choose(groups: list[SampleGroup], config: Config, *, of_pairs: bool) -> Iterator[_Choice]:
    position = unit = 0
    for number, group in enumerate(groups):
        usable = [
            (position + i, sample, reward_of(sample, sample.reward, config))
            for i, sample in enumerate(group)
            if sample.status is not Status.FAILED and not sample.remove_sample and sample.effective_response_length
        ]
        position += len(group)
        if not of_pairs:
            for at, sample, reward in usable:
                yield _Choice(sample, at, reward > 0, unit, number)
                unit += 1
        elif usable:
            best, worst = max(usable, key=lambda u: u[2]), min(usable, key=lambda u: u[2])
            if best[2] > worst[2]:
                yield _Choice(best[1], best[0], True, unit, number)
                yield _Choice(worst[1], worst[0], False, unit, number)
                unit += 1


def _weights(
    rows: TrainRows, unit: np.ndarray, step_of_row: np.ndarray, num_steps: int
) -> tuple[np.ndarray, tuple[StepTotals, ...]]:
    """[B] float32 weight of each row's pair, or of the row, and what each step is made of."""
    weights = np.zeros(len(rows), dtype=np.float32)
    totals = []
    for step in range(num_steps):
        mine = step_of_row == step
        units = len(np.unique(unit[mine]))
        weights[mine] = 1 / max(units, 1)
        totals.append(StepTotals(units, int(rows.trained_tokens[mine].sum()), int(mine.sum())))
    return weights, tuple(totals)


def _margins(choices: Sequence[_Choice]) -> np.ndarray:
    """[B] float32: by how much a reward model should tell the rows of a pair apart; 0 where the data do not say."""
    return np.array([float(choice.sample.metadata.get(MARGIN) or 0.0) for choice in choices], dtype=np.float32)


def _partners(choices: Sequence[_Choice], step_of_row: np.ndarray) -> np.ndarray:
    """[B] whose response each row's prompt is shown with: the next one in its step, around, of another group; itself where
    there is none."""
    partners = np.arange(len(choices))
    of_group = np.array([choice.group for choice in choices], dtype=np.int64)
    for step in np.unique(step_of_row):
        mine = np.flatnonzero(step_of_row == step)
        group = of_group[mine]
        _, size = np.unique(group, return_counts=True)
        # A step's rows lie group by group: moving on by the largest group leaves every group behind, if half of them is not one.
        shift = int(size.max(initial=0))
        moved = np.roll(np.arange(len(mine)), -shift)
        partners[mine] = np.where(group[moved] != group, mine[moved], mine)
    return partners


def _mismatched(
    choices: Sequence[_Choice], step_of_row: np.ndarray, max_tokens: int | None
) -> tuple[list[Sample], np.ndarray]:
    """Each row's prompt with the response of its partner, cut to max_tokens, and [B] float32: 1 where that is another's.

    Rows of weight 0 are not compared: those without a partner, and those whose prompt leaves it no trained token.
    """
    crossed = []
    weights = np.zeros(len(choices), dtype=np.float32)
    for number, (choice, partner) in enumerate(zip(choices, _partners(choices, step_of_row), strict=True)):
        own, other = choice.sample, choices[partner].sample
        room = None if max_tokens is None else max(max_tokens - own.prompt_length, 0)
        response = list(other.tokens[other.prompt_length :])[:room]
        mask = None if other.loss_mask is None else list(other.loss_mask)[:room]
        if partner == number or not response or (mask is not None and not any(mask)):
            crossed.append(dataclasses.replace(own, loss_scale=None, rollout_log_probs=None))
            continue
        weights[number] = 1
        crossed.append(
            dataclasses.replace(
                own,
                tokens=[*own.tokens[: own.prompt_length], *response],
                response_length=len(response),
                loss_mask=mask,
                loss_scale=None,
                rollout_log_probs=None,
            )
        )
    return crossed, weights


def _metrics(
    groups: list[SampleGroup],
    choices: Sequence[_Choice],
    totals: tuple[StepTotals, ...],
    config: Config,
    *,
    of_pairs: bool,
) -> dict[str, float]:
    """Those of any rollout; and `rollout/pairs`, how many there are, or `rollout/desirable_ratio`, the share of good answers."""
    trajectories = trajectories_of(groups)
    scored = [t for t in trajectories if not t.failed]
    rewards = np.array([reward_of(row, row.reward, config) for t in scored for row in t.rows], dtype=np.float64)
    metrics = rollout_metrics(trajectories, rewards, totals, job_of(config).rewards)
    if of_pairs:
        return metrics | {"rollout/pairs": float(sum(step.num_trajectories for step in totals))}
    if choices:
        metrics["rollout/desirable_ratio"] = float(np.mean([choice.preferred for choice in choices]))
    return metrics
