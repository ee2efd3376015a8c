"""Weights to SGLang servers on the same host, in the one form that their `/update_weights_from_tensor` takes.

    tensors --copy--> shared memory --pickle of its place and the tensors' shapes--> every tensor-parallel rank of every engine

The pickle is SGLang's, not ours: it carries handles and no data, goes to a loopback address with the engine's admin key, and we
never read one. The memory is named, kept by torch's `file_system` strategy: with the default one, which passes file
descriptors, a server on a CPU dies. torch's manager process removes it when this process ends, however it ends.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import threading
import time
from collections.abc import Awaitable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing  # registers how tensors are pickled
import xxhash

from miles.errors import EngineError, WeightUpdateError
from miles.interfaces import BucketReceipt, Engine

from .buckets import BucketLayout, NamedTensor, layout


class TorchSharingTransport:
    """`WeightTransport` for SGLang servers on this host. Memory: up to `depth` buckets, kept between publications.

    The engines confirm that they loaded a bucket, but not its checksums: SGLang has none of single HF tensors.
    """

    depth = 2

    def __init__(self, *, ranks_per_engine: int = 1) -> None:
        """`ranks_per_engine`: tensor-parallel size of every engine; each rank is given the whole tensors and takes its part."""
        self._ranks = ranks_per_engine
        self._free = [_Shared() for _ in range(self.depth)]
        self._order = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "fill-weights")

    def begin(self) -> None:
        """Nothing is left of an earlier publication: the engines copy."""

    def commit(self, engines: Sequence[Engine]) -> None:
        """Nothing is kept for the engines: they have copied."""

    async def send(
        self, tensors: Sequence[NamedTensor], engines: Sequence[Engine], ready: Awaitable[object] | None = None
    ) -> BucketReceipt:
        """See `WeightTransport.send`."""
        shared = self._free.pop()
        loop = asyncio.get_running_loop()
        try:
            filled = await loop.run_in_executor(self._thread, shared.fill, tensors)
            del tensors
            if ready is not None:
                await ready
            async with self._order:  # first come, first served: engines load the buckets in the order of the calls
                started = time.perf_counter()
                outcomes = await asyncio.gather(
                    *(self._load(engine, shared, filled.bucket) for engine in engines), return_exceptions=True
                )
                load_s = time.perf_counter() - started
        finally:
            self._free.append(shared)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for failure in failures:
            if not isinstance(failure, EngineError):
                raise failure
        if failures:
            raise WeightUpdateError("; and ".join(str(failure) for failure in failures)) from failures[0]
        return BucketReceipt(filled.checksums, filled.bucket.nbytes, wire_s=filled.seconds, load_s=load_s)

    async def _load(self, engine: Engine, shared: _Shared, bucket: BucketLayout) -> None:
        # A pickle of its own for every reader: each reading gives one reference to the memory back.
        pickles = [shared.pickled(bucket) for _ in range(self._ranks)]
        # What was cached of the old weights is of no use to the new ones.
        await engine.update_weights({"serialized_named_tensors": pickles, "load_format": None, "flush_cache": True})

    def close(self) -> None:
        self._thread.shutdown()
        for shared in self._free:
            shared.close()


@dataclass(frozen=True)
class _Filled:
    bucket: BucketLayout
    checksums: dict[str, str]
    seconds: float


class _Shared:
    """Memory that other processes open by name. Grows by being replaced; empty until first filled."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def fill(self, tensors: Sequence[NamedTensor]) -> _Filled:
        """Copies the tensors in, from whatever device."""
        started = time.perf_counter()
        bucket = layout(tensors)
        if bucket.nbytes > len(self._bytes):
            self.close()
            try:
                with _by_name():
                    self._bytes = torch.empty(bucket.nbytes, dtype=torch.uint8).share_memory_()
            except RuntimeError as error:
                raise WeightUpdateError(
                    f"shared memory for a weight bucket, got no {bucket.nbytes} bytes ({error}): /dev/shm is too small; "
                    f"lower --update-weight-buffer-size or enlarge it"
                ) from error
        checksums = {}
        for (name, copy), (_, tensor) in zip(self._views(bucket), tensors, strict=True):
            copy.copy_(tensor.detach())
            flat = copy.flatten().view(torch.uint8).numpy()
            checksums[name] = xxhash.xxh3_64_hexdigest(flat.data if flat.size else b"")
        return _Filled(bucket, checksums, time.perf_counter() - started)

    def pickled(self, bucket: BucketLayout) -> str:
        """[(name, tensor), ...] in the form of SGLang's MultiprocessingSerializer, base64. To be read once."""
        with _by_name():
            return base64.b64encode(bytes(ForkingPickler.dumps(self._views(bucket)))).decode()

    def _views(self, bucket: BucketLayout) -> list[NamedTensor]:
        return [
            (slot.name, self._bytes[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).view(slot.shape))
            for slot in bucket.slots
        ]

    def close(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)


@contextlib.contextmanager
def _by_name() -> Iterator[None]:
    """torch shares memory by file name meanwhile. The setting is the process's, so one thread at a time changes it."""
    with _strategy:
        before = torch.multiprocessing.get_sharing_strategy()
        torch.multiprocessing.set_sharing_strategy("file_system")
        try:
            yield
        finally:
            torch.multiprocessing.set_sharing_strategy(before)


_strategy = threading.Lock()
