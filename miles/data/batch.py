"""Scored groups into what the trainers get: one `TrainBatch` for each data-parallel rank.

    groups -> trajectories -> rewards, normalised in their group -> optimizer steps of global_batch_size trajectories, in order
           -> loss weights and totals of each step, before any split -> rows of zero advantage left out
           -> plan (ranks, micro-batches) -> columns sliced for each rank

Out of the loss and of its denominators: trajectories with a FAILED row (also out of their group's statistics, for they have
no reward), rows marked `remove_sample` (kept in the statistics) and rows without an unmasked token. Such rows are not sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from miles.algo.advantages import AdvantageSpec, Outcomes, advantage_estimators, equal_reward_groups
from miles.algo.aggregation import loss_weights
from miles.config import Config, GrpoArgs, ModelArgs, args_view, job_of, parallel_sizes
from miles.config.algorithms import BUILT_IN
from miles.errors import ConfigError, DataError, HookError
from miles.interfaces import Args
from miles.types import (
    ANSWERED_BY,
    CHANNEL,
    GREEDY_REWARD,
    Author,
    Sample,
    SampleGroup,
    Status,
    StepTotals,
    TrainBatch,
    reward_parts,
)

from .plan import Plan, plan_batch
from .row import trajectory_of
from .rows import TrainRows, check_samples
from .teacher_columns import teacher_columns

#: `f(args, samples) -> (raw, rewards)`: one entry a sample each; `rewards` become the advantages.
RewardPostProcess = Callable[[Args, list[Sample]], tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class TrainBatches:
    """One rollout, ready for the trainers."""

    batches: list[TrainBatch]
    """One for each data-parallel rank."""
    metrics: dict[str, float]
    """`rollout/...`, see `rollout_metrics`."""
    advantages: list[float | None]
    """Of each sample of the rollout, in order; None where it is out of the loss."""


@dataclass
class Trajectory:
    """One conversation with the model: what batch sizes, group statistics and sequence denominators count."""

    number: int
    """Its position among those of the rollout."""
    group: int
    """Position of its group in the rollout."""
    rows: list[Sample] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """Of each row among all samples of the rollout."""
    failed: bool = False
    """Any of its rows is."""
    truncated: bool = False
    """Any of its rows is."""

    def add(self, row: Sample, position: int) -> None:
        self.rows.append(row)
        self.positions.append(position)
        self.failed |= row.status is Status.FAILED
        self.truncated |= row.status is Status.TRUNCATED


def build_train_batches(
    groups: list[SampleGroup],
    *,
    config: Config,
    rollout_id: int,
    dp_size: int,
    reward_post_process: RewardPostProcess | None = None,
    score_all: bool = False,
    as_one_step: bool = False,
    channels: Sequence[str] = (),
) -> TrainBatches:
    """The trainers' batches of one rollout, and its metrics.

    as_one_step makes one optimizer step of any number of trajectories: what is evaluated is not cut. channels: names that
    `metadata[CHANNEL]` of a sample may have; a row's is sent with it.
    reward_post_process replaces group normalisation. score_all keeps rows of zero advantage, which are otherwise left out
    when the loss is one of ours and neither a KL nor an entropy term applies to them: their gradient is zero, and denominators
    count them all the same.
    Raises DataError for a sample that breaks its contract or a number of trajectories that `global_batch_size` does not
    divide, HookError for what the hook returned.
    """
    trajectories = trajectories_of(groups)
    step_size = max(len(trajectories), 1) if as_one_step else _step_size(len(trajectories), config)
    num_steps = len(trajectories) // step_size
    scored = [t for t in trajectories if not t.failed]
    raw, advantages, reward_metrics = _rewards(scored, config, reward_post_process)

    overlong = config.grpo.overlong_filtering
    candidates = [
        (number, row)
        for number, (row, t) in enumerate((row, t) for t in scored for row in t.rows)
        if not row.remove_sample and not (overlong and t.truncated)
    ]
    rows = check_samples([row for _, row in candidates])
    trained = np.flatnonzero(rows.trained_tokens)
    kept = rows if len(trained) == len(rows) else rows.take(trained)
    # Of each kept row: its number among the rows of `scored`, then what is known of that.
    number = np.array([number for number, _ in candidates], dtype=np.int64)[trained]
    position = np.array([p for t in scored for p in t.positions], dtype=np.int64)[number]
    step_of_row = np.repeat([t.number // step_size for t in scored], [len(t.rows) for t in scored])[number]
    advantage_of: list[float | None] = [None] * sum(map(len, groups))
    for i, advantage in zip(position.tolist(), advantages[number].tolist(), strict=True):
        advantage_of[i] = advantage

    rewards = advantages[number].astype(np.float32)
    sent = np.full(len(kept), True) if score_all or _scores_every_row(config.grpo) else rewards != 0
    weights, totals = _weights(kept, step_of_row, sent, num_steps, config)
    columns = {
        "total_lengths": kept.total_lengths,
        "response_lengths": kept.response_lengths,
        "rewards": rewards,
        "raw_rewards": raw[number].astype(np.float32),
        "temperature": kept.temperature,
        "loss_weight": weights.astype(np.float32),
        "sample_index": kept.index,
        "trajectory_id": kept.trajectory_id,
        "group_index": kept.group_index,
        "position": position,
    }
    if channels:
        columns["channel"] = _channels([s for group in groups for s in group], position, channels)
    if config.gkd.gkd_lmbda > 0:
        authors = [sample.metadata.get(ANSWERED_BY) for group in groups for sample in group]
        columns["own_answer"] = np.array([authors[p] == Author.STUDENT for p in position.tolist()], dtype=np.uint8)
    with_log_probs = _has_rollout_log_probs(kept, config.grpo)
    plan = plan_rows(
        kept.total_lengths[sent],
        step_of_row[sent],
        num_steps,
        dp_size,
        config,
        group_of_row=kept.group_index[sent],
    )
    batches = [
        share_of_rank(kept, columns, np.flatnonzero(sent), plan, rank, totals, rollout_id, with_log_probs)
        for rank in range(dp_size)
    ]
    for batch in batches:
        batch.metadata["channels"] = tuple(channels)
        if config.gkd.teacher_urls is not None:
            everyone = [sample for group in groups for sample in group]
            batch.ragged.update(teacher_columns(everyone, batch.rows["position"]))
    has_rewards = job_of(config).rewards
    return TrainBatches(batches, rollout_metrics(trajectories, raw, totals, has_rewards) | reward_metrics, advantage_of)


def trajectories_of(groups: list[SampleGroup]) -> list[Trajectory]:
    """Trajectories in order of their first rows. DataError where one is found in two groups."""
    found: dict[int, Trajectory] = {}
    position = 0
    for number, group in enumerate(groups):
        for sample in group:
            name = trajectory_of(sample)
            trajectory = found.get(name)
            if trajectory is None:
                trajectory = found[name] = Trajectory(len(found), number)
            if trajectory.group != number:
                raise DataError(
                    f"trajectory_id of sample {sample.index}, got {name} in two groups: rows of different prompts would count "
                    "as one conversation; use the index of the sample that the hook was given"
                )
            trajectory.add(sample, position)
            position += 1
    return list(found.values())


def _step_size(num_trajectories: int, config: Config) -> int:
    """Trajectories of one optimizer step. DataError where a step would be left incomplete: every sample counts once."""
    size = config.rollout.global_batch_size or num_trajectories
    if not num_trajectories or num_trajectories % size:
        raise DataError(
            f"rollout, got {num_trajectories} trajectories: they do not fill optimizer steps of --global-batch-size {size}; "
            "return every sample of every group, with one trajectory_id for the rows of one conversation"
        )
    return size


def _rewards(
    scored: list[Trajectory], config: Config, reward_post_process: RewardPostProcess | None
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Raw rewards and advantages of every row of every scored trajectory, float64, and metrics of what they are made of."""
    if reward_post_process is not None:
        return *_post_processed([row for t in scored for row in t.rows], config, reward_post_process), {}

    if not job_of(config).rewards:
        ones = np.ones(sum(len(t.rows) for t in scored))
        return ones, ones, {}
    outcomes = _outcomes(scored, config)
    try:
        advantages = advantage_estimators.get(config.grpo.advantage_estimator)(outcomes, advantage_spec(config))
    except ValueError as error:
        raise DataError(f"--advantage-estimator {config.grpo.advantage_estimator}: {error}") from error
    num_rows = np.array([len(t.rows) for t in scored], dtype=np.int64)
    metrics = {f"rollout/reward/{name}": float(part.mean()) for name, part in outcomes.parts.items() if len(part)}
    if outcomes.greedy is not None and len(outcomes.greedy):
        metrics["rollout/greedy_reward"] = float(outcomes.greedy.mean())
    return np.repeat(outcomes.rewards, num_rows), np.repeat(advantages, num_rows), metrics


def advantage_spec(config: Config) -> AdvantageSpec:
    """The GRPO flags, as estimators take them."""
    return AdvantageSpec(
        normalize_std=not config.grpo.disable_grpo_std_normalization,
        baseline=not config.grpo.disable_rewards_normalization,
        k=config.grpo.pass_at_k or 1,
        weights=config.rollout.reward_weights,
    )


def _outcomes(scored: list[Trajectory], config: Config) -> Outcomes:
    """Rewards and lengths of the trajectories, as estimators take them. DataError where one is missing or not finite."""
    last = [t.rows[-1] for t in scored]
    rewards = [reward_of(sample, sample.reward, config) for sample in last]
    weights = config.rollout.reward_weights
    parts = {name: np.array([_part(s, name) for s in last], dtype=np.float64) for name in weights}
    greedy = None
    if config.grpo.advantage_estimator == "remax":
        greedy = np.array([reward_of(s, s.metadata.get(GREEDY_REWARD), config) for s in last], dtype=np.float64)
    return Outcomes(
        rewards=np.array(rewards, dtype=np.float64),
        group=np.array([t.group for t in scored], dtype=np.int64),
        lengths=np.array([sum(map(_trained_tokens, t.rows)) for t in scored], dtype=np.float64),
        parts=parts,
        greedy=greedy,
    )


def _part(sample: Sample, name: str) -> float:
    """One entry of the sample's reward, which `reward_parts` has found to be there where the reward is a dict."""
    if not isinstance(sample.reward, dict):
        raise DataError(
            f"reward of sample {sample.index}, got {sample.reward!r}: --reward-weights names entries of a dict; "
            "return a dict, or leave --reward-weights out"
        )
    value = float(sample.reward[name])
    if not math.isfinite(value):
        raise DataError(
            f"reward of sample {sample.index}, got {value} in {name!r}: it spoils its whole group; return a finite number"
        )
    return value


def _trained_tokens(row: Sample) -> int:
    # Of a row that `check_sample` has not seen: whatever its mask holds is counted.
    mask = row.loss_mask
    if mask is None:
        return row.response_length
    return len(mask) - mask.count(0) if type(mask) is list else sum(map(bool, mask))


def reward_of(sample: Sample, value: Any, config: Config) -> float:
    """The number that `value`, a reward of the sample's prompt, stands for.

    A trajectory has the reward of its last row, which has seen the whole conversation; its rows all train with it.
    """
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, str | bytes | list | tuple):
        raise DataError(
            f"reward of sample {sample.index}, got {value!r}: it is no number; return a float, or a dict with --reward-key"
        )
    try:
        parts = reward_parts(value, config.rollout.reward_key, config.rollout.reward_weights)
    except (ValueError, TypeError) as error:
        raise DataError(str(error)) from error
    if isinstance(parts, str):
        raise DataError(f"reward of sample {sample.index}, {parts}")
    reward = sum(weight * part for weight, part in parts.values())
    if not math.isfinite(reward):
        raise DataError(
            f"reward of sample {sample.index}, got {reward}: it spoils its whole group; "
            "return a finite number, or raise in the reward hook so that the sample is FAILED"
        )
    return reward


def _post_processed(
    samples: list[Sample], config: Config, reward_post_process: RewardPostProcess
) -> tuple[np.ndarray, np.ndarray]:
    result = reward_post_process(args_view(config), samples)
    try:
        raw, rewards = (np.asarray(column, dtype=np.float64) for column in result)
    except (TypeError, ValueError) as error:
        raise HookError(
            f"reward post-processing hook, got {type(result).__name__} ({error}): it returns (raw, rewards), a number for each sample"
        ) from error
    for name, column in (("raw", raw), ("rewards", rewards)):
        if column.shape != (len(samples),) or not np.isfinite(column).all():
            raise HookError(
                f"reward post-processing hook, got {name} of shape {column.shape}: it returns a finite number for each of the "
                f"{len(samples)} samples; return them in order"
            )
    return raw, rewards


def _scores_every_row(grpo: GrpoArgs) -> bool:
    """Whether a row of zero advantage has a gradient or a metric: another term applies, its tokens get advantages of their
    own, it belongs to a population that is compared, or the loss is a user's and what it makes of advantages is not known."""
    changes_advantages = (
        grpo.kl_coef != 0 or bool(grpo.normalize_advantages) or grpo.advantage_estimator == "ppo" or grpo.use_opd
    )
    is_users = grpo.loss_type == "custom_loss" or grpo.policy_loss not in (None, *BUILT_IN["policy_loss"])
    return grpo.use_kl_loss or grpo.entropy_coef != 0 or changes_advantages or grpo.entropy_quantile < 1 or is_users


def _weights(
    rows: TrainRows, step_of_row: np.ndarray, sent: np.ndarray, num_steps: int, config: Config
) -> tuple[np.ndarray, tuple[StepTotals, ...]]:
    """Loss weight of each row [B] float64, and what each optimizer step is made of, skipped rows included."""
    grpo = config.grpo
    mode = grpo.loss_aggregation or ("token_mean" if grpo.calculate_per_token_loss else "seq_mean")
    constant_length = grpo.loss_constant_length or config.rollout.rollout_max_response_len
    tokens, trajectory = rows.trained_tokens, rows.trajectory_id
    weights = np.zeros(len(rows), dtype=np.float64)
    totals = []
    for step in range(num_steps):
        mine = step_of_row == step
        weights[mine] = loss_weights(tokens[mine], trajectory[mine], mode=mode, constant_length=constant_length)
        totals.append(
            StepTotals(
                num_trajectories=len(np.unique(trajectory[mine])),
                num_tokens=int(tokens[mine].sum()),
                num_rows=int(mine.sum()),
                num_skipped_rows=int((mine & ~sent).sum()),
            )
        )
    return weights, tuple(totals)


def _channels(samples: Sequence[Sample], positions: np.ndarray, channels: Sequence[str]) -> np.ndarray:
    """[B] i64: number of each row's channel. DataError for one that has no name in `channels`."""
    numbers = {name: number for number, name in enumerate(channels)}
    found = [samples[position].metadata.get(CHANNEL) for position in positions]
    if (unknown := next((name for name in found if name not in numbers), None)) is not None or None in found:
        raise DataError(
            f"channel, got {unknown!r}: the training data has {', '.join(channels)}; name one of them in every row"
        )
    return np.array([numbers[str(name)] for name in found], dtype=np.int64)


def _has_rollout_log_probs(rows: TrainRows, grpo: GrpoArgs) -> bool:
    """Whether the column is sent: decided by all rows. DataError where a row lacks what a feature needs."""
    missing = rows.index[~rows.has_log_probs]
    flag = _needs_rollout_log_probs(grpo)
    if len(missing) and flag:
        raise DataError(
            f"rollout_log_probs, got none for {len(missing)} of {len(rows)} rows, first of sample {missing[0]}: {flag} needs "
            "them; fill them in from the engine's output_token_logprobs, or switch the flag off"
        )
    return len(rows) > 0 and not len(missing)


def _needs_rollout_log_probs(grpo: GrpoArgs) -> str | None:
    """The flag that cannot do without them, if there is one."""
    if grpo.use_tis:
        return "--use-tis"
    if grpo.off_policy_correction is not None:
        return f"--off-policy-correction {grpo.off_policy_correction}"
    if grpo.custom_tis_function_path is not None:
        return "--custom-tis-function-path"
    if grpo.policy_loss == "dppo":
        return "--policy-loss dppo"
    return "--use-rollout-logprobs" if grpo.use_rollout_logprobs else None


def plan_rows(
    lengths: np.ndarray,
    step_of_row: np.ndarray,
    num_steps: int,
    dp_size: int,
    config: Config,
    *,
    unit_of_row: np.ndarray | None = None,
    group_of_row: np.ndarray | None = None,
) -> Plan:
    """`plan_batch` as the flags say."""
    max_tokens, sizes = None, parallel_sizes(config)
    if config.perf.use_dynamic_batch_size:
        max_tokens = config.perf.max_tokens_per_gpu
        if max_tokens is None:
            raise ConfigError(
                "--use-dynamic-batch-size, got no --max-tokens-per-gpu: it is the budget to fill; give it"
            )
        max_tokens *= sizes.context
    return plan_batch(
        lengths,
        step_of_row,
        dp_size,
        unit_of_row=unit_of_row,
        group_of_row=group_of_row,
        micro_batch_size=config.rollout.micro_batch_size if max_tokens is None else None,
        max_tokens=max_tokens,
        balance=config.rollout.balance_data or config.rollout.balance_by_flops,
        costs=layer_flops(config.model, lengths) if config.rollout.balance_by_flops else None,
        multiple_of=sizes.micro_batch_multiple,
        at_least=sizes.least_micro_batches,
        num_steps=num_steps,
    )


def layer_flops(model: ModelArgs, lengths: np.ndarray) -> np.ndarray:
    """[B] floating-point operations of one forward pass of a layer over rows of these lengths, in thousands.

    Products of matrices grow with the length, causal attention with its square: 2 operations a weight and token, and 4 a
    query head, its width and pair of tokens, of which half are seen.
    """
    heads, width, hidden = model.num_attention_heads or 1, model.kv_channels or 1, model.hidden_size or 1
    groups, matrices = model.num_query_groups or heads, 3 if model.swiglu else 2
    weights = hidden * width * 2 * (heads + groups) + matrices * hidden * (model.ffn_hidden_size or 0)
    tokens = np.asarray(lengths, dtype=np.int64)
    return (2 * weights * tokens + 2 * heads * width * tokens**2) // 1000


def share_of_rank(
    rows: TrainRows,
    columns: dict[str, np.ndarray],
    sent: np.ndarray,
    plan: Plan,
    rank: int,
    totals: tuple[StepTotals, ...],
    rollout_id: int,
    with_log_probs: bool,
) -> TrainBatch:
    """One rank's rows, renumbered in the order in which it trains on them. sent: the numbers of the rows that were planned."""
    micro_batches = [micro for step in plan.steps for micro in step[rank]]
    mine = sent[np.concatenate([*micro_batches, np.empty(0, dtype=np.int64)])]
    ends = np.cumsum([len(micro) for micro in micro_batches])
    local = iter(np.split(np.arange(len(mine), dtype=np.int64), ends[:-1]))
    taken = rows.take(mine)
    ragged = {"tokens": taken.tokens, "loss_mask": taken.loss_mask}
    if with_log_probs:
        ragged["rollout_log_probs"] = taken.rollout_log_probs
    if taken.loss_scale is not None:
        ragged["loss_scale"] = taken.loss_scale
    return TrainBatch(
        rollout_id=rollout_id,
        rows={name: column[mine] for name, column in columns.items()},
        ragged=ragged,
        steps=tuple(tuple(next(local) for _ in step[rank]) for step in plan.steps),
        totals=totals,
    )


def _reward_interval(rewards: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """95 % interval of the mean reward, prompts as clusters: samples of one prompt are not independent."""
    _, group = np.unique(groups, return_inverse=True)
    counts = np.bincount(group)
    if len(counts) < 2:
        return {}
    # Of a ratio of sums over clusters (Cochran, Sampling Techniques, 6.3), so that it belongs to the mean over samples.
    residuals = np.bincount(group, weights=rewards - rewards.mean())
    variance = len(counts) / (len(counts) - 1) * float((residuals**2).sum()) / len(rewards) ** 2
    half = 1.959964 * math.sqrt(variance)
    mean = float(rewards.mean())
    return {"rollout/raw_reward/ci_low": mean - half, "rollout/raw_reward/ci_high": mean + half}


def rollout_metrics(
    trajectories: list[Trajectory], raw: np.ndarray, totals: tuple[StepTotals, ...], has_rewards: bool
) -> dict[str, float]:
    """Metrics of the rollout. raw: [rows of trajectories that did not fail] reward. Rewards, lengths and truncation speak of trajectories that did not fail.

    `zero_std_ratio` is the share of groups whose rewards are all equal; `rows_skipped` counts rows that were left out since
    their gradient is zero, `rows_out_of_loss` those that failed, were removed or have no trained token.
    """
    scored = [t for t in trajectories if not t.failed]
    num_rows = sum(len(t.rows) for t in trajectories)
    metrics = {
        "rollout/failed_ratio": 1.0 - len(scored) / len(trajectories),
        "rollout/total_tokens": float(sum(len(row.tokens) for t in scored for row in t.rows)),
        "rollout/trained_tokens": float(sum(step.num_tokens for step in totals)),
        "rollout/rows": float(num_rows),
        "rollout/rows_skipped": float(sum(step.num_skipped_rows for step in totals)),
        "rollout/rows_out_of_loss": float(num_rows - sum(step.num_rows for step in totals)),
    }
    if not scored:
        return metrics
    lengths = np.array([sum(row.response_length for row in t.rows) for t in scored])
    metrics |= {
        "rollout/response_len/mean": float(lengths.mean()),
        "rollout/response_len/max": float(lengths.max()),
        "rollout/response_len/min": float(lengths.min()),
        "rollout/truncated_ratio": float(np.mean([t.truncated for t in scored])),
    }
    if not has_rewards:
        return metrics
    rewards = raw[np.cumsum([len(t.rows) for t in scored]) - 1]
    groups = np.array([t.group for t in scored])
    _, first = np.unique(groups, return_index=True)
    return metrics | {
        "rollout/raw_reward": float(rewards.mean()),
        **_reward_interval(rewards, groups),
        "rollout/reward_std": float(rewards.std()),
        "rollout/zero_std_ratio": float(equal_reward_groups(rewards, groups)[first].mean()),
    }
