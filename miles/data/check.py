"""What this room can find wrong before anything is read or started."""

from __future__ import annotations

from pathlib import Path

from miles.algo import advantage_estimators, aggregations
from miles.config import Config, Problem, check_names, eval_datasets
from miles.errors import DataError

from .files import PROMPT_FILE_KINDS, split_slice
from .reference_cache import model_of, stale_cache


def check(config: Config) -> list[Problem]:
    """Problems of prompt and replay files (missing, of an unknown kind, with a slice that cannot be read), and names of
    estimators that no plugin registered."""
    problems = check_names(config, {"advantage_estimator": advantage_estimators, "loss_aggregation": aggregations})
    if not config.debug.debug_train_only:
        if config.rollout.prompt_data is not None:
            problems += _check_prompts("--prompt-data", config.rollout.prompt_data)
        for dataset in eval_datasets(config):
            problems += _check_prompts(f"evaluation {dataset.name}", dataset.path)
    directory = config.preference.ref_log_probs_dir
    if directory is not None and (stale := stale_cache(Path(directory), model_of(config))) is not None:
        problems.append(stale)
    replay = config.debug.load_debug_rollout_data
    # A template is looked up at each rollout, from 0 or where --load goes on; a plain path is the same file for all.
    if replay is not None:
        is_first_known = "{" not in replay or config.ckpt.load is None
        first = Path(replay.format(rollout_id=0) if "{" in replay else replay)
        if is_first_known and not first.is_file():
            problems.append(Problem("--load-debug-rollout-data", replay, f"there is no file {first}", "check the path"))
    return problems


def _check_prompts(what: str, spec: str) -> list[Problem]:
    try:
        path, _ = split_slice(spec)
    except DataError:
        return [Problem(what, spec, "the slice cannot be read", "write path@[start:stop] with whole numbers")]
    if not path.is_file():
        return [Problem(what, spec, "there is no such file", "check the path")]
    if path.suffix not in PROMPT_FILE_KINDS:
        return [Problem(what, spec, "prompt files of this kind are not read", f"use {' or '.join(PROMPT_FILE_KINDS)}")]
    return []
