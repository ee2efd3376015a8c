"""The HTTP side: routes, token, status codes. Everything that touches a tensor happens in the scheduler's decode thread.

    GET  /health (no token)  /health_generate  /model_info  /server_info  /v1/models
    POST /generate  /v1/completions  /v1/chat/completions  /abort_request  /pause_generation  /continue_generation  /flush_cache
    POST /update_weights_from_tensor  /update_weight_version  /weights_checker

A request that is wrong is answered with 400 and one line, a failure of ours with 500 and one line; neither harms the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import orjson
from aiohttp import web

from miles.errors import EngineError, MilesError, UserError, WeightUpdateError

from .model_config import ModelConfig
from .openai_api import Question, chunk, parse_chat, parse_completion, usage_chunk
from .openai_api import reply as openai_reply
from .options import EngineOptions
from .replies import build_reply, final_texts, row_reply
from .requests import Job, Limits, RequestError, parse_generate
from .scheduler import PauseMode, Scheduler
from .segment import TensorSpec
from .stream import EventStream, Growing, GrowingText, follow, so_far
from .text import Tokenizer

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_BODY_BYTES = 1 << 30
MAX_MESSAGE_CHARS = 1000
#: /health_generate answers 503 after this.
HEALTH_GENERATE_LIMIT_S = 20.0
#: Longest wait of /flush_cache that a client may ask for.
FLUSH_LIMIT_S = 3600.0


@dataclass(frozen=True)
class EngineInfo:
    """What does not change while the engine runs."""

    options: EngineOptions
    config: ModelConfig
    limits: Limits
    device: str
    dtype: str
    num_parameter_bytes: int


class EngineServer:
    """Maps HTTP to the scheduler. One instance serves one engine."""

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer | None, info: EngineInfo, token: str) -> None:
        self._scheduler, self._tokenizer, self._info = scheduler, tokenizer, info
        self._authorization = f"Bearer {token}".encode()

    def application(self) -> web.Application:
        """The aiohttp application with all routes."""
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        get, post = app.router.add_get, app.router.add_post
        get("/health", self.health)
        get("/health_generate", self.health_generate)
        for path in ("/model_info", "/get_model_info"):
            get(path, self.model_info)
        for path in ("/server_info", "/get_server_info"):
            get(path, self.server_info)
        get("/v1/models", self.models)
        post("/generate", self.generate)
        post("/v1/completions", self.completions)
        post("/v1/chat/completions", self.chat_completions)
        post("/abort_request", self.abort_request)
        post("/pause_generation", self.pause_generation)
        post("/continue_generation", self.continue_generation)
        app.router.add_route("*", "/flush_cache", self.flush_cache)
        post("/update_weights_from_tensor", self.update_weights_from_tensor)
        post("/update_weight_version", self.update_weight_version)
        post("/weights_checker", self.weights_checker)
        return app

    # ------------------------------------------------------------------------------------------------------ routes

    async def health(self, request: web.Request) -> web.StreamResponse:
        if not self._scheduler.alive:
            raise _Status(503, "the decode thread has ended; restart the engine")
        return web.Response()

    async def health_generate(self, request: web.Request) -> web.StreamResponse:
        """Makes one token, the way a client would."""
        stats = await self._on_decode_thread(self._scheduler.stats)
        if stats["paused"]:
            raise _Status(503, "the engine is paused; POST /continue_generation")
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        future = self._scheduler.submit(parse_generate(body, self._info.limits))
        try:
            await asyncio.wait_for(asyncio.wrap_future(future), HEALTH_GENERATE_LIMIT_S)
        except TimeoutError:
            raise _Status(503, f"no token within {HEALTH_GENERATE_LIMIT_S:g} s; the engine is overloaded") from None
        return web.Response()

    async def generate(self, request: web.Request) -> web.StreamResponse:
        began = time.perf_counter()
        job = parse_generate(await _json(request), self._info.limits)
        if not job.stream:
            await self._finish(job)
            return _response(build_reply(job, self._tokenizer, time.perf_counter() - began))

        def reply(growing: Growing, text: str, since: int, added: str) -> dict[str, Any]:
            made = row_reply(so_far(growing), text, self._tokenizer, time.perf_counter() - began)
            return {**made, **({"index": growing.number} if job.as_list else {})}

        return await self._stream(request, job, reply)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        question = parse_completion(await _json(request), self._name)
        return await self._answer(request, question)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        body, tokenizer = await _json(request), self._texts
        question = await asyncio.to_thread(parse_chat, body, self._name, tokenizer.render_chat)
        return await self._answer(request, question)

    async def _answer(self, request: web.Request, question: Question) -> web.StreamResponse:
        """OpenAI's two endpoints, once their bodies are read."""
        job, tokenizer = parse_generate(question.generate, self._info.limits), self._texts
        if not question.stream:
            await self._finish(job)
            return _response(openai_reply(question, job, tokenizer))

        def reply(growing: Growing, text: str, since: int, added: str) -> dict[str, Any] | None:
            if not (added or growing.ended or question.log_probs):
                return None
            return chunk(question, growing.number, so_far(growing), added, tokenizer, since=since)

        last = (lambda: usage_chunk(question, job)) if question.include_usage else None
        return await self._stream(request, job, reply, last)

    async def _finish(self, job: Job) -> None:
        """Submits the job and waits for all of it."""
        future = self._scheduler.submit(job)
        try:
            await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            # The client has gone: nobody reads what these rows would still make.
            self._scheduler.run(lambda: self._scheduler.abort(lambda row: row.job is job, "the client disconnected"))
            raise

    async def _stream(
        self,
        request: web.Request,
        job: Job,
        reply: Callable[[Growing, str, int, str], dict[str, Any] | None],
        last: Callable[[], dict[str, Any]] | None = None,
    ) -> web.StreamResponse:
        """Submits the job and sends its rows as they grow.

        `reply(growing, text, since, added)` is an event, or None for nothing to say yet: the row with its text, and the number of
        tokens and the piece of text that are new since its last event. `last` is one more at the end.
        """
        events, tokenizer = EventStream(request), self._tokenizer
        texts = {} if tokenizer is None else {row: GrowingText(tokenizer, row.params) for row in job.rows}
        sent = dict.fromkeys(job.rows, (0, ""))
        try:
            async with contextlib.aclosing(follow(self._scheduler, job)) as grown:
                async for rows in grown:
                    for growing in rows:
                        row, (since, before) = growing.row, sent[growing.row]
                        if growing.ended:
                            text = final_texts([row], tokenizer)[0]
                        else:
                            text = texts[row].of(growing.tokens) if texts else ""
                        added = text[len(before) :]
                        if (event := reply(growing, text, since, added)) is not None:
                            await events.send(event)
                            sent[row] = len(growing.tokens), text
            if last is not None:
                await events.send(last())
        except EngineError as error:
            await events.send(_failure_body(500, str(error)))
        return await events.end()

    async def abort_request(self, request: web.Request) -> web.StreamResponse:
        """Unknown ids are not an error: the request may just have finished."""
        body = await _object(request)
        rid, everything = body.get("rid"), body.get("abort_all", False)
        if everything is not True and not isinstance(rid, str):
            raise RequestError(f"rid, got {rid!r}: send the request's rid, or abort_all: true")
        aborted = await self._on_decode_thread(
            lambda: self._scheduler.abort(
                lambda row: everything is True or rid in (row.rid, row.job.rid), "aborted by /abort_request"
            )
        )
        return _success(f"{aborted} rows aborted")

    async def pause_generation(self, request: web.Request) -> web.StreamResponse:
        mode = (await _object(request)).get("mode", "abort")
        if mode not in get_args(PauseMode):
            raise RequestError(f"mode, got {mode!r}: unknown; use {', '.join(get_args(PauseMode))}")
        await self._on_decode_thread(lambda: self._scheduler.pause(mode))
        return _success("paused")

    async def continue_generation(self, request: web.Request) -> web.StreamResponse:
        await self._on_decode_thread(self._scheduler.resume)
        return _success("serving")

    async def flush_cache(self, request: web.Request) -> web.StreamResponse:
        """Waits up to `timeout` seconds for the engine to fall idle."""
        raw = request.query.get("timeout", "0")
        try:
            limit_s = float(raw)
        except ValueError:
            raise RequestError(f"timeout, got {raw!r}: not a number of seconds; send one") from None
        if not 0 <= limit_s <= FLUSH_LIMIT_S:
            raise RequestError(f"timeout, got {raw!r}: out of range; give 0 to {FLUSH_LIMIT_S:g} seconds")
        until = time.monotonic() + limit_s
        while not await self._on_decode_thread(self._scheduler.flush_cache):
            if time.monotonic() >= until:
                raise RequestError("flush_cache, got an engine with requests running or waiting: nothing flushed; wait")
            await asyncio.sleep(0.02)
        return _success("flushed")

    async def update_weights_from_tensor(self, request: web.Request) -> web.StreamResponse:
        body = await _object(request)
        if body.get("serialized_named_tensors") is not None:
            raise RequestError(
                "serialized_named_tensors, got a pickled payload: unpickling runs the sender's code, so it is refused; "
                "send load_format miles_shm with segment and tensors"
            )
        if body.get("load_format") != "miles_shm":
            raise RequestError(f"load_format, got {body.get('load_format')!r}: only miles_shm is served; send that")
        known = {
            "load_format",
            "segment",
            "progress",
            "adopt",
            "samples",
            "tensors",
            "weight_version",
            "continue_generation",
            "flush_cache",
            "serialized_named_tensors",
        }
        if unknown := sorted(set(body) - known):
            raise RequestError(f"field, got {unknown[0]!r}: unknown to update_weights_from_tensor; leave it out")
        raw, segment, version = body.get("tensors"), body.get("segment"), body.get("weight_version")
        if not isinstance(raw, list) or not isinstance(segment, str):
            raise RequestError(
                "tensors, got no list or no segment: send segment and tensors [{name, dtype, shape, offset}]"
            )
        if version is not None and not isinstance(version, str):
            raise RequestError(f"weight_version, got {version!r}: not a string; send a string")
        progress, samples = body.get("progress"), body.get("samples")
        for field, place in (("progress", progress), ("samples", samples)):
            if place is not None and (type(place) is not int or place < 0 or place % 8):
                raise RequestError(f"{field}, got {place!r}: not a multiple of 8 bytes within the segment; align it")
        serial = body.get("adopt")
        if serial is not None and (type(serial) is not int or progress is None):
            raise RequestError(
                f"adopt, got {serial!r}: not a serial number behind progress; send both, or leave it out to have the "
                "segment copied"
            )
        resume = body.get("continue_generation", False)
        if not isinstance(resume, bool) or (resume and version is None):
            raise RequestError(
                f"continue_generation, got {resume!r}: send true together with weight_version, or leave it out"
            )

        specs = [TensorSpec.parse(item) for item in raw]
        checksums = await self._on_decode_thread(
            lambda: self._scheduler.load_bucket(segment, specs, version, progress, serial, samples, resume=resume)
        )
        kept = serial is not None and self._scheduler.weights.can_adopt
        return _success("loaded", checksums=checksums, kept=kept, sampled=samples is not None, serving=resume)

    async def update_weight_version(self, request: web.Request) -> web.StreamResponse:
        body = await _object(request)
        version = body.get("new_version")
        if not isinstance(version, str) or not version:
            raise RequestError(f"new_version, got {version!r}: not a non-empty string; send the version")
        resume = body.get("continue_generation", False)
        if not isinstance(resume, bool):
            raise RequestError(f"continue_generation, got {resume!r}: send true or false")
        if unknown := sorted(set(body) - {"new_version", "abort_all_requests", "continue_generation"}):
            raise RequestError(f"field, got {unknown[0]!r}: unknown to update_weight_version; leave it out")
        if body.get("abort_all_requests"):
            raise RequestError("abort_all_requests, got true: not served; POST /abort_request {abort_all: true} first")

        def set_version() -> None:
            self._scheduler.set_version(version)
            if resume:
                self._scheduler.resume()

        await self._on_decode_thread(set_version)
        return _success("version set", new_version=version, serving=resume)

    async def weights_checker(self, request: web.Request) -> web.StreamResponse:
        action = (await _object(request)).get("action")
        if action != "checksum":
            raise RequestError(f"action, got {action!r}: only checksum is served; send that")
        checksums = await self._on_decode_thread(self._scheduler.weights.checksums)
        return _success("checksummed", checksums=[{name: value} for name, value in checksums.items()])

    async def model_info(self, request: web.Request) -> web.StreamResponse:
        config, options = self._info.config, self._info.options
        version = await self._on_decode_thread(lambda: self._scheduler.weights.version)
        return _response(
            {
                "model_path": options.model_path,
                "tokenizer_path": None if self._tokenizer is None else options.model_path,
                "is_generation": True,
                "weight_version": version,
                "model_type": config.model_type,
                "architectures": config.architectures,
                "vocab_size": config.vocab_size,
                "max_context_length": self._info.limits.context_length,
                "engine": "miles-embedded",
            }
        )

    async def server_info(self, request: web.Request) -> web.StreamResponse:
        options = {name: value for name, value in asdict(self._info.options).items() if name != "api_key"}
        state = await self._on_decode_thread(self._scheduler.stats)
        limits = self._info.limits
        return _response(
            {
                **options,
                "max_running_requests": self._scheduler.limits.max_running_requests,
                "engine": "miles-embedded",
                "device": self._info.device,
                "dtype": self._info.dtype,
                "context_length": limits.context_length,
                "max_total_num_tokens": limits.max_total_tokens,
                "parameter_bytes": self._info.num_parameter_bytes,
                "internal_states": [state],
                "weight_version": state["weight_version"],
            }
        )

    async def models(self, request: web.Request) -> web.StreamResponse:
        card = {
            "id": self._name,
            "object": "model",
            "owned_by": "miles",
            "max_model_len": self._info.limits.context_length,
        }
        return _response({"object": "list", "data": [card]})

    # ------------------------------------------------------------------------------------------------------ shared

    @property
    def _name(self) -> str:
        return self._info.options.served_model_name or self._info.options.model_path

    @property
    def _texts(self) -> Tokenizer:
        if self._tokenizer is None:
            raise RequestError(
                "text, got a request: the engine has no tokenizer (--skip-tokenizer-init); use /generate"
            )
        return self._tokenizer

    async def _on_decode_thread(self, function: Callable[[], Any]) -> Any:
        if not self._scheduler.alive:
            raise _Status(503, "the decode thread has ended; restart the engine")
        return await asyncio.wrap_future(self._scheduler.run(function))

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Token first, then every error as one JSON line."""
        if request.path != "/health" or request.method != "GET":
            given = request.headers.get("Authorization", "").encode()
            if not hmac.compare_digest(given, self._authorization):
                return _failure(401, "the engine's token is missing or wrong; send Authorization: Bearer TOKEN")
        try:
            return await handler(request)
        except _Status as error:
            return _failure(error.status, str(error))
        except (UserError, WeightUpdateError) as error:
            return _failure(400, str(error))
        except MilesError as error:
            return _failure(500, str(error))
        except web.HTTPNotFound:
            paths = sorted({route.resource.canonical for route in request.app.router.routes() if route.resource})
            return _failure(404, f"{request.path} is not served by the embedded engine; it serves {' '.join(paths)}")
        except web.HTTPException as error:
            return _failure(error.status, f"{request.method} {request.path}: {error.reason}")
        except Exception as error:
            logger.exception("%s %s", request.method, request.path)
            return _failure(500, f"{type(error).__name__}: {error}")


class _Status(Exception):
    """An answer with a status of its own."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


async def _json(request: web.Request) -> Any:
    try:
        raw = await request.read()
    except web.RequestPayloadError as error:
        reason = " ".join(str(error).split())
        raise RequestError(
            f"body, got one that cannot be read ({reason}): send plain JSON of the stated length"
        ) from error
    try:
        return orjson.loads(raw) if raw else {}
    except orjson.JSONDecodeError as error:
        raise RequestError(f"body, got {len(raw)} bytes that are not JSON ({error}): send a JSON object") from error


async def _object(request: web.Request) -> Mapping[str, Any]:
    body = await _json(request)
    if not isinstance(body, Mapping):
        raise RequestError(f"body, got {type(body).__name__}: not a JSON object; send one")
    return body


def _response(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def _success(message: str, **more: Any) -> web.Response:
    return _response({"success": True, "message": message, **more})


def _failure(status: int, message: str) -> web.Response:
    return _response(_failure_body(status, message), status)


def _failure_body(status: int, message: str) -> dict[str, Any]:
    """Both shapes that SGLang's clients look for: `message` (control) and `error.message` (generation, OpenAI)."""
    line = " ".join(message.split())
    if len(line) > MAX_MESSAGE_CHARS:  # the sender's own words, given back
        line = f"{line[: MAX_MESSAGE_CHARS // 2]} ... {line[-MAX_MESSAGE_CHARS // 2 :]}"
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"success": False, "message": line, "error": {"message": line, "type": kind, "param": None, "code": status}}
