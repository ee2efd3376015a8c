"""What a run will do, counted before it starts: prompts, samples, tokens, optimizer steps, micro-batches."""

from __future__ import annotations

import math

from .groups import Config
from .parallel import parallel_sizes


def trainer_world_size(config: Config) -> int:
    """Trainer ranks of the whole run."""
    cluster = config.cluster
    assert cluster.actor_num_gpus_per_node is not None
    return cluster.actor_num_nodes * cluster.actor_num_gpus_per_node


def budget_table(config: Config, *, num_prompts: int | None = None) -> list[tuple[str, str]]:
    """Rows (what, per rollout and over the run), for the table at launch.

    Tokens and micro-batches are upper bounds: every prompt and response at its limit. `num_prompts` is the size of
    --prompt-data, where it is known.
    """
    rollout = config.rollout
    prompts, n, steps = rollout.rollout_batch_size, rollout.n_samples_per_prompt, rollout.num_steps_per_rollout
    if prompts is None or n is None or steps is None:
        return []
    samples = prompts * n
    rows = [
        ("prompts", _row(prompts, rollout.num_rollout) + _epochs(prompts, rollout.num_rollout, num_prompts)),
        ("samples", _row(samples, rollout.num_rollout) + f", {n} per prompt"),
    ]
    longest = _longest_sample(config)
    if longest is not None:
        rows.append(("tokens", "at most " + _row(samples * longest, rollout.num_rollout) + f", {longest:,} per sample"))
    rows.append(("optimizer steps", _row(steps, rollout.num_rollout) + f", {samples // steps:,} samples each"))
    micro_batches = _micro_batches(config, samples // steps, longest)
    if micro_batches is not None:
        rows.append(("micro-batches per rank", "at most " + _row(micro_batches * steps, rollout.num_rollout)))
    return rows


def _row(per_rollout: int, num_rollout: int | None) -> str:
    if num_rollout is None:
        return f"{per_rollout:,} per rollout"
    return f"{per_rollout:,} per rollout, {per_rollout * num_rollout:,} in {num_rollout:,} rollouts"


def _epochs(prompts: int, num_rollout: int | None, num_prompts: int | None) -> str:
    if not num_prompts or num_rollout is None:
        return ""
    return f" ({prompts * num_rollout / num_prompts:.2f} passes over {num_prompts:,})"


def _longest_sample(config: Config) -> int | None:
    """Most tokens of one single-turn sample; None while neither lengths nor the context are known."""
    rollout = config.rollout
    limits = [rollout.rollout_max_context_len]
    if rollout.rollout_max_prompt_len is not None and rollout.rollout_max_response_len is not None:
        limits.append(rollout.rollout_max_prompt_len + rollout.rollout_max_response_len)
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _micro_batches(config: Config, samples: int, longest: int | None) -> int | None:
    """Most micro-batches of one rank in one optimizer step of `samples` samples."""
    sizes = parallel_sizes(config)
    rows = math.ceil(samples / sizes.data_size(trainer_world_size(config)))
    if not config.perf.use_dynamic_batch_size:
        return math.ceil(rows / config.rollout.micro_batch_size)
    if longest is None or config.perf.max_tokens_per_gpu is None:
        return None
    # Rows at their limit; a row longer than the budget has a micro-batch of its own.
    return math.ceil(rows / max(1, config.perf.max_tokens_per_gpu * sizes.context // longest))
