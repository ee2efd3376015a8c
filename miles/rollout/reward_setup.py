"""What a configuration needs before samples can be scored: which rewards, and the worker processes for them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from miles.config import config_to_dict, eval_datasets

from .rewards import registry
from .rewards.pool import RewardPool
from .rewards.scorer import RewardSource
from .rewards.target import Target

if TYPE_CHECKING:
    from miles.config import Config, EvalDataset


def training_rewards(config: Config) -> RewardSource:
    flags = config.rollout
    return RewardSource(
        flags.rm_type, flags.custom_rm_path, flags.group_rm, flags.reward_key, False, flags.reward_weights
    )


def evaluation_rewards(config: Config, dataset: EvalDataset) -> RewardSource:
    """A data set with an rm_type of its own is scored by that and not by the training's hook. --group-rm describes the
    hook of --custom-rm-path; a data set's own hook scores single samples."""
    flags = config.rollout
    hook = dataset.custom_rm_path
    inherited = hook == flags.custom_rm_path
    if inherited and dataset.rm_type != flags.rm_type:
        hook = None
    return RewardSource(
        dataset.rm_type, hook, flags.group_rm and inherited, dataset.reward_key, True, dataset.reward_weights
    )


def all_rewards(config: Config) -> list[RewardSource]:
    return [training_rewards(config), *(evaluation_rewards(config, dataset) for dataset in eval_datasets(config))]


@asynccontextmanager
async def reward_pool(config: Config, *, num_workers: int) -> AsyncIterator[RewardPool]:
    """A pool for the configuration's rewards, running with everything imported where they are known to need it.

    Rows may name a reward of their own; a pool that only such rows need starts with the first of them.
    """
    sources = all_rewards(config)
    hooks = [Target("hook", source.hook, source.group) for source in sources if source.hook is not None]
    types = [source.rm_type for source in sources if source.hook is None and source.rm_type is not None]
    rules = [rule for rm_type in types for rule in registry.find_all(rm_type)]
    pool = RewardPool(
        config_to_dict(config),
        num_workers=num_workers,
        targets=hooks,
        modules=sorted({module for rule in rules or [registry.find("math")] for module in rule.modules}),
        rules=sorted({rule.name for rule in rules if rule.prepare is not None}),
        max_retries=config.rollout.rm_max_retries,
    )
    if hooks or any(not rule.inline for rule in rules):
        await pool.start()
    try:
        yield pool
    finally:
        await pool.close()
