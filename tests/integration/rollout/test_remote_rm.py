"""remote_rm against a real HTTP service that misbehaves on request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from miles.config import args_view, make_config
from miles.rollout.rewards import remote
from miles.rollout.rewards.scorer import RewardSource, Scorer
from miles.types import Sample, Status


class Service:
    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.failures = 0
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        match body["response"]:
            case "flaky" if self.failures < 2:
                self.failures += 1
                return web.Response(status=503, text="overloaded")
            case "down":
                return web.Response(status=500, text="bug")
            case "refuse":
                return web.Response(status=422, text="no such field")
            case "slow":
                await asyncio.sleep(5)
            case "words":
                return web.Response(text='"very good"')
            case "dict":
                return web.json_response({"score": 0.5})
        return web.json_response(len(body["response"]))


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    service = Service()
    app = web.Application()
    app.router.add_post("/", service.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    service.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    yield service
    await remote.close()
    await runner.cleanup()


async def ask(service: Service, response: str, *, url: str | None = None, **flags: Any) -> Any:
    config = make_config(rm_type="remote_rm", rm_url=url or service.url, **flags)
    sample = Sample(index=0, prompt="p", response=response, label=4, metadata={"a": 1}, status=Status.COMPLETED)
    source = RewardSource("remote_rm", reward_key=config.rollout.reward_key)
    await Scorer(args_view(config), None).score([sample], [0], source)
    return sample.error if sample.status is Status.FAILED else sample.reward


async def test_what_is_sent_and_what_comes_back(service: Service) -> None:
    assert await ask(service, "four") == 4.0
    assert service.requests == [{"prompt": "p", "response": "four", "label": 4, "metadata": {"a": 1}}]
    assert await ask(service, "dict", reward_key="score") == {"score": 0.5}


async def test_5xx_is_repeated_and_4xx_never(service: Service) -> None:
    assert await ask(service, "flaky", rm_max_retries=2) == 5.0
    assert len(service.requests) == 3
    assert "got HTTP 500: bug" in await ask(service, "down", rm_max_retries=1)
    assert len(service.requests) == 5
    assert "got HTTP 422: no such field" in await ask(service, "refuse", rm_max_retries=5)
    assert len(service.requests) == 6


async def test_slow_wrong_and_absent_services_fail_the_sample(service: Service) -> None:
    assert f"{service.url}, got no answer within --rm-timeout 0.2 s" in await ask(service, "slow", rm_timeout=0.2)
    assert "it must answer a JSON number or object" in await ask(service, "words")
    assert "ConnectError" in await ask(service, "x", url="http://127.0.0.1:9/", rm_max_retries=1)
