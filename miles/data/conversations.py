"""Conversations into rows to train on: which tokens are an answer's, and how much each message counts.

    messages, tools --chat template--> text --cut before and after each trained message--> pieces --tokenizer--> Answer
    prompt + completion --------------> the same, or plain text where no template is applied

Pieces are tokenized one by one: the tokens before an answer are those that an engine would be asked to continue, and the
answer's own are those that it would have to give. An answer ends with the tokenizer's end-of-sequence token where its piece
has one; what the template puts after it is no answer.

Templates with generation blocks say themselves what an answer is. Others are rendered up to each message. Where that is no
beginning of the whole conversation, since the template writes earlier turns in another way (Qwen3 leaves out their thoughts),
each trained message becomes a row of its own, after the history as a model would see it; those rows are one trajectory.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash

from miles.errors import DataError
from miles.types import CHANNEL

from .files import Row, read_rows, split_slice
from .prompts import Answer, Prompt, PromptData, add_to_digest, is_unicode, json_list, json_object, render, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
LossScale = Literal["assistant", "last_round", "all"]
Overlong = Literal["refuse", "drop", "truncate"]

#: Columns of conversations, or of prompts where a row has a completion, where no flag names another: the first that is there.
INPUT_KEYS = ("messages", "prompt", "input")
COMPLETION_KEY = "completion"

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class ConversationFormat:
    """How rows are read and turned into tokens."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int | None
    """Longest row; None is any."""
    overlong: Overlong = "refuse"
    loss_scale: LossScale = "assistant"
    input_key: str | None = None
    """Column of the messages, or of the prompt where a row has a completion; None: one of `INPUT_KEYS`."""
    completion_key: str | None = None
    """None is `completion`."""
    metadata_key: str = "metadata"
    tool_key: str = "tools"
    channel_key: str = "channel"
    apply_chat_template: bool = False
    """Of prompts and completions that are text."""
    template_kwargs: Mapping[str, Any] | None = None


def load_conversations(path: str, form: ConversationFormat) -> PromptData:
    """Loads `path` (JSONL or parquet, `path@[a:b]` for a slice), each row with its answers.

    Rows that `form.overlong` drops are counted as skipped. Raises DataError with file, line and reason for the first row that
    cannot be trained on.
    """
    file = split_slice(path)[0]
    reader = AnswerReader(form)
    kept: list[Prompt] = []
    skipped = 0
    digest = xxhash.xxh3_128()
    for row in read_rows(path):
        where = f"{file}:{row.line}"
        answers = tuple(fitting(reader.answers(row, where), form, where))
        if not answers:
            skipped += 1
            continue
        metadata = dict(json_object(row.values.get(form.metadata_key), form.metadata_key, where))
        metadata.pop(CHANNEL, None)
        if (channel := row.values.get(form.channel_key)) is not None:
            metadata[CHANNEL] = str(channel)
        tokens = answers[0].tokens[: len(answers[0].tokens) - len(answers[0].loss_mask)].tolist()
        prompt = Prompt(str(form.tokenizer.decode(tokens)), tokens, None, metadata, row.line, answers)
        kept.append(prompt)
        add_to_digest(digest, prompt)
    return PromptData(path, tuple(kept), skipped, digest.hexdigest())


def fitting(answers: Sequence[Answer], form: ConversationFormat, where: str) -> Iterator[Answer]:
    """The answers within the limit, by the policy for longer ones. An answer without a trained token left is dropped."""
    for answer in answers:
        length, limit = len(answer.tokens), form.max_tokens
        if limit is None or length <= limit:
            yield answer
        elif form.overlong == "refuse":
            raise DataError(
                f"{where}, got {length} tokens: --seq-length is {limit}; raise it, or say what becomes of such rows "
                "with --overlong-rows drop or truncate"
            )
        elif form.overlong == "truncate":
            rest = len(answer.loss_mask) - (length - limit)
            if rest > 0 and answer.loss_mask[:rest].any():
                scale = None if answer.loss_scale is None else answer.loss_scale[:rest]
                yield dataclasses.replace(
                    answer, tokens=answer.tokens[:limit], loss_mask=answer.loss_mask[:rest], loss_scale=scale
                )


@dataclass(frozen=True)
class _Piece:
    """A part of a rendered conversation."""

    text: str
    scale: float
    """0 is not trained on."""


class AnswerReader:
    """Rows to answers, by one format."""

    def __init__(self, form: ConversationFormat):
        self._form, self._tokenizer = form, form.tokenizer
        self._kwargs = dict(form.template_kwargs or {})
        template = form.tokenizer.chat_template
        self._marks_answers = isinstance(template, str) and bool(_GENERATION_BLOCK.search(template))
        self._check_pieces()

    def _check_pieces(self) -> None:
        """Some tokenizers begin every text with a space: a conversation must not depend on where it is cut."""
        first, second = (self._encode(text) for text in ("1", "2"))
        joined = self._tokenizer.decode([*first, *second])
        if joined != "12":
            raise DataError(
                f"tokenizer, got {joined!r} from '1' and '2' tokenized one by one: it adds text to each piece of a "
                "conversation, so answers cannot be told from prompts; use a byte-level tokenizer"
            )

    def _encode(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def answers(self, row: Row, where: str) -> list[Answer]:
        """What a row trains; several where the template writes history in another way. DataError where nothing is."""
        form = self._form
        tools = json_list(row.values.get(form.tool_key), form.tool_key, where)
        found = _conversation(row.values, form, where)
        if isinstance(found, tuple):
            prompt, completion = found
            end = self._tokenizer.eos_token
            if not isinstance(end, str):
                raise DataError(
                    f"{where}, got plain text: the tokenizer has no end-of-sequence token to close it with; add one"
                )
            runs = [[_Piece(prompt, 0.0), _Piece(completion + end, 1.0)]]
        else:
            scales = _scales(found, form.loss_scale, where)
            messages = [{k: v for k, v in m.items() if k not in ("loss", "loss_scale")} for m in found]
            if self._marks_answers and form.loss_scale != "all":
                self._check_asked(messages, scales, where)
                return [self._by_generation_blocks(messages, scales, tools, where)]
            runs = self._pieces(messages, scales, tools, where)
        return [self._answer(pieces, where) for pieces in runs]

    def answers_without_prompt(self, texts: Sequence[str], where: str) -> list[Answer]:
        """Plain texts that begin alike, as answers to that beginning. DataError where they do not."""
        end = self._tokenizer.eos_token
        for text in texts:
            _check_text(text, where)
        ids = [self._encode(text + (end if isinstance(end, str) else "")) for text in texts]
        shared = 0
        while all(shared < len(own) - 1 for own in ids) and len({own[shared] for own in ids}) == 1:
            shared += 1
        if not shared:
            raise DataError(
                f"{where}, got answers without a prompt that begin differently: nothing asked for them; add the column prompt"
            )
        return [self._of_tokens(own, [0.0] * shared + [1.0] * (len(own) - shared), where) for own in ids]

    def _render(self, messages: Sequence[Message], tools: Any, where: str, *, ask: bool = False) -> str:
        return render(self._tokenizer, list(messages), tools, {**self._kwargs, "add_generation_prompt": ask}, where)

    def _pieces(
        self, messages: Sequence[Message], scales: Sequence[float], tools: Any, where: str
    ) -> list[list[_Piece]]:
        """The conversation cut where training begins and ends; one list, or one for each trained message."""
        whole = self._render(messages, tools, where)
        pieces: list[_Piece] = []
        done = 0
        alone: list[list[_Piece]] = []
        is_whole = True
        for number in (i for i, scale in enumerate(scales) if scale):
            asks = messages[number]["role"] == "assistant"
            before = self._before(messages[:number], tools, where, ask=asks)
            until = self._render(messages[: number + 1], tools, where)
            if not until.startswith(before):
                raise DataError(
                    f"{where}, got message {number} ({messages[number]['role']}): the chat template does not render it after what "
                    "comes before it, so its tokens cannot be found; use a template with {% generation %} blocks"
                )
            alone.append([_Piece(before, 0.0), _Piece(until[len(before) :], scales[number])])
            is_whole = is_whole and whole.startswith(until) and len(before) >= done
            if is_whole:
                pieces += [
                    _Piece(whole[done : len(before)], 0.0),
                    _Piece(whole[len(before) : len(until)], scales[number]),
                ]
                done = len(until)
        return [pieces] if is_whole else alone

    def _before(self, messages: Sequence[Message], tools: Any, where: str, *, ask: bool) -> str:
        """What a trained message is said after."""
        if messages:
            return self._render(messages, tools, where, ask=ask)
        try:
            return self._render(messages, tools, where, ask=True) if ask else ""
        except DataError as error:  # many templates look at the first message
            raise DataError(
                f"{where}, got an answer as first message: the chat template cannot ask for one with nothing before it; begin "
                'with a message of the user or the system, or give it "loss": false'
            ) from error

    def _answer(self, pieces: Sequence[_Piece], where: str) -> Answer:
        tokens: list[int] = []
        scales: list[float] = []
        for piece in pieces:
            _check_text(piece.text, where)
            ids = self._encode(piece.text)
            tokens += ids
            scales += self._trained(ids) if piece.scale == 1 else [piece.scale * s for s in self._trained(ids)]
        return self._of_tokens(tokens, scales, where)

    def _trained(self, ids: Sequence[int]) -> list[float]:
        """1 up to the last end-of-sequence token; to the end where there is none."""
        end = self._tokenizer.eos_token_id
        last = max((i for i, token in enumerate(ids) if token == end), default=len(ids) - 1)
        return [1.0] * (last + 1) + [0.0] * (len(ids) - last - 1)

    def _by_generation_blocks(
        self, messages: Sequence[Message], scales: Sequence[float], tools: Any, where: str
    ) -> Answer:
        try:
            made: Any = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **self._kwargs,
            )
        except Exception as error:  # a template is code from the checkpoint
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{where}, got messages that the chat template refuses: {type(error).__name__}: {reason}; mend the row"
            ) from error
        tokens, mask = list(made["input_ids"]), np.array(made["assistant_masks"], dtype=np.int64)
        starts = np.flatnonzero(np.diff(np.concatenate([[0], mask])) == 1)
        of_answers = [scale for message, scale in zip(messages, scales, strict=True) if message["role"] == "assistant"]
        if len(starts) != len(of_answers):
            if len(set(of_answers)) > 1:
                raise DataError(
                    f"{where}, got {len(of_answers)} answers of which the template marks {len(starts)}: it is not known which "
                    "of them counts how much; leave loss and loss_scale out, or mend the template's generation blocks"
                )
            of_answers = of_answers[:1] * len(starts)
        scale = np.zeros(len(tokens))
        for start, value in zip(starts, of_answers, strict=True):
            stop = start + int(np.argmin(np.append(mask[start:], 0)))
            scale[start:stop] = value
        return self._of_tokens(tokens, scale.tolist(), where)

    def _check_asked(self, messages: Sequence[Message], scales: Sequence[float], where: str) -> None:
        for number, (message, scale) in enumerate(zip(messages, scales, strict=True)):
            if scale and message["role"] != "assistant":
                raise DataError(
                    f"{where}, got loss or loss_scale in message {number} ({message['role']}): the chat template marks answers of "
                    "the assistant alone; leave it out, or take a template without {% generation %} blocks"
                )

    def _of_tokens(self, tokens: Sequence[int], scales: Sequence[float], where: str) -> Answer:
        """From the first trained token to the last."""
        trained = np.flatnonzero(scales)
        # A first token has nothing to be predicted from.
        trained = trained[trained > 0]
        if not len(trained):
            raise DataError(
                f"{where}, got no token to train on: no message of the assistant in it counts; drop the row, or mend it"
            )
        first, end = int(trained[0]), int(trained[-1]) + 1
        scale = np.array(scales[first:end], dtype=np.float32)
        mask = (scale != 0).astype(np.uint8)
        return Answer(
            tokens=np.array(tokens[:end], dtype=np.int32),
            loss_mask=mask,
            loss_scale=None if (scale[mask == 1] == 1).all() else scale,
            text=str(self._tokenizer.decode(list(tokens[first:end]))),
        )


def _check_text(text: str, where: str) -> None:
    if not is_unicode(text):
        raise DataError(f"{where}, got {short(text)}: half of a surrogate pair is no character; mend the row")


def _conversation(values: dict[str, Any], form: ConversationFormat, where: str) -> list[Message] | tuple[str, str]:
    """Messages, or prompt and completion of plain text."""
    completion_key = form.completion_key or COMPLETION_KEY
    completion = values.get(completion_key)
    keys = INPUT_KEYS if form.input_key is None else (form.input_key,)
    key = next((key for key in keys if values.get(key) is not None), keys[0])
    given = values.get(key)
    if completion is None:
        if form.completion_key is not None:
            raise DataError(f"{where}, got no {completion_key!r}: the row has no answer; mend it or drop the row")
        return read_messages(given, key, where, values)
    if isinstance(given, str) and isinstance(completion, str) and not form.apply_chat_template:
        if not given or not completion:
            raise DataError(
                f"{where}, got an empty {key!r} or {completion_key!r}: there is nothing to learn; drop the row"
            )
        return given, completion
    asked = [{"role": "user", "content": given}] if isinstance(given, str) else read_messages(given, key, where, values)
    answer = (
        [{"role": "assistant", "content": completion}]
        if isinstance(completion, str)
        else read_messages(completion, completion_key, where, values)
    )
    # What is asked is not trained on, whoever said it.
    return [*({**message, "loss": False} for message in asked), *answer]


def read_messages(value: Any, key: str, where: str, values: Mapping[str, Any]) -> list[Message]:
    """The conversation in column `key`, without fields that are null. DataError where it is none."""
    if value is None:
        raise DataError(
            f"{where}, got columns {short(sorted(values), 400)}: no {key!r} among them; name the column of messages with --input-key"
        )
    if not (
        isinstance(value, list) and value and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
    ):
        raise DataError(
            f"{where}, got {short(value)} in {key!r}: a conversation is a list of messages "
            '{"role": ..., "content": ...}, and not empty; mend the row'
        )
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def _scales(messages: Sequence[Message], name: LossScale, where: str) -> list[float]:
    """How much each message counts, by --loss-scale and its own words."""
    last_question = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    scales = []
    for number, message in enumerate(messages):
        is_answer = message["role"] == "assistant"
        counts = name == "all" or (is_answer and (name == "assistant" or number > last_question))
        if not isinstance(message.get("loss", False), bool):
            raise DataError(
                f"{where}, got {short(message['loss'])} as loss of message {number}: it counts or it does not; give true or "
                "false, or a weight as loss_scale"
            )
        scale: Any = message.get("loss_scale", 1.0 if message.get("loss", counts) else 0.0)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not (0 <= scale < math.inf):
            raise DataError(
                f"{where}, got {short(scale)} as loss_scale of message {number}: it is no weight; give a number from 0 up"
            )
        scales.append(float(scale))
    return scales
