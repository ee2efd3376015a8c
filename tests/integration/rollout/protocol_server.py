"""An HTTP server that speaks the engine protocol as far as a rollout needs it, with scripted answers.

It tokenizes by character, so that texts in tests can be read: token id = its place in ALPHABET.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ALPHABET = "0123456789+-*=:?\n abcdefghijklmnopqrstuvwxyz"
END = len(ALPHABET)

Answer = Callable[[str, dict[str, Any]], str]
"""`answer(text so far, sampling_params) -> text`; a trailing "$" is the end token."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {c: i for i, c in enumerate(ALPHABET)} | {"<|end|>": END}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def _decode(ids: list[int]) -> str:
    return "".join(ALPHABET[i] if i < END else "$" for i in ids)


class ProtocolServer:
    def __init__(self, answer: Answer):
        self._answer = answer
        self.requests: list[dict[str, Any]] = []
        self.url = ""

    async def generate(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer token"
        body = await request.json()
        self.requests.append(body)
        if isinstance(body["input_ids"][0], int):
            return web.json_response(self._one(body["input_ids"], body["sampling_params"], body["rid"]))
        rows = zip(body["input_ids"], body["sampling_params"], body["rid"], strict=True)
        return web.json_response([self._one(*row) for row in rows])

    def _one(self, ids: list[int], params: dict[str, Any], rid: str) -> dict[str, Any]:
        text = self._answer(_decode(ids), params)
        out = [END if c == "$" else ALPHABET.index(c) for c in text][: params["max_new_tokens"]]
        stopped = out[-1] == END or any(text.endswith(s) for s in params.get("stop", []))
        kind = {"type": "stop"} if stopped else {"type": "length", "length": len(out)}
        meta = {
            "id": rid,
            "finish_reason": kind,
            "output_token_logprobs": [[-0.01 * i, i, None] for i in out],
            "weight_version": "0",
        }
        return {"text": _decode(out).removesuffix("$"), "output_ids": out, "meta_info": meta}

    async def ok(self, request: web.Request) -> web.Response:
        return web.json_response({"success": True})


@contextlib.asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[ProtocolServer]:
    server = ProtocolServer(answer)
    app = web.Application()
    app.router.add_post("/generate", server.generate)
    app.router.add_post("/abort_request", server.ok)
    app.router.add_get("/health", server.ok)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


def write_prompts(path: Path, rows: list[dict[str, Any]]) -> str:
    import orjson

    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return str(path)
