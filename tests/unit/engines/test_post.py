"""`miles.utils.http_utils` for hooks: the token goes to the run's engines alone, and generation through the pool."""

from __future__ import annotations

import asyncio

import pytest

from miles.engines.client import EngineClient
from miles.engines.pool import EnginePool
from miles.errors import EngineError, EngineRequestError, EngineUnreachable
from miles.utils.http_utils import get, post

from .scripted import TOKEN, ScriptedServer, reply, stall


async def test_engines_get_the_token_and_generation_goes_through_the_pool():
    async with ScriptedServer(default=reply(200, {"text": "x"})) as engine, ScriptedServer() as stranger:
        pool = EnginePool([EngineClient("engine-0", engine.url, TOKEN)], 1)
        assert await post(f"{engine.url}/generate", {"text": "a"}) == {"text": "x"}
        assert await post(f"{engine.url}/flush_cache", {}) == {"text": "x"}
        assert await get(f"{engine.url}/model_info", headers={"X-Mine": "1"}) == {"text": "x"}
        assert await post(f"{stranger.url}/generate", {"text": "a"}) == {}
        assert engine.tokens == [f"Bearer {TOKEN}"] * 3
        assert stranger.tokens == [None]
        assert [method for method, *_ in engine.requests] == ["POST", "POST", "GET"]

        engine.default = stall(0.05)
        await asyncio.gather(*(post(f"{engine.url}/generate", {"text": "a"}) for _ in range(3)))
        assert engine.most_running == 1  # the pool's limit

        await pool.close()
        await post(f"{engine.url}/generate", {})
        assert engine.tokens[-1] is None


async def test_strangers_failures():
    async with ScriptedServer(reply(503), default=reply(200, b"plain text")) as server:
        assert await post(server.url, {}, max_retries=1) == "plain text"
        server.script = [reply(503)] * 2
        with pytest.raises(EngineUnreachable, match="HTTP 503"):
            await post(server.url, {}, max_retries=0)
        server.script, server.requests = [reply(404, b"no such page")], []
        with pytest.raises(EngineRequestError, match=f"POST {server.url}, got HTTP 404: no such page"):
            await post(server.url, {})
        assert len(server.requests) == 1
        server.script = [reply(302)]
        with pytest.raises(EngineError, match="HTTP 302"):
            await post(server.url, {})
