"""The teacher of distillation on engines that were started elsewhere: what it says of an answer, and its own answers.

    Sample (prompt and response) --POST /generate, no new token--> log-probs of the response, and the likeliest tokens beside them

Consumes finished samples, produces their `TeacherScores`. Waits for the teacher's engines, --teacher-timeout for a request and for
one of them to come back where none is left. Its weights are never touched, and nobody else's requests are ended.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from miles.config import Config
from miles.engines.client import EngineClient, Timeouts
from miles.engines.pool import EnginePool
from miles.errors import ConfigError, EngineError
from miles.types import Sample, TeacherScores

#: Where the key of the teacher's engines is looked for: it is on no command line and in no file.
KEY_VARIABLE = "MILES_TEACHER_API_KEY"

#: Rows that one engine scores, or answers, at a time.
_CONCURRENCY = 64

#: Tokens, spread over the vocabulary, that teacher and student must spell alike.
_PROBES = 16


class TeacherEngines:
    """One model on one engine or several. Lives in one event loop.

    Args:
        key: what the engines ask for, if they do.
    """

    def __init__(self, config: Config, tokenizer: Any, *, key: str | None = None):
        flags = config.gkd
        assert flags.teacher_urls is not None
        assert config.model.vocab_size is not None
        self._tokenizer, self._vocab_size = tokenizer, config.model.vocab_size
        self._top_k = min(flags.teacher_top_k, self._vocab_size) if config.grpo.loss_type == "gkd" else 0
        timeouts = Timeouts(generate_s=flags.teacher_timeout)
        self._clients = [
            EngineClient(f"teacher-{i}", url, key or "", timeouts=timeouts) for i, url in enumerate(flags.teacher_urls)
        ]
        self.pool = EnginePool(
            self._clients, _CONCURRENCY, recovery_limit_s=flags.teacher_timeout, whose="engines of --teacher-urls"
        )
        """Also answers prompts."""

    async def check(self) -> None:
        """Raises ConfigError where an engine cannot be reached, refuses the request, or has other tokens than the student."""
        last = min(len(self._tokenizer), self._vocab_size) - 1
        probes = sorted({round(i * last / (_PROBES - 1)) for i in range(_PROBES)})
        # The first of a request is not predicted.
        ids = [last, *probes]
        for client in self._clients:
            try:
                reply = await client.generate({**self._payload(ids, 0), "return_text_in_logprobs": True})
                self._read(reply, ids, len(probes))
            except EngineError as error:
                raise ConfigError(
                    f"--teacher-urls, got {client.url}: {error}; start a teacher there that has the student's tokens, or mend the "
                    f"address or its key ({KEY_VARIABLE})"
                ) from error
            for token, entry in zip(probes, reply["meta_info"]["input_token_logprobs"][-len(probes) :], strict=True):
                ours, theirs = self._tokenizer.decode([token]), entry[2]
                if theirs != ours:
                    raise ConfigError(
                        f"--teacher-urls, got {client.url}: token {token} is {theirs!r} there and {ours!r} here, and distributions are "
                        "compared token by token; take a teacher with the same tokenizer"
                    )

    async def score(self, sample: Sample) -> TeacherScores:
        """What the teacher says of the sample's response. Raises EngineError and WaitTimeout, as `EnginePool.generate`."""
        length = sample.response_length
        if not length:
            nothing = np.zeros((0, self._top_k))
            return TeacherScores(np.zeros(0, np.float32), nothing.astype(np.int32), nothing.astype(np.float32))
        tokens = list(sample.tokens)
        # The token before the response predicts its first one.
        payload = self._payload(tokens, max(len(tokens) - length - 1, 0))
        return self._read(await self.pool.generate(payload, num_samples=1), tokens, length)

    async def close(self) -> None:
        await self.pool.close()

    def _payload(self, tokens: Sequence[int], start: int) -> dict[str, Any]:
        payload = {
            "rid": f"teacher-{uuid.uuid4().hex}",
            "input_ids": list(tokens),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": start,
        }
        return {**payload, "top_logprobs_num": self._top_k} if self._top_k else payload

    def _read(self, reply: Any, tokens: Sequence[int], length: int) -> TeacherScores:
        """Of the last `length` of `tokens`. Raises EngineError where the reply does not hold them."""
        meta: Mapping[str, Any] = reply.get("meta_info") or {} if isinstance(reply, Mapping) else {}
        own = (meta.get("input_token_logprobs") or [])[-length:]
        if [entry[1] for entry in own] != list(tokens[-length:]) or any(entry[0] is None for entry in own):
            finish = meta.get("finish_reason")
            raise EngineError(
                f"teacher, got log-probs of {len(own)} tokens that are not the {length} it was asked about (it ended with {finish}): "
                "it does not tell log-probs of prompts; take an engine that serves logprob_start_len"
            )
        top = (meta.get("input_top_logprobs") or [])[-length:] if self._top_k else [[]] * length
        if len(top) != length or any(entries is None or len(entries) != self._top_k for entries in top):
            raise EngineError(
                f"teacher, got no {self._top_k} likeliest tokens at each of {length} positions: it was asked for them with "
                "top_logprobs_num; lower --teacher-top-k, or take an engine that serves it"
            )
        count = length * self._top_k
        shape = length, self._top_k
        ids = np.fromiter((entry[1] for entries in top for entry in entries), np.int32, count).reshape(shape)
        values = np.fromiter((entry[0] for entries in top for entry in entries), np.float32, count).reshape(shape)
        if count and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise EngineError(
                f"teacher, got token {ids.max()} among its likeliest: the student has {self._vocab_size} tokens; take a teacher with "
                "the same vocabulary, or lower --teacher-top-k"
            )
        return TeacherScores(np.array([entry[0] for entry in own], np.float32), ids, values)
