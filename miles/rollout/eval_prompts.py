"""The prompts of every evaluation data set: read before any process starts to find what is wrong, and where they are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miles.config import eval_datasets
from miles.data.prompts import Prompt, load_prompts
from miles.errors import DataError

from .preflight import dataset_label_required

if TYPE_CHECKING:
    from miles.config import Config, EvalDataset


def load_eval_prompts(config: Config, tokenizer: Any) -> list[tuple[EvalDataset, Sequence[Prompt]]]:
    """Each data set with its prompts, in order. `tokenizer` is the checkpoint's.

    Raises `DataError` for a row that is broken or lacks a label that its reward needs, and for a file without prompts.
    """
    return [(dataset, _load(dataset, config, tokenizer)) for dataset in eval_datasets(config)]


def _load(dataset: EvalDataset, config: Config, tokenizer: Any) -> Sequence[Prompt]:
    data = load_prompts(
        dataset.path,
        input_key=dataset.input_key,
        label_key=dataset.label_key,
        metadata_key=dataset.metadata_key,
        tool_key=dataset.tool_key,
        apply_chat_template=dataset.apply_chat_template,
        apply_chat_template_kwargs=config.rollout.apply_chat_template_kwargs,
        tokenizer=tokenizer,
        max_prompt_len=dataset.max_prompt_len,
        require_label=dataset_label_required(config, dataset),
        require_tokens=config.rollout.custom_generate_function_path is None,
    )
    if not data.prompts:
        raise DataError(
            f"evaluation {dataset.name}, got no prompt from {dataset.path} ({data.skipped} too long): "
            "give a file with prompts, or raise max_prompt_len"
        )
    return data.prompts
