"""Preference data into rows to train on: two answers of which one is preferred, or an answer with a judgement.

    {prompt, chosen, rejected} --> Prompt with two answers, of rewards 1 and 0        (--loss-type dpo, orpo, simpo, cpo, rm)
    {prompt, completion, label} --> Prompt with one answer, of reward 1 or 0           (--loss-type kto)

Prompts and answers are texts or lists of messages. A pair may do without a prompt: then both answers are whole conversations,
or whole texts, and the prompt is what they begin with in common. How text becomes tokens is `conversations`' business.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import xxhash

from miles.errors import DataError
from miles.types import MARGIN

from .conversations import COMPLETION_KEY, AnswerReader, ConversationFormat, Message, fitting, read_messages
from .files import Row, read_rows, split_slice
from .prompts import Answer, Prompt, PromptData, add_to_digest, json_object, short

#: Columns of prompts where --input-key names no other one: the first that is there.
PROMPT_KEYS = ("prompt", "input")
CHOSEN_KEY, REJECTED_KEY, MARGIN_KEY = "chosen", "rejected", "margin"
#: Column of judgements where --label-key names no other one.
LABEL_KEY = "label"


def load_pairs(path: str, form: ConversationFormat, *, with_margins: bool = False) -> PromptData:
    """Loads `path` (JSONL or parquet, `path@[a:b]` for a slice): each row with its chosen and its rejected answer, in this order.

    with_margins: the column `margin`, a number, goes into the row's metadata as `MARGIN`. Rows that `form.overlong` drops, since one of their answers is
    too long, are counted as skipped. Raises DataError with file, line and reason for the first row that cannot be trained on.
    """
    return _load(path, form, _pair, with_margins=with_margins)


def load_judged(path: str, form: ConversationFormat, label_key: str | None = None) -> PromptData:
    """Likewise, each row with its one answer; `label_key` names a column of true and false, or of 1 and 0."""

    def read(reader: _PreferenceReader, row: Row, where: str) -> list[Answer]:
        key = label_key or LABEL_KEY
        label = row.values.get(key)
        if label not in (0, 1):  # False and True are
            raise DataError(
                f"{where}, got {short(label)} in {key!r}: an answer is good (true, 1) or bad (false, 0); mend the row, or name "
                "the column with --label-key"
            )
        return [dataclasses.replace(reader.answer(row, COMPLETION_KEY, where), reward=float(label))]

    return _load(path, form, read)


def _load(
    path: str,
    form: ConversationFormat,
    read: Callable[[_PreferenceReader, Row, str], list[Answer]],
    *,
    with_margins: bool = False,
) -> PromptData:
    file = split_slice(path)[0]
    reader = _PreferenceReader(form)
    kept: list[Prompt] = []
    skipped = 0
    digest = xxhash.xxh3_128()
    for row in read_rows(path):
        where = f"{file}:{row.line}"
        answers = read(reader, row, where)
        fit = tuple(fitting(answers, form, where))
        if len(fit) < len(answers):
            skipped += 1
            continue
        metadata = dict(json_object(row.values.get(form.metadata_key), form.metadata_key, where))
        metadata.pop(MARGIN, None)
        if with_margins and (margin := row.values.get(MARGIN_KEY)) is not None:
            metadata[MARGIN] = _number(margin, where)
        tokens = fit[0].tokens[: len(fit[0].tokens) - len(fit[0].loss_mask)].tolist()
        prompt = Prompt(str(form.tokenizer.decode(tokens)), tokens, None, metadata, row.line, fit)
        kept.append(prompt)
        add_to_digest(digest, prompt)
    return PromptData(path, tuple(kept), skipped, digest.hexdigest())


def _pair(reader: _PreferenceReader, row: Row, where: str) -> list[Answer]:
    chosen, rejected = reader.pair(row, where)
    return [dataclasses.replace(chosen, reward=1.0), dataclasses.replace(rejected, reward=0.0)]


class _PreferenceReader:
    """Rows to answers, by one format."""

    def __init__(self, form: ConversationFormat):
        self._form = form
        self._keys = PROMPT_KEYS if form.input_key is None else (form.input_key,)
        self._readers = {
            key: AnswerReader(dataclasses.replace(form, input_key=self._keys[0], completion_key=key))
            for key in (CHOSEN_KEY, REJECTED_KEY, COMPLETION_KEY)
        }

    def answer(self, row: Row, key: str, where: str) -> Answer:
        """What the column `key` answers to the row's prompt."""
        prompt_key = self._prompt_key(row)
        if prompt_key is None:
            raise self._no_prompt(row, where)
        asked, answer = row.values[prompt_key], _answer_in(row.values, key, where)
        if not isinstance(asked, str):
            asked = read_messages(asked, prompt_key, where, row.values)
        if isinstance(answer, list):
            answer = _without_prompt(asked, read_messages(answer, key, where, row.values), key, where)
        return self._one(row, asked, answer, key, where)

    def pair(self, row: Row, where: str) -> list[Answer]:
        """Chosen and rejected."""
        keys = (CHOSEN_KEY, REJECTED_KEY)
        if self._prompt_key(row) is not None:
            return [self.answer(row, key, where) for key in keys]
        if self._form.input_key is not None:
            raise self._no_prompt(row, where)
        both = [_answer_in(row.values, key, where) for key in keys]
        if all(isinstance(answer, str) for answer in both):
            if self._form.apply_chat_template:
                raise DataError(
                    f"{where}, got texts without a prompt: the chat template has nothing to ask with; add the column "
                    f"{self._keys[0]}, or leave --apply-chat-template out"
                )
            return self._readers[CHOSEN_KEY].answers_without_prompt(both, where)
        if not all(isinstance(answer, list) for answer in both):
            raise DataError(f"{where}, got a text and a list of messages: give chosen and rejected in one form")
        talks = [read_messages(answer, key, where, row.values) for answer, key in zip(both, keys, strict=True)]
        asked = _common_beginning(talks, where)
        return [self._one(row, asked, talk[len(asked) :], key, where) for key, talk in zip(keys, talks, strict=True)]

    def _prompt_key(self, row: Row) -> str | None:
        """Column of the prompt; None where the row has none."""
        return next((key for key in self._keys if row.values.get(key) is not None), None)

    def _no_prompt(self, row: Row, where: str) -> DataError:
        columns = short(sorted(row.values), 400)
        return DataError(
            f"{where}, got columns {columns}: no {self._keys[0]!r} among them; name the prompt column with --input-key"
        )

    def _one(self, row: Row, asked: Any, answer: Any, key: str, where: str) -> Answer:
        tool_key = self._form.tool_key
        values = {tool_key: row.values.get(tool_key), self._keys[0]: asked, key: answer}
        found = self._readers[key].answers(Row(row.line, values), where)
        if len(found) != 1:
            raise DataError(
                f"{where}, got {len(found)} turns in {key!r} that the chat template writes in another way once others follow: "
                "they are no one answer; give the last turn alone"
            )
        if found[0].loss_scale is not None:
            raise DataError(
                f"{where}, got a loss_scale in {key!r}: what is compared counts or does not; give 0 or 1, or leave it out"
            )
        return found[0]


def _without_prompt(asked: str | list[Message], answer: list[Message], key: str, where: str) -> list[Message]:
    """The answer alone where it is the whole conversation, prompt included. DataError where it asks something else."""
    prompt = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if answer[: len(prompt)] == prompt:
        if len(answer) > len(prompt):
            return answer[len(prompt) :]
        raise DataError(f"{where}, got the prompt alone in {key!r}: there is no answer; mend or drop the row")
    if any(message["role"] == "user" for message in answer):
        raise DataError(
            f"{where}, got a turn of the user in {key!r} that is not the prompt's: it would be asked twice, or otherwise; give "
            "the answer alone, or the prompt as it stands there"
        )
    return answer


def _answer_in(values: Mapping[str, Any], key: str, where: str) -> Any:
    if not values.get(key):
        raise DataError(f"{where}, got {short(values.get(key))} in {key!r}: there is no answer; mend or drop the row")
    return values[key]


def _common_beginning(both: Sequence[list[Message]], where: str) -> list[Message]:
    """The messages that two conversations begin with in common, up to the turn of the assistant in which they part."""
    chosen, rejected = both
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    if shared < 1:
        raise DataError(
            f"{where}, got conversations that begin differently: they answer different prompts; add the column prompt, or mend "
            "the row"
        )
    return chosen[:shared]


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{where}, got {short(value)} in {MARGIN_KEY!r}: a margin is a finite number; mend the row")
    return float(value)
