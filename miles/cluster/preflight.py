"""Everything that can be found wrong before a process is launched: a typo costs a second, not an hour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from miles import data, engines, observe, rollout, trainers
from miles.config import Config, Problem, budget_table, derive_num_rollout, import_plugins, job_of, raise_if
from miles.data import PromptData
from miles.errors import DataError
from miles.observe import RunState

from .placement import Layout
from .resume import Resume, look


@dataclass(frozen=True)
class Prepared:
    """What preflight found out and the run goes on with."""

    config: Config
    prompts: PromptData | None
    """Loaded and checked; None when a debug run replays samples."""
    layout: Layout
    table: Sequence[tuple[str, str]]
    """Prompts, samples, tokens and optimizer steps, per rollout and over the run."""

    def resume(self, before: tuple[Path, RunState] | None) -> Resume:
        """Where the run begins, after the run `before` if there was one. Reads checkpoints: see `resume.look`."""
        num_rollout = self.config.rollout.num_rollout
        assert num_rollout is not None
        if not self.layout.actor_bundles:
            return Resume(None, 0, {}, ())
        return look(self.config, num_rollout=num_rollout, has_prompts=self.prompts is not None, before=before)


def preflight(config: Config) -> Prepared:
    """Imports plugins, runs every room's check, reads the prompts. Raises `ConfigError` with all problems at once."""
    import_plugins(config)
    problems: list[Problem] = []
    for room in (data, rollout, engines, trainers, observe):
        problems += room.check(config)
    raise_if(problems)
    prompts = _load_prompts(config)
    num_prompts = len(prompts.prompts) if prompts is not None else None
    if num_prompts is not None:
        config = derive_num_rollout(config, num_prompts)
    return Prepared(config, prompts, Layout.of(config), budget_table(config, num_prompts=num_prompts))


def _load_prompts(config: Config) -> PromptData | None:
    """The training prompts, once those of the evaluations were found to be in order."""
    if config.debug.debug_train_only:
        return None
    flags = config.rollout
    assert flags.prompt_data is not None
    assert config.ckpt.hf_checkpoint is not None
    tokenizer = data.load_tokenizer(config.ckpt.hf_checkpoint)
    if job_of(config).rows != "prompts":
        rows = rollout.load_rows(config, tokenizer)
        rollout.load_eval_rows(config, tokenizer, rollout.channels_of(rows))
        return rows
    rollout.load_eval_prompts(config, tokenizer)  # the rollout manager reads them again; here it costs no process
    prompts = data.load_prompts(
        flags.prompt_data,
        input_key=flags.input_key,
        label_key=flags.label_key,
        metadata_key=flags.metadata_key,
        tool_key=flags.tool_key,
        apply_chat_template=flags.apply_chat_template,
        apply_chat_template_kwargs=flags.apply_chat_template_kwargs,
        tokenizer=tokenizer,
        max_prompt_len=flags.rollout_max_prompt_len,
        require_label=rollout.label_required(config),
        require_tokens=flags.custom_generate_function_path is None,
    )
    if not prompts.prompts:
        raise DataError(_no_prompts(flags.prompt_data, prompts.skipped, flags.rollout_max_prompt_len))
    return prompts


def _no_prompts(spec: str, too_long: int, limit: int | None) -> str:
    what = f"--prompt-data, got {spec}: "
    if too_long:
        return f"{what}all {too_long} prompts are longer than {limit} tokens; raise --rollout-max-prompt-len"
    return f"{what}there is no row in it; give a file, or a slice of one, that has rows"
