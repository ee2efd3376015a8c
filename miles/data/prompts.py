"""Prompt files into prompts: checked, rendered through the chat template and tokenized once, before any process starts.

file --read_rows--> columns (input, label, metadata, tools) --chat template--> text --tokenizer--> Prompt
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from miles.errors import ConfigError, DataError

from .files import Row, read_rows, split_slice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Texts that go to the tokenizer in one call; its threads share them.
TOKENIZE_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is there already, as one row to train on. Legend: `T` tokens of prompt and response, `R` of the response."""

    tokens: np.ndarray
    """[T] int32. The response is the last R of them."""
    loss_mask: np.ndarray
    """[R] uint8"""
    loss_scale: np.ndarray | None
    """[R] float32; None is 1 everywhere."""
    text: str
    """Of the response."""
    reward: float | None = None
    """1 or 0: preferred or not, or judged good or bad. Such answers are trajectories of their own."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, ready to be sampled from, or a row of a data set with its answers."""

    prompt: str | list[dict[str, Any]]
    """Text after the chat template, or the messages themselves when no template is applied."""
    tokens: list[int]
    """Of that text, without tokens that are not in it (no BOS is added); empty for messages without a template."""
    label: Any
    metadata: dict[str, Any]
    line: int
    """In the file, from 1."""
    answers: tuple[Answer, ...] = ()
    """Of a row that is trained on as it is; they are rows of one trajectory. Empty where engines answer."""


@dataclass(frozen=True)
class PromptData:
    """A prompt file as loaded. Picklable."""

    path: str
    prompts: tuple[Prompt, ...]
    skipped: int
    """Prompts longer than the limit."""
    fingerprint: str
    """Changes with any prompt, token, label, metadata or with their order; a resumed run compares it."""


def load_prompts(
    path: str,
    *,
    input_key: str | None = None,
    label_key: str | None = None,
    metadata_key: str = "metadata",
    tool_key: str = "tools",
    apply_chat_template: bool = False,
    apply_chat_template_kwargs: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_len: int | None = None,
    require_label: Callable[[dict[str, Any]], bool] | bool = False,
    require_tokens: bool = True,
) -> PromptData:
    """Loads `path` (JSONL or parquet, `path@[a:b]` for a slice).

    input_key names a column of text or of messages, `input` where it is None; with `apply_chat_template` text becomes one user message and messages
    are rendered, with the row's tools and `apply_chat_template_kwargs`, ready for the assistant's turn. metadata_key and
    tool_key are used where a row has them, as objects or as their JSON text. max_prompt_len (tokens) drops longer prompts.
    require_label says, given a row's metadata, whether its reward needs a label; its ConfigError is told of the row.
    require_tokens=False admits messages
    without a template, for generation hooks that render them.

    Raises DataError with file, line and reason for the first row that breaks these rules.
    """
    input_key = input_key or "input"
    file = split_slice(path)[0]
    needs_label = require_label if callable(require_label) else lambda metadata: bool(require_label)
    template_kwargs = {"add_generation_prompt": True, **(apply_chat_template_kwargs or {})}

    def prepare(row: Row) -> Prompt:
        """The row without its tokens."""
        where = f"{file}:{row.line}"
        prompt = read_prompt(row.values, input_key, where)
        metadata = json_object(row.values.get(metadata_key), metadata_key, where)
        try:
            required = needs_label(metadata)
        except ConfigError as error:  # what a row asks for is the row's mistake
            raise DataError(f"{where}, {error}") from error
        label = _label(row.values, label_key, where, required=required)
        if apply_chat_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            tools = json_list(row.values.get(tool_key), tool_key, where)
            prompt = render(tokenizer, messages, tools, template_kwargs, where)
        elif require_tokens and not isinstance(prompt, str):
            raise DataError(
                f"{where}, got messages in {input_key!r}: without a chat template they have no tokens; "
                "add --apply-chat-template, or a generation hook that renders them"
            )
        if isinstance(prompt, str) and not is_unicode(prompt):
            raise DataError(f"{where}, got {short(prompt)}: half of a surrogate pair is no character; mend the row")
        return Prompt(prompt, [], label, metadata, row.line)

    kept: list[Prompt] = []
    skipped = 0
    digest = xxhash.xxh3_128()
    for batch in _batched(map(prepare, read_rows(path)), TOKENIZE_BATCH):
        texts = [p.prompt for p in batch if isinstance(p.prompt, str)]
        encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        for prompt in batch:
            if isinstance(prompt.prompt, str):
                prompt.tokens.extend(next(encoded))
                if not prompt.tokens:
                    raise DataError(
                        f"{file}:{prompt.line}, got {prompt.prompt!r}: the prompt has no tokens; drop the row"
                    )
            if max_prompt_len is not None and len(prompt.tokens) > max_prompt_len:
                skipped += 1
                continue
            kept.append(prompt)
            add_to_digest(digest, prompt)
    return PromptData(path, tuple(kept), skipped, digest.hexdigest())


def is_unicode(text: str) -> bool:
    """JSON can say \\ud800 alone; no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _batched(items: Iterator[Prompt], size: int) -> Iterator[list[Prompt]]:
    while batch := list(islice(items, size)):
        yield batch


def read_prompt(values: dict[str, Any], key: str, where: str) -> str | list[dict[str, Any]]:
    if values.get(key) is None:
        raise DataError(
            f"{where}, got columns {short(sorted(values), 400)}: no {key!r} among them; name the prompt column with --input-key"
        )
    value = values[key]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        return [{k: v for k, v in message.items() if v is not None} for message in value]
    raise DataError(
        f"{where}, got {short(value)} in {key!r}: a prompt is a text or a list of messages "
        '{"role": ..., "content": ...}, and not empty; mend the row'
    )


def _label(values: dict[str, Any], key: str | None, where: str, *, required: bool) -> Any:
    label = values.get(key) if key is not None else None
    if required and (label is None or (isinstance(label, str) and not label.strip())):
        if key is None:
            raise DataError(f"{where}, got no label: the row's reward needs one; name its column with --label-key")
        raise DataError(
            f"{where}, got {label!r} in {key!r}: the row's reward needs a label; fill it in or drop the row"
        )
    return label


def json_object(value: Any, key: str, where: str) -> dict[str, Any]:
    value = _json_text(value, key, where)
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    raise DataError(f"{where}, got {short(value)} in {key!r}: metadata is an object; write {{...}} or leave it out")


def json_list(value: Any, key: str, where: str) -> list[Any] | None:
    value = _json_text(value, key, where)
    if value is None or isinstance(value, list):
        return value or None
    raise DataError(f"{where}, got {short(value)} in {key!r}: tools are a list of specs; write [...] or leave it out")


def _json_text(value: Any, key: str, where: str) -> Any:
    """A nested column may be kept as JSON text, as parquet files with free-form columns do."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}, got {short(value)} in {key!r}: its text is not JSON ({error}); mend the row"
        ) from error


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    kwargs: Mapping[str, Any],
    where: str,
) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs))
    # A template is code from the checkpoint: what it raises on a row it does not expect is not in our hands.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{where}, got messages that the chat template refuses: {type(error).__name__}: {reason}; "
            "mend the row or --apply-chat-template-kwargs"
        ) from error


def add_to_digest(digest: xxhash.xxh3_128, prompt: Prompt) -> None:
    rest = json.dumps([prompt.prompt, prompt.label, prompt.metadata], sort_keys=True, default=str)
    # Lengths first, so that no two sequences of prompts give the same bytes.
    digest.update(array("q", [len(prompt.tokens), len(rest), *prompt.tokens]).tobytes())
    digest.update(rest.encode())
    for answer in prompt.answers:
        scale = b"" if answer.loss_scale is None else answer.loss_scale.tobytes()
        digest.update(array("q", [len(answer.tokens), len(answer.loss_mask), len(scale)]).tobytes())
        digest.update(answer.tokens.tobytes() + answer.loss_mask.tobytes() + scale + repr(answer.reward).encode())


def short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
