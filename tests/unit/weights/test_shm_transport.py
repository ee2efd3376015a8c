"""Shared memory: what arrives is bitwise what was sent, from any layout and dtype; segments are reused and given back."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import torch

from miles.errors import WeightUpdateError
from miles.weights import SharedMemoryTransport, tensor_checksum
from miles.weights.buckets import BucketLayout
from miles.weights.memory import CHUNK_BYTES, HEADER_BYTES
from miles.weights.segment import Segment

from .receiver import Receiver


def some_tensors(seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(6, 10, generator=g)
    return [
        ("float32", base.clone()),
        ("transposed", base.T),
        ("strided", base[::2, 1::3]),
        ("bfloat16", base.bfloat16()),
        ("nan", torch.tensor([float("nan"), -0.0, float("inf")])),
        ("parameter", torch.nn.Parameter(base + 1)),
        ("empty", torch.empty(0, 3)),
        ("scalar", torch.tensor(7, dtype=torch.int64)),
        ("flags", base > 0),
        ("float8", base.to(torch.float8_e4m3fn)),
    ]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    def raw(t: torch.Tensor) -> bytes:
        return t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b""

    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


@pytest.mark.parametrize("anonymous", [True, False])
async def test_every_engine_gets_the_same_bits(anonymous):
    transport = SharedMemoryTransport(anonymous=anonymous)
    engines = [Receiver(f"r{i}") for i in range(2)]
    for engine in engines:
        await engine.pause()
    tensors = some_tensors()
    receipt = await transport.send(tensors, engines)
    for engine in engines:
        assert list(engine.held) == [name for name, _ in tensors]
        for name, tensor in tensors:
            assert same_bits(engine.held[name], tensor), name
    assert receipt.nbytes == sum(t.numel() * t.element_size() for _, t in tensors)
    assert receipt.checksums == {name: tensor_checksum(tensor) for name, tensor in tensors}
    transport.close()
    transport.close()


async def test_overlapping_sends_load_in_order_and_do_not_mix():
    transport = SharedMemoryTransport()
    engine = Receiver(delay_s=0.02)
    await engine.pause()
    first, second = [("a", torch.zeros(50_000))], [("b", torch.ones(50_000))]
    await asyncio.gather(transport.send(first, [engine]), transport.send(second, [engine]))
    assert list(engine.held) == ["a", "b"]
    assert engine.most_loads == 1
    assert engine.held["a"].eq(0).all()
    assert engine.held["b"].eq(1).all()
    transport.close()


def test_one_transport_serves_one_event_loop_after_another():
    transport = SharedMemoryTransport()
    for seed in range(3):
        engine = Receiver()

        async def update(engine: Receiver = engine, seed: int = seed) -> None:
            await engine.pause()
            await asyncio.gather(*(transport.send([(f"t{i}", torch.full((9,), seed + i))], [engine]) for i in range(2)))

        asyncio.run(update())
        assert engine.held["t1"].eq(seed + 1).all()
    transport.close()


async def test_a_wrong_checksum_names_tensor_and_engine_and_the_transport_works_on():
    transport = SharedMemoryTransport()
    good, bad = Receiver("good"), Receiver("bad", corrupt="strided")
    await good.pause()
    await bad.pause()
    with pytest.raises(WeightUpdateError, match="strided on bad"):
        await transport.send(some_tensors(), [good, bad])
    bad.corrupt = None
    for _ in range(3):
        await transport.send(some_tensors(), [good, bad])
    transport.close()


async def test_a_failure_waits_for_the_engines_that_still_read():
    transport = SharedMemoryTransport()
    quick, slow = Receiver("quick", fail_on="float32"), Receiver("slow", delay_s=0.1)
    await quick.pause()
    await slow.pause()
    with pytest.raises(WeightUpdateError, match="quick"):
        await transport.send(some_tensors(), [quick, slow])
    assert slow.loads == 0
    assert slow.held
    transport.close()


def fill(segment: Segment, tensors: list[tuple[str, torch.Tensor]]) -> tuple[BucketLayout, dict[str, str]]:
    bucket = segment.reserve(tensors)
    return bucket, segment.fill(tensors, bucket).checksums


def progress(segment: Segment) -> int:
    fd = os.open(segment.path, os.O_RDONLY)
    try:
        return int.from_bytes(os.pread(fd, 8, 0), "little", signed=True)
    finally:
        os.close(fd)


def test_a_segment_is_kept_grown_and_filled_again_after_close():
    segment = Segment(anonymous=True)
    fill(segment, [("a", torch.zeros(1000))])
    first = segment.path
    fill(segment, [("a", torch.zeros(1000))])
    assert segment.path == first
    bucket, checksums = fill(segment, [("a", torch.arange(100_000)), ("b", torch.arange(3))])
    assert bucket.slots[1].offset == 800_000
    assert checksums["b"] == tensor_checksum(torch.arange(3))
    segment.close()
    assert not os.path.exists(first)
    fill(segment, [("a", torch.zeros(10))])
    segment.close()


def test_a_segment_says_how_far_it_is_filled():
    segment = Segment(anonymous=True)
    tensors = [("a", torch.zeros(CHUNK_BYTES)), ("b", torch.arange(3))]
    fill(segment, tensors)
    bucket = segment.reserve(tensors)
    assert progress(segment) == 0
    segment.fill(tensors, bucket)
    assert progress(segment) == HEADER_BYTES + bucket.nbytes
    segment.reserve(tensors)
    assert progress(segment) == 0
    segment.close()


async def test_engines_are_told_when_the_sender_cannot_go_on():
    """Else they would wait for bytes that never come."""
    transport = SharedMemoryTransport()
    engine = Receiver()
    await engine.pause()
    unreadable = torch.empty(5, device="meta")
    with pytest.raises(NotImplementedError, match="meta"):
        async with asyncio.timeout(20):
            await transport.send([("a", torch.ones(5)), ("b", unreadable)], [engine])
    assert engine.loads == 0
    await transport.send(some_tensors(), [engine])
    transport.close()


def test_nothing_is_left_open_or_on_disk():
    before = set(Path("/dev/shm").glob("miles-*")), len(os.listdir("/proc/self/fd"))
    for anonymous in (True, False):
        segment = Segment(anonymous=anonymous)
        for size in (10, 10_000, 100):
            fill(segment, [("a", torch.zeros(size))])
        segment.close()
    assert (set(Path("/dev/shm").glob("miles-*")), len(os.listdir("/proc/self/fd"))) == before


def test_memory_that_cannot_be_had_is_an_error_and_no_signal():
    segment = Segment(anonymous=True)
    with pytest.raises(WeightUpdateError, match="update-weight-buffer-size"):
        segment._reserve(1 << 50)
    fill(segment, [("a", torch.zeros(10))])
    segment.close()
