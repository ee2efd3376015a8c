"""Who answers the rows of distillation: the data set itself, or the student or the teacher from the prompt alone.

    DataSource --row with its answers--> AnswerSource --as it is (COMPLETED)----------------> rollout
                                                      '-what comes before its last answer ---^
                                                        (PENDING: it is generated)

The draw depends on the seed and the row's group index alone, so neither timing nor a resume changes who answers what.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from miles.config import Config
from miles.data import PromptData
from miles.interfaces import DataSource
from miles.types import ANSWERED_BY, CHANNEL, Author, Sample, SampleGroup, Status

from .dataset import channels_of
from .seeds import sample_seed


def author_of(group_index: int, config: Config) -> Author:
    """The student with probability --gkd-lmbda."""
    drawn = sample_seed(config.rollout.rollout_seed, 0, group_index, 0, stream="answered by") / 2**63
    return Author.STUDENT if drawn < config.gkd.gkd_lmbda else _other_author(config)


def _other_author(config: Config) -> Author:
    return Author.TEACHER if config.gkd.gkd_seq_kd else Author.DATA


def training_channels(config: Config, prompts: PromptData) -> tuple[str, ...]:
    """By what the loss is reported: the channels of the rows, or else who answered them, where that is not always the data."""
    if channels := channels_of(prompts):
        return channels
    share = config.gkd.gkd_lmbda
    authors = [*([_other_author(config)] if share < 1 else []), *([Author.STUDENT] if share > 0 else [])]
    return () if authors == [Author.DATA] else tuple(authors)


class AnswerSource:
    """A `DataSource` whose state is that of `source`.

    decode: the text of tokens.
    """

    def __init__(self, source: DataSource, config: Config, decode: Callable[[Sequence[int]], str]):
        self._source, self._config, self._decode = source, config, decode

    def get_samples(self, num_groups: int) -> list[SampleGroup]:
        return [self._assigned(group) for group in self._source.get_samples(num_groups)]

    def add_samples(self, groups: list[SampleGroup]) -> None:
        self._source.add_samples(groups)

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._source.load_state_dict(state)

    def _assigned(self, group: SampleGroup) -> SampleGroup:
        if ANSWERED_BY in group[0].metadata:  # it came back
            return group
        index = group[0].group_index
        assert index is not None
        author = author_of(index, self._config)
        if author is not Author.DATA:
            group = [_asked(group, self._decode)]
        for sample in group:
            sample.metadata[ANSWERED_BY] = author
            sample.metadata.setdefault(CHANNEL, author)
        return group


def _asked(group: SampleGroup, decode: Callable[[Sequence[int]], str]) -> Sample:
    """What comes before the last answer of the row, to be answered anew."""
    last = group[-1]
    mask = last.loss_mask or [1] * last.response_length
    end = len(mask) - mask[::-1].index(1)
    start = next((i for i in range(end - 1, -1, -1) if not mask[i]), -1) + 1
    tokens = last.tokens[: last.prompt_length + start]
    return dataclasses.replace(
        group[0],
        trajectory_id=None,
        prompt=decode(tokens),
        tokens=tokens,
        response="",
        response_length=0,
        loss_mask=None,
        loss_scale=None,
        status=Status.PENDING,
    )


def author_metrics(groups: Sequence[SampleGroup]) -> dict[str, float]:
    """`student_ratio` and `teacher_ratio`: the shares of rows that they answered."""
    authors = [group[0].metadata[ANSWERED_BY] for group in groups]
    return {
        "rollout/student_ratio": authors.count(Author.STUDENT) / len(authors),
        "rollout/teacher_ratio": authors.count(Author.TEACHER) / len(authors),
    }
