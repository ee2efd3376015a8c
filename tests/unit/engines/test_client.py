"""The client's rules: what is repeated and what never, limits that hold, errors that say who and what."""

from __future__ import annotations

import asyncio
import random
import socket
import time

import numpy as np
import pytest
from aiohttp import web

from miles.engines.client import MAX_TRIES, EngineClient, Timeouts
from miles.errors import (
    EngineError,
    EngineRequestError,
    EngineTimeout,
    EngineUnreachable,
    WaitTimeout,
    WeightUpdateError,
)
from miles.interfaces import Engine

from .scripted import TOKEN, ScriptedServer, hang_up, reply, stall, until


def client_of(server: ScriptedServer, **timeouts: float) -> EngineClient:
    return EngineClient("engine-3", server.url, TOKEN, timeouts=Timeouts(**timeouts))


async def test_generate_sends_token_and_payload_and_returns_the_reply():
    answer = {"text": "4", "output_ids": [7], "meta_info": {"weight_version": "2"}}
    async with ScriptedServer(reply(200, answer)) as server, client_of(server) as client:
        payload = {"input_ids": np.array([1, 2]), "sampling_params": {"logit_bias": {5: -1.0}}}
        assert await client.generate(payload) == answer
        assert server.requests == [
            ("POST", "/generate", {"input_ids": [1, 2], "sampling_params": {"logit_bias": {"5": -1.0}}})
        ]
        assert server.tokens == [f"Bearer {TOKEN}"]


async def test_control_calls_speak_the_protocol():
    async with ScriptedServer() as server, client_of(server) as client:
        engine: Engine = client
        server.default = reply(200, {"success": True, "weight_version": "5", "checksums": [{"w": "ab"}, {"v": "cd"}]})
        await engine.health()
        await engine.pause()
        await engine.update_weights({"load_format": "miles_shm"})
        assert await engine.checksums() == {"w": "ab", "v": "cd"}
        await engine.serve("5")
        assert await engine.version() == "5"
        await engine.resume()
        await client.abort("r1")
        await client.abort()
        assert server.requests == [
            ("GET", "/health", None),
            ("POST", "/pause_generation", {"mode": "abort"}),
            ("POST", "/update_weights_from_tensor", {"load_format": "miles_shm"}),
            ("POST", "/weights_checker", {"action": "checksum"}),
            (
                "POST",
                "/update_weight_version",
                {"new_version": "5", "continue_generation": True, "abort_all_requests": False},
            ),
            ("POST", "/continue_generation", {}),
            ("GET", "/model_info", None),
            ("POST", "/continue_generation", {}),
            ("POST", "/abort_request", {"rid": "r1"}),
            ("POST", "/abort_request", {"abort_all": True}),
        ]


async def test_an_engine_that_continues_with_the_version_is_not_asked_twice():
    async with ScriptedServer(reply(200, {"success": True, "serving": True})) as server, client_of(server) as client:
        await client.serve("5")
        assert [path for _, path, _ in server.requests] == ["/update_weight_version"]


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429])
async def test_a_4xx_is_never_repeated(status):
    async with ScriptedServer(default=reply(status, {"error": {"message": "no such field: n\nmore"}})) as server:
        async with client_of(server) as client:
            with pytest.raises(EngineRequestError) as caught:
                await client.generate({})
        assert str(caught.value) == f"engine engine-3: POST /generate, got HTTP {status}: no such field: n"
        assert len(server.requests) == 1


async def test_a_500_is_never_repeated_and_shows_the_first_line_of_its_text():
    async with (
        ScriptedServer(default=reply(500, b"RuntimeError: boom\nTraceback")) as server,
        client_of(server) as client,
    ):
        with pytest.raises(
            EngineError, match=r"^engine engine-3: POST /generate, got HTTP 500: RuntimeError: boom$"
        ) as caught:
            await client.generate({})
        assert not isinstance(caught.value, (EngineRequestError, EngineUnreachable))
        assert len(server.requests) == 1


@pytest.mark.parametrize("failure", [reply(502), reply(503), reply(504), hang_up()])
async def test_what_may_pass_is_repeated_and_given_up_in_the_end(failure):
    before = random.getstate()
    async with (
        ScriptedServer(failure, failure, default=reply(200, {"text": "x"})) as server,
        client_of(server) as client,
    ):
        assert await client.generate({"rid": "a"}) == {"text": "x"}
        assert [body for *_, body in server.requests] == [{"rid": "a"}] * 3
        server.default = failure
        server.requests.clear()
        with pytest.raises(EngineUnreachable, match="engine engine-3: POST /generate"):
            await client.generate({})
        assert len(server.requests) == MAX_TRIES
    assert random.getstate() == before, "a trainer's random stream is part of its checkpoints"


async def test_a_refused_connection_is_repeated_until_the_engine_is_up(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with EngineClient("engine-3", f"http://127.0.0.1:{port}", TOKEN) as client:
        with pytest.raises(EngineUnreachable, match=f"engine engine-3: GET /health at http://127.0.0.1:{port}"):
            await client.health()
        monkeypatch.setattr("miles.engines.client.MAX_TRIES", 1000)
        waiting = asyncio.create_task(client.health())
        await asyncio.sleep(0.1)
        assert not waiting.done()
        async with ScriptedServer(port=port) as late:
            await waiting
            assert len(late.requests) == 1


async def test_the_limit_covers_all_tries_and_the_error_says_who_what_and_since_when():
    async with ScriptedServer(reply(503), default=stall(30)) as server, client_of(server, generate_s=0.4) as client:
        begin = time.monotonic()
        with pytest.raises(EngineTimeout) as caught:
            await client.generate({"rid": "group-12"})
        assert time.monotonic() - begin < 10
        assert str(caught.value).startswith(
            "engine engine-3: POST /generate for group-12, got no answer within 0.4 s (asked at "
        )
        assert isinstance(caught.value, WaitTimeout)
        assert isinstance(caught.value, EngineError)
        await until(lambda: server.requests[-1] == ("POST", "/abort_request", {"rid": "group-12"}))


@pytest.mark.parametrize(
    ("call", "limit"),
    [("health", "health_s"), ("pause", "control_s"), ("model_info", "control_s"), ("checksums", "control_s")],
)
async def test_every_call_is_bounded(call, limit):
    async with ScriptedServer(default=stall(30)) as server, client_of(server, **{limit: 0.1}) as client:
        with pytest.raises(EngineTimeout):
            await getattr(client, call)()
        with pytest.raises(WeightUpdateError, match=r"within 0\.1 s"):
            await client_of(server, update_s=0.1).update_weights({})


async def test_a_cancelled_generation_is_aborted_on_the_engine():
    async with ScriptedServer(stall(30)) as server, client_of(server) as client:
        task = asyncio.create_task(client.generate({"rid": ["a", "b"]}))
        await until(lambda: len(server.requests) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: len(server.requests) == 3)
        assert sorted(body["rid"] for _, path, body in server.requests if path == "/abort_request") == ["a", "b"]


async def test_failures_with_status_200_are_failures():
    answers = [
        (lambda c: c.serve("3"), reply(200, {"success": False, "message": "tensors are missing: a.b"}), "a.b"),
        (lambda c: c.generate({}), reply(200, b"<html>"), "not JSON: <html>"),
        (lambda c: c.checksums(), reply(200, {"checksums": [{"w": "a"}, {"w": "b"}]}), "several checksums of w"),
        (lambda c: c.checksums(), reply(200, {}), "no checksums"),
    ]
    for call, answer, text in answers:
        async with ScriptedServer(answer) as server, client_of(server) as client:
            with pytest.raises(EngineError, match=text):
                await call(client)
    refusal = reply(400, {"success": False, "message": "wrong shape"})
    async with ScriptedServer(refusal) as server, client_of(server) as client:
        with pytest.raises(WeightUpdateError, match=r"update_weights_from_tensor, got HTTP 400: wrong shape"):
            await client.update_weights({})


async def test_a_redirect_is_not_followed_with_the_token():
    async with ScriptedServer() as elsewhere:

        async def redirect(_: web.Request) -> web.Response:
            return web.Response(status=307, headers={"Location": f"{elsewhere.url}/generate"})

        async with ScriptedServer(redirect) as server, client_of(server) as client:
            with pytest.raises(EngineError, match="HTTP 307"):
                await client.generate({})
        assert not elsewhere.requests


def test_two_event_loops_one_after_another():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    client = EngineClient("engine-3", f"http://127.0.0.1:{port}", TOKEN)
    assert TOKEN not in repr(client)

    async def use(*, close: bool) -> None:
        async with ScriptedServer(port=port):
            await client.health()
            if close:
                await client.close()

    asyncio.run(use(close=True))
    asyncio.run(use(close=False))
    with pytest.raises(RuntimeError, match="second event loop"):
        asyncio.run(use(close=True))
    # The first loop is gone, and nobody else may close what is left of it.
    client._session.detach()
