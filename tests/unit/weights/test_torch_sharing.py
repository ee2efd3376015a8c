"""The transport of SGLang servers, read by another process as SGLang reads it."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from miles.errors import EngineError, WeightUpdateError
from miles.weights import TorchSharingTransport, tensor_checksum

READER = """
import base64, pickle, sys, torch, torch.multiprocessing
for line in sys.stdin:
    for name, tensor in pickle.loads(base64.b64decode(line)):
        print(name, tensor.dtype, tuple(tensor.shape), tensor.double().sum().item(), flush=True)
    del tensor
    print("end", flush=True)
"""


class Engine:
    """Hands every payload to a process of its own, as a server's scheduler."""

    def __init__(self, name: str, *, fails: bool = False):
        self.name, self.fails = name, fails
        self.heard: list[list[str]] = []
        self.payloads: list[dict] = []
        self.reader = subprocess.Popen(
            [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    async def update_weights(self, payload: dict) -> dict:
        if self.fails:
            raise EngineError(f"engine {self.name}: it refused")
        self.payloads.append(payload)
        for text in payload["serialized_named_tensors"]:
            self.heard.append(await asyncio.to_thread(self._read, text))
        return {"success": True}

    def _read(self, text: str) -> list[str]:
        self.reader.stdin.write(text + "\n")
        self.reader.stdin.flush()
        return list(iter(lambda: self.reader.stdout.readline().strip(), "end"))

    def close(self) -> None:
        self.reader.stdin.close()
        self.reader.wait(10)
        self.reader.stdout.close()


@pytest.fixture
def engines():
    made = [Engine("a"), Engine("b")]
    yield made
    for engine in made:
        engine.close()


def described(tensors) -> list[str]:
    return [f"{name} {t.dtype} {tuple(t.shape)} {t.double().sum().item()}" for name, t in tensors]


def test_every_rank_of_every_engine_reads_each_bucket_also_from_memory_used_before(engines) -> None:
    transport = TorchSharingTransport(ranks_per_engine=2)
    buckets = [
        [("w", torch.arange(6.0).view(2, 3).t()), ("b", torch.tensor([1.5], dtype=torch.bfloat16))],
        [("w", torch.full((5, 1000), 2.0)), ("empty", torch.empty(0))],
        [("x", torch.arange(7)), ("scalar", torch.tensor(3.0))],
        [("w", torch.full((5, 1000), -1.0))],
    ]

    async def send_all():
        transport.begin(check_equal=True)
        return [await transport.send(bucket, engines) for bucket in buckets]

    receipts = asyncio.run(send_all())
    transport.close()
    for engine in engines:
        assert engine.heard == [described(bucket) for bucket in buckets for _ in range(2)]
    for bucket, receipt in zip(buckets, receipts, strict=True):
        assert receipt.checksums == {name: tensor_checksum(tensor) for name, tensor in bucket}


def test_what_travels_holds_no_weights_and_asks_for_a_flush(engines) -> None:
    transport = TorchSharingTransport()
    asyncio.run(transport.send([("w", torch.ones(1_000_000))], engines[:1]))
    transport.close()
    [payload] = engines[0].payloads
    [text] = payload["serialized_named_tensors"]
    assert len(text) < 2000
    assert payload["flush_cache"] is True


def test_one_engine_that_fails_fails_the_bucket_after_all_have_answered(engines) -> None:
    transport = TorchSharingTransport()
    engines[0].fails = True
    with pytest.raises(WeightUpdateError, match="engine a: it refused"):
        asyncio.run(transport.send([("w", torch.ones(3))], engines))
    transport.close()
    assert engines[1].heard == [described([("w", torch.ones(3))])]


def test_a_pickle_may_be_read_twice_or_never(engines) -> None:
    """A request whose answer was lost is sent again; one to an engine that died is read by nobody."""
    transport = TorchSharingTransport()

    class Deaf:
        name = "deaf"

        async def update_weights(self, payload: dict) -> dict:
            for text in payload["serialized_named_tensors"]:
                await asyncio.to_thread(engines[0]._read, text)
            return await engines[0].update_weights(payload)

    for size in (10, 5, 1000, 10):
        bucket = [("w", torch.full((size,), float(size)))]
        asyncio.run(transport.send(bucket, [Deaf()]))
        assert engines[0].heard.pop() == described(bucket)
    transport.close()


def test_no_file_is_left_behind(engines) -> None:
    before = set(Path("/dev/shm").glob(f"*{os.getpid()}*"))
    transport = TorchSharingTransport()
    asyncio.run(transport.send([("w", torch.ones(1000))], engines))
    assert set(Path("/dev/shm").glob(f"*{os.getpid()}*")) == before
    transport.close()


def test_buckets_may_overlap(engines) -> None:
    transport = TorchSharingTransport()
    buckets = [[(f"w{i}", torch.full((1 + 1000 * i,), float(i)))] for i in range(40)]

    async def overlapping() -> None:
        await asyncio.gather(*(two(i) for i in range(2)))

    async def two(first: int) -> None:
        for bucket in buckets[first::2]:
            await transport.send(bucket, engines[:1])

    asyncio.run(overlapping())
    transport.close()
    assert sorted(engines[0].heard) == sorted(described(bucket) for bucket in buckets)


def test_the_pickle_is_a_plain_list_of_pairs_made_of_what_sglang_allows(engines) -> None:
    transport = TorchSharingTransport()
    asyncio.run(transport.send([("w", torch.ones(3)), ("v", torch.ones(2, 2))], engines[:1]))
    [text] = engines[0].payloads[0]["serialized_named_tensors"]

    class Reader(pickle.Unpickler):
        """Modules that SGLang's own reader takes; it refuses all others."""

        def find_class(self, module: str, name: str) -> object:
            assert module.split(".")[0] in {"builtins", "collections", "torch"}, (module, name)
            return super().find_class(module, name)

    (_, w), (_, v) = Reader(io.BytesIO(base64.b64decode(text))).load()
    assert torch.equal(w, torch.ones(3))
    assert torch.equal(v, torch.ones(2, 2))
    assert w.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    transport.close()
