"""Answers while they are made: the rows of a job as they grow, and their text as far as it is certain.

decode thread --(row, token, log-prob)--> follow --[Growing]--> GrowingText --> what has been added to the text
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from aiohttp import web

from .requests import Job, Row, SamplingParams, Token
from .scheduler import Scheduler
from .text import Tokenizer

#: What a decoder writes for bytes that are no whole character, yet.
_BROKEN = "\ufffd"


@dataclass(eq=False)
class Growing:
    """One row, as far as it is."""

    number: int
    """Which row of the job."""
    row: Row
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended: bool = False
    """The row's own fields are filled in and will not change."""


async def follow(scheduler: Scheduler, job: Job) -> AsyncGenerator[Sequence[Growing], None]:
    """Submits the job and yields the rows that have grown or ended since the last time, until all have ended.

    Raises `EngineError` where generation fails. Whoever stops reading before the end aborts the job's rows.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[list[Token] | None] = asyncio.Queue()

    def pass_on(tokens: list[Token] | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            loop.call_soon_threadsafe(events.put_nowait, tokens)

    job.listener = pass_on
    future = scheduler.submit(job)
    future.add_done_callback(lambda _: pass_on(None))
    rows = {row: Growing(number, row) for number, row in enumerate(job.rows)}
    is_over = False
    try:
        while not is_over:
            grown: dict[Growing, None] = {}
            tokens = await events.get()
            while tokens is not None:
                for token in tokens:
                    _take(rows[token.row], token)
                    grown[rows[token.row]] = None
                if events.empty():
                    break
                tokens = events.get_nowait()
            is_over = tokens is None
            if is_over:
                future.result()
            if grown:
                yield list(grown)
    finally:
        if not is_over:
            scheduler.run(lambda: scheduler.abort(lambda row: row.job is job, "the client disconnected"))


def _take(growing: Growing, token: Token) -> None:
    if token.id is None:
        row = growing.row
        assert row.output_ids is not None
        assert row.output_log_probs is not None
        growing.tokens, growing.log_probs = row.output_ids.tolist(), row.output_log_probs.tolist()
        growing.ended = True
    else:
        growing.tokens.append(token.id)
        growing.log_probs.append(token.log_prob)


class GrowingText:
    """The text of a growing answer: in whole characters, and never more than the finished answer will have.

    The end of the text that may be the beginning of a stop string is held back; a stop pattern may match anywhere, so that with
    one the text comes at the end.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self._tokenizer, self._params = tokenizer, params
        self._decoded = ""
        # Tokens before `_from` are decoded for good; those up to `_to` are decoded again, since what follows them may need them.
        self._from = self._to = 0

    def of(self, tokens: Sequence[int]) -> str:
        """The certain text of all tokens so far."""
        window = [list(tokens[self._from : self._to]), list(tokens[self._from :])]
        known, text = self._tokenizer.decode_batch(window, skip_special_tokens=self._params.skip_special_tokens)
        if len(text) > len(known) and not text.endswith(_BROKEN):
            self._decoded += text[len(known) :]
            self._from, self._to = self._to, len(tokens)
        if self._params.stop_regex:
            return ""
        return self._decoded[: len(self._decoded) - _held_back(self._decoded, self._params.stop)]


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    return max(
        (size for stop in stops for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])),
        default=0,
    )


def so_far(growing: Growing) -> Row:
    """The row as a reply wants it, with what there is; `finish_reason` None where it goes on."""
    if growing.ended:
        return growing.row
    return dataclasses.replace(
        growing.row,
        output_ids=np.array(growing.tokens, np.int64),
        output_log_probs=np.array(growing.log_probs, np.float32),
        output_top=growing.row.output_top[: len(growing.tokens)],
        versions=list(growing.row.versions),
        finish_reason=None,  # the decode thread may be ahead of what was read
    )


class EventStream:
    """Server-sent events, which end with `[DONE]`."""

    def __init__(self, request: web.Request):
        self._request = request
        self._response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        )

    async def send(self, value: Any) -> None:
        if not self._response.prepared:
            await self._response.prepare(self._request)
        await self._response.write(b"data: " + orjson.dumps(value) + b"\n\n")

    async def end(self) -> web.StreamResponse:
        if not self._response.prepared:
            await self._response.prepare(self._request)
        await self._response.write(b"data: [DONE]\n\n")
        await self._response.write_eof()
        return self._response
