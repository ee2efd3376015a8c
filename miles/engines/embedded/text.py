"""Text in, text out: the checkpoint's tokenizer, and stop conditions that are texts.

Uses tokenizer.json through `tokenizers` directly: batches decode in Rust, and the engine starts without importing
transformers. A checkpoint without that file falls back to transformers' AutoTokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from miles.errors import CheckpointError

from .requests import RequestError, SamplingParams


class _Backend(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def decode_batch(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]: ...


class _FastBackend:
    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(file))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def decode_batch(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return list(self.tokenizer.decode_batch(rows, skip_special_tokens=skip_special_tokens))


class _TransformersBackend:
    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def decode_batch(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [self.tokenizer.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]


class Tokenizer:
    """Encodes prompts and decodes answers. Safe to call from several threads."""

    def __init__(self, directory: Path) -> None:
        """Raises `CheckpointError` where the directory holds no tokenizer."""
        self._backend: _Backend
        self._directory = directory
        self._chat: Any = None
        try:
            fast = directory / "tokenizer.json"
            self._backend = _FastBackend(fast) if fast.exists() else _TransformersBackend(directory)
        except Exception as error:
            raise CheckpointError(
                f"tokenizer of {directory}, got {type(error).__name__} ({str(error).splitlines()[0] if str(error) else ''}): "
                "it cannot be loaded; add tokenizer.json, or start with --skip-tokenizer-init"
            ) from error
        self.eos_token_id = self._find_eos(directory)

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer itself adds."""
        return self._backend.encode(text)

    def decode_batch(self, rows: Sequence[list[int]], *, skip_special_tokens: bool) -> list[str]:
        """One text per row of ids."""
        return self._backend.decode_batch(list(rows), skip_special_tokens) if rows else []

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        continues: bool,
        kwargs: dict[str, Any],
    ) -> list[int]:
        """Token ids of a conversation by the chat template, up to where the assistant is to speak, or within its last message
        where that `continues`. The first call imports transformers. Raises `RequestError`."""
        if self._chat is None:
            self._chat = _TransformersBackend(self._directory).tokenizer
        try:
            ids = self._chat.apply_chat_template(
                messages,
                tools=tools,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                tokenize=True,
                return_dict=False,
                **kwargs,
            )
        except Exception as error:  # a template is a program of the checkpoint's
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(f"messages, got some that the chat template refuses ({reason}): mend them") from error
        return [int(token) for token in ids]

    def _find_eos(self, directory: Path) -> int | None:
        if isinstance(self._backend, _TransformersBackend):
            eos = self._backend.tokenizer.eos_token_id
            return None if eos is None else int(eos)
        file = directory / "tokenizer_config.json"
        token = json.loads(file.read_text()).get("eos_token") if file.exists() else None
        if isinstance(token, dict):  # an AddedToken, as older files spell it
            token = token.get("content")
        assert isinstance(self._backend, _FastBackend)
        eos = None if token is None else self._backend.tokenizer.token_to_id(token)
        return None if eos is None else int(eos)


def tail_tokens(stop: Sequence[str]) -> int:
    """How many of the last tokens can hold the longest stop string: a character may be four byte-level tokens."""
    return 4 * max(map(len, stop)) + 1


def find_text_stops(
    tokenizer: Tokenizer, rows: Sequence[tuple[SamplingParams, list[int]]]
) -> list[str | re.Pattern[str] | None]:
    """Which stop string or pattern, if any, the last token of each row completed.

    Matching sees special tokens as text, whatever `skip_special_tokens` says of the reply.
    """
    windows = [ids if params.stop_regex else ids[-tail_tokens(params.stop) :] for params, ids in rows]
    texts = tokenizer.decode_batch(windows, skip_special_tokens=False)
    found: list[str | re.Pattern[str] | None] = []
    for (params, _), text in zip(rows, texts, strict=True):
        string = next((stop for stop in params.stop if stop in text), None)
        found.append(string or next((pattern for pattern in params.stop_regex if pattern.search(text)), None))
    return found


def trim_at_stop(text: str, stop: str | re.Pattern[str]) -> str:
    """`text` up to the first occurrence of what stopped it."""
    if isinstance(stop, str):
        return text.split(stop, 1)[0]
    match = stop.search(text)
    return text if match is None else text[: match.start()]
