"""Publication to real engine processes: what they generate afterwards, and what they refuse in between."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch

from miles.engines.client import EngineClient
from miles.errors import EngineError, EngineRequestError, WeightUpdateError
from miles.weights import SharedMemoryTransport, publish, tensor_checksum
from miles.weights.segment import Segment

from .conftest import TOKEN, hf_greedy, hf_weights, make_model

PROMPT = [5, 17, 3, 42]
SMALL_BUFFER = 8 * 1024  # several buckets even of this model


def request(count: int = 12, prompt: list[int] = PROMPT, **params) -> dict:
    return {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": count, "ignore_eos": True, **params},
        "return_logprob": True,
    }


@pytest.fixture
def transport():
    transport = SharedMemoryTransport()
    yield transport
    transport.close()


@pytest.mark.parametrize("buffer_bytes", [SMALL_BUFFER, 2**29])
async def test_engines_generate_with_the_published_weights(engines, transport, buffer_bytes):
    for version, seed in (("1", 11), ("2", 12)):
        model = make_model(seed)
        stats = await publish(iter(hf_weights(model)), engines, transport, version, buffer_bytes, check_equal=True)
        assert stats.nbytes == sum(p.nbytes for _, p in hf_weights(model))
        assert (stats.num_buckets > 3) == (buffer_bytes == SMALL_BUFFER)
        expected = {name: tensor_checksum(p) for name, p in hf_weights(model)}
        for engine in engines:
            assert await engine.version() == version
            held = await engine.checksums()
            assert {name: held[name] for name in expected} == expected
            reply = await engine.generate(request())
            assert reply["output_ids"] == hf_greedy(model, PROMPT, 12)
            assert reply["meta_info"]["weight_version"] == version


async def test_the_named_segment_works_too(engines):
    transport = SharedMemoryTransport(anonymous=False)
    model = make_model(21)
    await publish(iter(hf_weights(model)), engines, transport, "3", SMALL_BUFFER, check_equal=True)
    assert (await engines[0].generate(request()))["output_ids"] == hf_greedy(model, PROMPT, 12)
    transport.close()


async def test_engines_serve_from_the_senders_memory_and_keep_it_when_the_sender_lets_go(engine_processes, engines):
    def mapped(process) -> int:
        return sum("memfd:miles-weights" in line for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines())

    # A sender of its own for every version, as after a restart of the trainers.
    for version in range(25, 28):
        transport, model = SharedMemoryTransport(), make_model(version)
        stats = await publish(iter(hf_weights(model)), engines, transport, str(version), SMALL_BUFFER)
        transport.close()
        for process, engine in zip(engine_processes, engines, strict=True):
            assert (await engine.generate(request()))["output_ids"] == hf_greedy(model, PROMPT, 12)
            assert 0 < mapped(process) <= stats.num_buckets


async def test_an_engine_alone_goes_on_in_one_request_and_hears_it_twice(engines, transport, monkeypatch):
    """The answer to it may be lost, and it is sent again to an engine that serves by then."""
    engine, asked = engines[0], []
    call = EngineClient._call

    async def twice(self, method, endpoint, body=None, *, limit_s):
        asked.append(endpoint)
        reply = await call(self, method, endpoint, body, limit_s=limit_s)
        if (body or {}).get("continue_generation") and endpoint == "/update_weights_from_tensor":
            reply = await call(self, method, endpoint, body, limit_s=limit_s)
        return reply

    monkeypatch.setattr(EngineClient, "_call", twice)
    for version in ("28", "29"):
        asked.clear()
        model = make_model(int(version))
        await publish(iter(hf_weights(model)), engines[:1], transport, version, 2**29)
        assert asked[:2] == ["/pause_generation", "/update_weights_from_tensor"]
        assert asked[2:] == (["/update_weight_version"] if version == "28" else [])
        reply = await engine.generate(request())
        assert (reply["output_ids"], reply["meta_info"]["weight_version"]) == (hf_greedy(model, PROMPT, 12), version)


async def test_check_equal_finds_a_byte_that_changed_in_the_middle_of_an_adopted_tensor(
    engines, transport, monkeypatch
):
    """Samples do not: they are of the tensor's ends, and this byte changes after it was filled."""
    fill, name = Segment.fill, "model.layers.0.mlp.up_proj.weight"

    def fill_and_corrupt(self, tensors, bucket, **kwargs):
        filled = fill(self, tensors, bucket, **kwargs)
        for slot in bucket.slots:
            if slot.name == name:
                self._raw(slot)[slot.nbytes // 2] ^= 1
        return filled

    await publish(iter(hf_weights(make_model(28))), engines, transport, "28", SMALL_BUFFER)
    monkeypatch.setattr(Segment, "fill", fill_and_corrupt)
    await publish(iter(hf_weights(make_model(29))), engines, transport, "29", SMALL_BUFFER)
    with pytest.raises(WeightUpdateError, match=rf"checksum of {name} on engine-0"):
        await publish(iter(hf_weights(make_model(30))), engines, transport, "30", SMALL_BUFFER, check_equal=True)
    assert await engines[0].version() == "29"
    monkeypatch.undo()
    await publish(iter(hf_weights(make_model(30))), engines, transport, "30", SMALL_BUFFER, check_equal=True)


async def test_a_request_in_the_middle_of_an_update_waits_and_is_served_with_the_new_weights(engines, transport):
    engine, model = engines[0], make_model(31)
    halfway, go_on = threading.Event(), threading.Event()

    def slow_weights():
        for i, entry in enumerate(hf_weights(model)):
            if i == 15:
                halfway.set()
                assert go_on.wait(30)
            yield entry

    updating = asyncio.create_task(publish(slow_weights(), engines, transport, "31", SMALL_BUFFER))
    assert await asyncio.to_thread(halfway.wait, 30)
    late = asyncio.create_task(engine.generate(request()))
    await asyncio.sleep(0.3)
    assert not late.done()
    assert not updating.done()
    go_on.set()
    await updating
    reply = await late
    assert reply["output_ids"] == hf_greedy(model, PROMPT, 12)
    assert {entry["version"] for entry in reply["meta_info"]["weight_versions"]} == {"31"}


async def test_requests_that_run_when_an_update_comes_return_what_they_have(engines, transport):
    engine, old, new = engines[0], make_model(40), make_model(41)
    await publish(iter(hf_weights(old)), engines, transport, "40", SMALL_BUFFER)
    running = [asyncio.create_task(engine.generate(request(480, prompt=[i, 2, 3]))) for i in range(1, 5)]
    await asyncio.sleep(0.1)
    await publish(iter(hf_weights(new)), engines, transport, "41", SMALL_BUFFER, check_equal=True)
    for i, reply in enumerate(await asyncio.gather(*running), start=1):
        ids = reply["output_ids"]
        version = reply["meta_info"]["weight_version"]
        if ids:
            # Whole tokens of one version, never of a mixture.
            assert ids[:24] == hf_greedy({"40": old, "41": new}[version], [i, 2, 3], 24)[: len(ids)]
        if reply["meta_info"]["finish_reason"]["type"] == "abort":
            assert len(ids) < 480
    assert (await engine.generate(request()))["output_ids"] == hf_greedy(new, PROMPT, 12)


@pytest.mark.parametrize("failure", ["wrong shape", "unknown name", "missing"])
async def test_a_failed_update_leaves_every_engine_paused_until_a_whole_one_succeeds(engines, transport, failure):
    good = make_model(50)
    await publish(iter(hf_weights(good)), engines, transport, "50", SMALL_BUFFER)
    weights = hf_weights(make_model(51))
    name, tensor = weights[7]
    if failure == "wrong shape":
        weights[7] = (name, torch.zeros(3, 5))
    elif failure == "unknown name":
        name = "model.layers.9.nonsense.weight"
        weights[7] = (name, tensor)
    else:
        del weights[7]
    with pytest.raises(WeightUpdateError) as caught:
        await publish(iter(weights), engines, transport, "51", SMALL_BUFFER)
    text = str(caught.value)
    assert text.startswith("weights of version 51, ")
    assert name in text
    assert "engine-0" in text
    assert (", bucket " in text) == (failure != "missing")

    for engine in engines:
        await engine.health()
        assert await engine.version() == "50"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await engine.generate(request())
        with pytest.raises(EngineRequestError, match="continue_generation"):
            await engine.resume()

    healed = make_model(52)
    await publish(iter(hf_weights(healed)), engines, transport, "52", SMALL_BUFFER, check_equal=True)
    for engine in engines:
        assert (await engine.generate(request()))["output_ids"] == hf_greedy(healed, PROMPT, 12)


async def test_what_a_failed_update_wrote_does_not_complete_the_next_one(engines, transport):
    broken = hf_weights(make_model(55))
    broken[-1] = (broken[-1][0], torch.zeros(1, 1))
    with pytest.raises(WeightUpdateError, match=broken[-1][0]):
        await publish(iter(broken), engines, transport, "55", SMALL_BUFFER)
    incomplete = hf_weights(make_model(56))[1:]
    with pytest.raises(WeightUpdateError, match=broken[0][0]):
        await publish(iter(incomplete), engines, transport, "56", SMALL_BUFFER)
    await publish(iter(hf_weights(make_model(57))), engines, transport, "57", SMALL_BUFFER, check_equal=True)


async def test_weights_of_an_engine_that_runs_cannot_be_changed(engines, transport):
    with pytest.raises(WeightUpdateError, match=r"engine-0: POST /update_weights_from_tensor, got HTTP 400"):
        await transport.send(hf_weights(make_model(60)), engines[:1])


async def test_an_engine_that_dies_is_named(start_engines, transport):
    # In a thread: the fixture runs an event loop of its own.
    [process] = await asyncio.to_thread(start_engines, 1)
    async with EngineClient("engine-9", process.url, TOKEN) as client:
        weights = hf_weights(make_model(70))

        def dying():
            for i, entry in enumerate(weights):
                if i == 5:
                    os.killpg(process.pid, signal.SIGKILL)
                yield entry

        with pytest.raises(WeightUpdateError, match=r"version 1, .*engine engine-9"):
            await publish(dying(), [client], transport, "1", SMALL_BUFFER)
        with pytest.raises(EngineError, match="engine engine-9"):
            await client.health()
        assert process.poll() == -signal.SIGKILL


PARENT = """
import asyncio, sys, torch
from miles.engines.client import EngineClient
from miles.engines.launch import launch_embedded
from miles.weights import SharedMemoryTransport, publish
from pathlib import Path
from safetensors.torch import load_file

async def main(checkpoint, log):
    process = await launch_embedded(name="e", model_path=checkpoint, token="t", log_path=Path(log), device="cpu",
                                    server_args={"skip_tokenizer_init": True}, start_timeout_s=90)
    weights = load_file(checkpoint + "/model.safetensors")
    transport = SharedMemoryTransport()
    async with EngineClient("e", process.url, "t") as client:
        for version in range(10**9):
            await publish(iter(weights.items()), [client], transport, str(version), 8192)
            print(process.pid, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def test_nothing_outlives_a_parent_that_is_killed(checkpoint, tmp_path):
    shm_before = set(os.listdir("/dev/shm"))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(checkpoint), str(tmp_path / "e.log")],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        line = parent.stdout.readline()
        assert line, Path(tmp_path / "e.log").read_text()
        engine = psutil.Process(int(line))
        assert engine.is_running()
    finally:
        parent.kill()
        parent.wait()
    try:
        engine.wait(timeout=15)
    except psutil.TimeoutExpired:
        engine.kill()
        pytest.fail("the engine outlived its parent by 15 s")
    assert not {name for name in set(os.listdir("/dev/shm")) - shm_before if name.startswith("miles")}
