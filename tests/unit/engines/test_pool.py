"""The pool: places are never exceeded nor lost, requests go where there is room, and on when an engine dies."""

from __future__ import annotations

import asyncio
import contextlib
import random

import numpy as np
import pytest

from miles.engines.client import EngineClient, Timeouts
from miles.engines.pool import EnginePool, count_samples
from miles.errors import EngineError, EngineRequestError, EngineTimeout, EngineUnreachable, WaitTimeout

from .scripted import TOKEN, ScriptedServer, hang_up, held, reply, stall, until


@contextlib.asynccontextmanager
async def pool_of(*servers: ScriptedServer, concurrency: int = 4, **options):
    async with contextlib.AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server)
        clients = [EngineClient(f"engine-{i}", s.url, TOKEN, timeouts=Timeouts()) for i, s in enumerate(servers)]
        pool = EnginePool(clients, concurrency, **options)
        stack.push_async_callback(pool.close)
        yield pool


def samples(n: int) -> dict:
    return {"input_ids": [[1]] * n, "rid": [f"r{i}" for i in range(n)]}


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"text": "a"}, 1),
        ({"text": ["a", "b"]}, 2),
        ({"input_ids": [1, 2, 3]}, 1),
        ({"input_ids": np.array([1, 2, 3])}, 1),
        ({"input_ids": [[1], [2, 3]]}, 2),
        ({"input_ids": np.zeros((3, 2), int)}, 3),
        ({"input_ids": [[1], [2]], "sampling_params": {"n": 4}}, 8),
        ({"input_ids": [[1], [2]], "sampling_params": [{"n": 4}, {}]}, 5),
        ({"text": "a", "sampling_params": {"n": None}}, 1),
    ],
)
def test_samples_of_a_payload(payload, expected):
    assert count_samples(payload) == expected


async def test_places_are_kept_and_engines_share_the_load():
    gate = asyncio.Event()
    servers = [ScriptedServer(default=held(gate)) for _ in range(2)]
    async with pool_of(*servers, concurrency=3) as pool:
        work = [asyncio.create_task(pool.generate({"text": "x"})) for _ in range(24)]
        await until(lambda: sum(s.running for s in servers) == 6)
        assert pool.stats().in_flight == {"engine-0": 3, "engine-1": 3}
        assert pool.stats().queued == 18
        gate.set()
        await asyncio.gather(*work)
        assert [s.most_running for s in servers] == [3, 3]
        assert sum(len(s.requests) for s in servers) == 24
        assert pool.stats().in_flight == {"engine-0": 0, "engine-1": 0}
        assert pool.stats().queued == 0


async def test_a_group_takes_as_many_places_as_samples_and_a_large_one_has_the_engine_alone():
    server = ScriptedServer(default=stall(0.02))
    async with pool_of(server, concurrency=4) as pool:
        work = [asyncio.create_task(pool.generate(samples(n))) for n in (3, 1, 2, 9, 2, 2)]
        seen = []
        while not all(task.done() for task in work):
            stats = pool.stats()
            seen.append(stats.in_flight["engine-0"])
            await asyncio.sleep(0.005)
        assert max(seen) == 4
        order = [len(body["input_ids"]) for *_, body in server.requests]
        assert order[:2] == [3, 1]
        assert order[2:4] == [2, 9]  # the large one is not overtaken by those behind it


async def test_the_least_loaded_engine_is_chosen():
    gate = asyncio.Event()
    slow, quick = ScriptedServer(default=held(gate)), ScriptedServer()
    async with pool_of(slow, quick, concurrency=100) as pool:
        group = asyncio.create_task(pool.generate(samples(8)))
        await until(lambda: slow.running == 1)
        for _ in range(5):
            await pool.generate(samples(1))
        assert (len(slow.requests), len(quick.requests)) == (1, 5)
        gate.set()
        await group


async def test_a_request_whose_engine_dies_goes_to_another_and_the_dead_one_gets_none_until_it_answers():
    dying, healthy = ScriptedServer(default=hang_up()), ScriptedServer(default=reply(200, {"text": "ok"}))
    async with pool_of(dying, healthy) as pool:
        assert await asyncio.gather(*(pool.generate(samples(1)) for _ in range(6))) == [{"text": "ok"}] * 6
        assert set(pool.stats().down) == {"engine-0"}
        dying.requests.clear()
        await pool.generate(samples(1))
        assert not any(path == "/generate" for _, path, _ in dying.requests)
        assert pool.stats().in_flight == {"engine-0": 0, "engine-1": 0}

        dying.default = reply(200, {"text": "back"})
        await until(lambda: not pool.stats().down)
        assert await pool.generate(samples(1)) == {"text": "back"}


async def test_an_engine_that_answers_again_with_other_weights_stays_out():
    def restarted(version: str):
        async def answer(request):
            body = {"weight_version": version} if request.path == "/model_info" else {"text": version}
            return await reply(200, body)(request)

        return answer

    dying, healthy = ScriptedServer(default=hang_up()), ScriptedServer(default=restarted("7"))
    async with pool_of(dying, healthy) as pool:
        pool.version = "7"
        await pool.generate(samples(1))
        dying.default = restarted("default")
        await until(lambda: "weights default where the run has 7" in pool.stats().down.get("engine-0", ""))
        assert [await pool.generate(samples(1)) for _ in range(3)] == [{"text": "7"}] * 3
        dying.default = restarted("7")
        await until(lambda: not pool.stats().down)


async def test_a_dead_engines_requests_wait_for_its_replacement_and_are_sent_as_they_were():
    dying = ScriptedServer(default=hang_up())
    async with (
        pool_of(dying, recovery_limit_s=20) as pool,
        ScriptedServer(default=reply(200, {"text": "new"})) as fresh,
    ):
        work = [asyncio.create_task(pool.generate(samples(2))) for _ in range(2)]
        await until(lambda: "engine-0" in pool.stats().down)
        await until(lambda: pool.stats().in_flight == {"engine-0": 0})
        pool.take_out("engine-0", "signal SIGKILL")
        dying.default = reply(200, {"text": "a stranger on the old port"})
        await asyncio.sleep(1.2)  # longer than a probe's interval: nobody asks the old address any more
        assert not any(task.done() for task in work)
        lost = await pool.replace(EngineClient("engine-0", fresh.url, TOKEN))
        assert lost == 4
        assert await asyncio.gather(*work) == [{"text": "new"}] * 2
        sent = [body for _, path, body in fresh.requests if path == "/generate"]
        assert sent == [samples(2)] * 2
        assert await pool.replace(EngineClient("engine-0", fresh.url, TOKEN)) == 0


async def test_a_replacement_may_have_the_address_of_the_engine_that_was_taken_out():
    server = ScriptedServer(default=reply(200, {"text": "new"}))
    async with pool_of(server) as pool:
        pool.take_out("engine-0", "signal SIGKILL")
        work = asyncio.create_task(pool.generate(samples(2)))
        await asyncio.sleep(0.05)
        assert not work.done()
        await pool.replace(EngineClient("engine-0", server.url, TOKEN))
        async with asyncio.timeout(10):
            assert await work == {"text": "new"}


async def test_what_hangs_on_an_engine_that_is_replaced_is_sent_to_its_replacement():
    async with pool_of(ScriptedServer(default=stall(30))) as pool, ScriptedServer() as fresh:
        work = asyncio.create_task(pool.generate(samples(1)))
        await until(lambda: pool.stats().in_flight["engine-0"] == 1)
        await asyncio.sleep(0.1)
        assert await pool.replace(EngineClient("engine-0", fresh.url, TOKEN)) == 1
        async with asyncio.timeout(10):
            assert await work == {}
        assert not pool.stats().down, "the failure of the former one is not the new one's"
        assert pool.stats().in_flight == {"engine-0": 0}


async def test_without_any_engine_requests_fail_within_the_limit_and_say_why():
    async with pool_of(ScriptedServer(default=hang_up()), recovery_limit_s=0.4) as pool:
        async with asyncio.timeout(30):
            outcomes = await asyncio.gather(*(pool.generate(samples(1)) for _ in range(8)), return_exceptions=True)
            assert all(isinstance(o, EngineError) for o in outcomes)
            with pytest.raises(
                EngineError, match=r"none that answers for 0\.4 s: engine-0: engine engine-0: POST /generate"
            ):
                await pool.generate(samples(1))
        assert pool.stats().in_flight == {"engine-0": 0}
        assert pool.stats().queued == 0


async def test_a_request_that_takes_engine_after_engine_down_is_given_up():
    servers = [ScriptedServer(default=hang_up()) for _ in range(5)]
    async with pool_of(*servers) as pool:
        with pytest.raises(EngineUnreachable, match=r"request r0 and 1 more \(2 samples\), got 3 engines out of reach"):
            await pool.generate(samples(2))
        assert len(pool.stats().down) == 3


async def test_a_stuck_engine_draws_no_further_requests():
    async with ScriptedServer(default=stall(30)) as stuck, ScriptedServer() as healthy:
        clients = [
            EngineClient(f"engine-{i}", server.url, TOKEN, timeouts=Timeouts(generate_s=0.2))
            for i, server in enumerate([stuck, healthy])
        ]
        pool = EnginePool(clients, 4)
        with pytest.raises(EngineTimeout, match="engine-0"):
            await pool.generate(samples(1))
        await asyncio.gather(*(pool.generate(samples(1)) for _ in range(3)))
        assert set(pool.stats().down) == {"engine-0"}
        stuck.default = reply()  # slow, not stuck: it answers the probe
        await until(lambda: not pool.stats().down)
        await pool.close()


async def test_a_wrong_request_is_the_callers_and_costs_no_engine():
    async with pool_of(ScriptedServer(reply(400, {"message": "n is not a number"}))) as pool:
        with pytest.raises(EngineRequestError, match="n is not a number"):
            await pool.generate(samples(1))
        assert not pool.stats().down
        await pool.generate(samples(4))


async def test_a_wait_without_movement_ends_with_names():
    async with pool_of(ScriptedServer(default=stall(30)), concurrency=2, stall_limit_s=0.3) as pool:
        first = asyncio.create_task(pool.generate(samples(2)))
        await until(lambda: pool.stats().in_flight["engine-0"] == 2)
        with pytest.raises(WaitTimeout) as caught:
            await pool.generate({"text": "x", "rid": "group-7"})
        assert "request group-7 (1 samples) for room on an engine, got none since" in str(caught.value)
        assert "{'engine-0': 2} of 2" in str(caught.value)
        first.cancel()
        await asyncio.wait({first})
        assert pool.stats().in_flight == {"engine-0": 0}


async def test_movement_elsewhere_keeps_a_wait_alive():
    async with pool_of(ScriptedServer(default=stall(0.1)), concurrency=1, stall_limit_s=0.8) as pool:
        await asyncio.gather(*(pool.generate(samples(1)) for _ in range(15)))  # the last one waits 1.4 s


async def test_no_place_is_lost_to_cancellation():
    rng = random.Random(0)
    async with pool_of(*(ScriptedServer(default=stall(0.004)) for _ in range(2)), concurrency=3) as pool:

        async def one() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.uniform(0, 0.05)):
                    await pool.generate(samples(rng.randint(1, 4)))

        await asyncio.gather(*(one() for _ in range(150)))
        assert pool.stats().in_flight == {"engine-0": 0, "engine-1": 0}
        assert pool.stats().queued == 0
        await asyncio.gather(*(pool.generate(samples(3)) for _ in range(2)))


async def test_a_large_request_that_is_cancelled_lets_those_behind_it_pass():
    gate = asyncio.Event()
    async with pool_of(ScriptedServer(default=held(gate)), concurrency=4) as pool:
        work = [asyncio.create_task(pool.generate(samples(n))) for n in (2, 4, 2, 1)]
        _, large, _, last = work
        await until(lambda: pool.stats().queued == 7)
        last.cancel()
        await asyncio.wait({last})
        assert pool.stats().queued == 6
        large.cancel()
        await asyncio.wait({large})
        assert pool.stats().queued == 0
        assert pool.stats().in_flight == {"engine-0": 4}
        gate.set()
        await asyncio.gather(work[0], work[2])


async def test_control_of_all_engines():
    servers = [ScriptedServer(), ScriptedServer()]
    async with pool_of(*servers) as pool:
        await pool.pause_all()
        await pool.abort_all()
        await pool.resume_all()
        for server in servers:
            assert [path for _, path, _ in server.requests] == [
                "/pause_generation",
                "/abort_request",
                "/continue_generation",
            ]
        servers[1].default = reply(500, b"cannot")
        with pytest.raises(EngineError, match="engine-1"):
            await pool.pause_all()
        assert len(servers[0].requests) == 4


async def test_closing_fails_who_still_waits():
    gate = asyncio.Event()
    async with pool_of(ScriptedServer(default=held(gate)), concurrency=1) as pool:
        work = [asyncio.create_task(pool.generate(samples(1))) for _ in range(2)]
        await until(lambda: pool.stats().queued == 1)
        await pool.close()
        with pytest.raises(EngineError, match="closed"):
            await work[1]
        with pytest.raises(EngineError, match="closed"):
            await pool.generate(samples(1))
        gate.set()
        await asyncio.wait(work)


def test_a_pool_needs_engines_and_places():
    with pytest.raises(ValueError, match="clients, got none"):
        EnginePool([], 4)
    with pytest.raises(ValueError, match="concurrency, got 0"):
        EnginePool([EngineClient("e", "http://127.0.0.1:1", TOKEN)], 0)
