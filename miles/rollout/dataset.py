"""Rollouts of jobs that train on rows which are there already: the next ones of the data set, finished.

RolloutDataSource (prompts with answers) --SampleGroup (COMPLETED)--> RolloutOutput
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles.config import EvalDataset, eval_datasets, job_of
from miles.data import ConversationFormat, PromptData, RolloutDataSource, load_conversations, load_judged, load_pairs
from miles.errors import DataError
from miles.types import RolloutOutput, SampleGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from miles.config import Config
    from miles.interfaces import DataSource

#: Default of --input-key, which says where prompts are. A data set's column is looked for unless another one is named.
_ANY_KEY = "input"


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
    path = config.rollout.prompt_data
    assert path is not None, "checked at launch"
    return _load("--prompt-data", path, config, tokenizer, config.rollout.input_key, config.rollout.label_key)


def load_eval_rows(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[tuple[EvalDataset, list[SampleGroup]]]:
    """Each evaluation data set with its rows as finished samples, in order. Raises `DataError`."""
    found = []
    for dataset in eval_datasets(config):
        what = f"evaluation {dataset.name}"
        data = _load(what, dataset.path, config, tokenizer, dataset.input_key, dataset.label_key)
        source = RolloutDataSource(data, n_samples_per_prompt=1, shuffle=False, seed=0)
        found.append((dataset, source.get_samples(len(data.prompts))))
    return found


def _load(
    what: str, path: str, config: Config, tokenizer: PreTrainedTokenizerBase, input_key: str, label_key: str | None
) -> PromptData:
    kind = job_of(config).rows
    flags, sft = config.rollout, config.sft
    form = ConversationFormat(
        tokenizer,
        max_tokens=config.model.seq_length,
        overlong=sft.overlong_rows,
        loss_scale=sft.loss_scale,
        input_key=None if input_key == _ANY_KEY else input_key,
        completion_key=label_key if kind == "conversations" else None,
        metadata_key=flags.metadata_key,
        tool_key=flags.tool_key,
        channel_key=sft.channel_key,
        apply_chat_template=flags.apply_chat_template,
        template_kwargs=flags.apply_chat_template_kwargs,
    )
    if kind == "pairs":
        data = load_pairs(path, form)
    elif kind == "judged":
        data = load_judged(path, form, label_key)
    else:
        data = load_conversations(path, form)
    if not data.prompts:
        why = f"all {data.skipped} rows are longer than --seq-length" if data.skipped else "there is no row in it"
        raise DataError(f"{what}, got {path}: {why}; give a file, or a slice of one, with rows that fit")
    return data


def channels_of(data: PromptData) -> tuple[str, ...]:
    """Names of the channels of all rows, sorted; none where no row has one. DataError where only some have."""
    names = [prompt.metadata.get("channel") for prompt in data.prompts]
    found = tuple(sorted({name for name in names if name is not None}))
    if found and None in names:
        line = data.prompts[names.index(None)].line
        raise DataError(f"{data.path}:{line}, got no channel where other rows have one; name it, such as {found[0]}")
    return found
