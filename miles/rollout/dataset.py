"""Rollouts of jobs that train on rows which are there already: the next ones of the data set, finished.

RolloutDataSource (prompts with answers) --SampleGroup (COMPLETED)--> RolloutOutput
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from miles.config import EvalDataset, eval_datasets, job_of
from miles.data import ConversationFormat, PromptData, RolloutDataSource, load_conversations, load_judged, load_pairs
from miles.data.files import split_slice
from miles.errors import DataError
from miles.types import CHANNEL, RolloutOutput, SampleGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from miles.config import Config
    from miles.config.groups import RolloutArgs
    from miles.interfaces import DataSource


class DatasetRollout:
    """Training rollouts without engines."""

    def __init__(self, source: DataSource, *, num_groups: int):
        self._source, self._num_groups = source, num_groups

    async def generate(self, rollout_id: int) -> RolloutOutput:
        """The next rows."""
        return RolloutOutput(groups=self._source.get_samples(self._num_groups))


def load_rows(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptData:
    """The rows of --prompt-data with their answers. Raises `DataError` for a row that cannot be trained on, and where there
    is none."""
    flags = config.rollout
    assert flags.prompt_data is not None, "checked at launch"
    return _load("--prompt-data", flags.prompt_data, config, tokenizer, flags)


def load_eval_rows(
    config: Config, tokenizer: PreTrainedTokenizerBase, channels: Sequence[str] = ()
) -> list[tuple[EvalDataset, list[SampleGroup]]]:
    """Each evaluation data set with its rows as finished samples, in order.

    channels: those of the training data, by which these rows are reported too. Raises `DataError`, also for a row of none.
    """
    found = []
    for dataset in eval_datasets(config):
        data = _load(f"evaluation {dataset.name}", dataset.path, config, tokenizer, dataset)
        for prompt in data.prompts if channels else ():
            if (channel := prompt.metadata.get(CHANNEL)) not in channels:
                raise DataError(
                    f"{split_slice(dataset.path)[0]}:{prompt.line}, got {'no channel' if channel is None else f'channel {channel}'}: "
                    f"rows of --prompt-data are of {', '.join(channels)}; name one of them in every row"
                )
        source = RolloutDataSource(data, n_samples_per_prompt=1, shuffle=False, seed=0)
        found.append((dataset, source.get_samples(len(data.prompts))))
    return found


def _load(
    what: str, path: str, config: Config, tokenizer: PreTrainedTokenizerBase, columns: RolloutArgs | EvalDataset
) -> PromptData:
    kind, sft = job_of(config).rows, config.sft
    form = ConversationFormat(
        tokenizer,
        max_tokens=config.model.seq_length,
        overlong=sft.overlong_rows,
        loss_scale=sft.loss_scale,
        input_key=columns.input_key,
        completion_key=columns.label_key if kind == "conversations" else None,
        metadata_key=columns.metadata_key,
        tool_key=columns.tool_key,
        channel_key=sft.channel_key,
        apply_chat_template=columns.apply_chat_template,
        template_kwargs=config.rollout.apply_chat_template_kwargs,
    )
    if kind == "pairs":
        data = load_pairs(path, form, with_margins=config.grpo.loss_type == "rm")
    elif kind == "judged":
        data = load_judged(path, form, columns.label_key)
    else:
        data = load_conversations(path, form)
    if not data.prompts:
        why = f"all {data.skipped} rows are longer than --seq-length" if data.skipped else "there is no row in it"
        raise DataError(f"{what}, got {path}: {why}; give a file, or a slice of one, with rows that fit")
    return data


def channels_of(data: PromptData) -> tuple[str, ...]:
    """Names of the channels of all rows, sorted; none where no row has one. DataError where only some have."""
    names = [prompt.metadata.get(CHANNEL) for prompt in data.prompts]
    found = tuple(sorted({name for name in names if name is not None}))
    if found and None in names:
        line = data.prompts[names.index(None)].line
        raise DataError(
            f"{split_slice(data.path)[0]}:{line}, got no channel where other rows have one; name it, such as {found[0]}"
        )
    return found
