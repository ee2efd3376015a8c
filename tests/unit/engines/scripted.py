"""An HTTP server on a free port whose answers a test writes down beforehand; it keeps every request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

TOKEN = "secret-token"
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def reply(status: int = 200, body: Any = None) -> Answer:
    async def answer(_: web.Request) -> web.Response:
        data = body if isinstance(body, bytes) else orjson.dumps({} if body is None else body)
        return web.Response(status=status, body=data)

    return answer


def hang_up() -> Answer:
    """Takes the request and closes the connection without a word, as a process does that is killed."""

    async def answer(request: web.Request) -> web.Response:
        request.transport.abort()
        return web.Response()

    return answer


def stall(seconds: float, then: Answer | None = None) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return await (then or reply())(request)

    return answer


def held(gate: asyncio.Event) -> Answer:
    """Answers when the test opens the gate."""

    async def answer(request: web.Request) -> web.StreamResponse:
        await gate.wait()
        return await reply()(request)

    return answer


async def until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Returns once the condition holds; for what happens soon, but not at a known moment."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)


class ScriptedServer:
    """`async with ScriptedServer(...)`. Answers come from `script` in turn, then from `default`."""

    def __init__(self, *script: Answer, default: Answer | None = None, port: int = 0):
        self.script = list(script)
        self.default = default or reply()
        self.requests: list[tuple[str, str, Any]] = []
        self.tokens: list[str | None] = []
        self.running = self.most_running = 0
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> ScriptedServer:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        self.requests.append((request.method, request.path, orjson.loads(data) if data else None))
        self.tokens.append(request.headers.get("Authorization"))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await (self.script.pop(0) if self.script else self.default)(request)
        finally:
            self.running -= 1
