"""An endless, resumable stream of prompt groups.

    PromptData --seeded order of each epoch--> group of n PENDING samples --> rollout
                        buffer: groups that came back <--add_samples-- (fetched again before new ones)

The cursor is (epoch, position); an epoch's order is a function of (seed, epoch) alone, so the state is a few numbers and
the buffered groups.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from miles.errors import CheckpointError, DataError
from miles.types import Sample, SampleGroup, Status

from .prompts import Answer, Prompt, PromptData


def epoch_order(num_prompts: int, *, seed: int, epoch: int) -> np.ndarray:
    """Permutation of `range(num_prompts)` for one epoch, `[num_prompts]` int64.

    The order of the raw words of a Philox generator keyed by (seed, epoch): those words are specified, so a checkpoint
    continues the same under any numpy, which `Generator.permutation` does not promise.
    """
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(num_prompts)
    return np.argsort(words, kind="stable")


class RolloutDataSource:
    """The `DataSource` of training prompts. Every prompt comes exactly once an epoch, also across a resume.

    `group_index` numbers groups over the run, `index = group_index * n_samples_per_prompt + position` samples. Samples of a
    group share the prompt's tokens but may each be changed. Prompts with answers come as finished samples, one for each
    answer. Not thread-safe. Raises DataError without a prompt.
    """

    def __init__(self, prompts: PromptData, *, n_samples_per_prompt: int, shuffle: bool, seed: int) -> None:
        if not prompts.prompts:
            raise DataError(
                f"{prompts.path}, got no prompts ({prompts.skipped} were too long): there is nothing to sample; "
                "give rows, or raise --rollout-max-prompt-len"
            )
        if n_samples_per_prompt < 1:
            raise DataError(f"n_samples_per_prompt, got {n_samples_per_prompt}: a group has samples; give at least 1")
        self._prompts = prompts.prompts
        self._n = max([n_samples_per_prompt, *(len(prompt.answers) for prompt in prompts.prompts)])
        self._seed = seed
        self._shuffle = shuffle
        #: What the order and the numbering depend on: a state of another stream cannot be continued here.
        self._identity = {
            "fingerprint": prompts.fingerprint,
            "num_prompts": len(prompts.prompts),
            "n_samples_per_prompt": n_samples_per_prompt,
            "shuffle": shuffle,
            "seed": seed,
        }
        self._path = prompts.path
        self._next_group_index = 0
        self._buffer: deque[SampleGroup] = deque()
        self._seek(epoch=0, position=0)

    @property
    def num_buffered(self) -> int:
        """Groups that came back and wait to be fetched again."""
        return len(self._buffer)

    @property
    def epoch(self) -> int:
        """Complete passes over the prompts so far."""
        return self._epoch

    def get_samples(self, num_groups: int) -> list[SampleGroup]:
        """Next groups, buffered ones first; new ones have `n_samples_per_prompt` PENDING samples with prompt and tokens."""
        if num_groups < 0:
            raise ValueError(f"num_groups, got {num_groups}: a count cannot be negative")
        buffered = [self._buffer.popleft() for _ in range(min(num_groups, len(self._buffer)))]
        return buffered + [self._next_group() for _ in range(num_groups - len(buffered))]

    def add_samples(self, groups: list[SampleGroup]) -> None:
        """Gives groups back; they are fetched again before new ones, in the order given back."""
        self._buffer.extend(groups)

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready snapshot; what happens to the samples later does not change it."""
        return {
            "identity": dict(self._identity),
            "epoch": self._epoch,
            "position": self._position,
            "next_group_index": self._next_group_index,
            "buffer": [[copy.deepcopy(sample.to_dict()) for sample in group] for group in self._buffer],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where `state_dict` was taken. CheckpointError where data or settings are not the same."""
        for key, here in self._identity.items():
            if (saved := state["identity"].get(key)) != here:
                what = f"the prompts of {self._path}" if key in ("fingerprint", "num_prompts") else key
                raise CheckpointError(
                    f"{what}, got {here} where the checkpoint has {saved}: the run cannot be continued in the same order; "
                    "restore what it was, or start a new run from these weights"
                )
        self._next_group_index = state["next_group_index"]
        self._buffer = deque([Sample.from_dict(copy.deepcopy(data)) for data in group] for group in state["buffer"])
        self._seek(state["epoch"], state["position"])

    def _seek(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        num_prompts = len(self._prompts)
        self._order = (
            epoch_order(num_prompts, seed=self._seed, epoch=epoch) if self._shuffle else np.arange(num_prompts)
        )

    def _next_group(self) -> SampleGroup:
        prompt = self._prompts[self._order[self._position]]
        group_index = self._next_group_index
        self._next_group_index += 1
        self._position += 1
        if self._position == len(self._prompts):
            self._seek(self._epoch + 1, 0)
        first = group_index * self._n
        if prompt.answers:
            return [_answered(prompt, answer, group_index, first, i) for i, answer in enumerate(prompt.answers)]
        return [_sample(prompt, group_index, first + i) for i in range(self._n)]


def _answered(prompt: Prompt, answer: Answer, group_index: int, first: int, number: int) -> Sample:
    """A finished sample. Answers of one row are one trajectory, unless they are compared."""
    return dataclasses.replace(
        _sample(prompt, group_index, first + number),
        trajectory_id=first if answer.reward is None else None,
        reward=answer.reward,
        tokens=answer.tokens.tolist(),
        response=answer.text,
        response_length=len(answer.loss_mask),
        loss_mask=answer.loss_mask.tolist(),
        loss_scale=None if answer.loss_scale is None else answer.loss_scale.tolist(),
        status=Status.COMPLETED,
    )


def _sample(prompt: Prompt, group_index: int, index: int) -> Sample:
    """Containers are copied: hooks change samples, and must not change the prompt or each other's sample."""
    return Sample(
        group_index=group_index,
        index=index,
        prompt=prompt.prompt if isinstance(prompt.prompt, str) else copy.deepcopy(prompt.prompt),
        tokens=list(prompt.tokens),
        label=prompt.label if isinstance(prompt.label, str) else copy.deepcopy(prompt.label),
        metadata=copy.deepcopy(prompt.metadata) if prompt.metadata else {},
    )
