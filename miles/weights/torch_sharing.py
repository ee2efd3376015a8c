"""Weights to SGLang servers on the same host, in the one form that their `/update_weights_from_tensor` takes.

    tensors --copy--> memory file --pickle of its path and the tensors' places--> every tensor-parallel rank of every engine

The pickle is SGLang's form, not ours: it carries no data, goes to a loopback address with the engine's admin key, and we never
read one. It says how to map the memory file, as torch's own sharing does, but by a path that anyone may open any number of
times: torch counts the readers of what it shares, so that a request sent twice, or never read, would lose or leak the memory.
"""

from __future__ import annotations

import asyncio
import base64
import io
import pickle
import time
from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2
from torch.multiprocessing.reductions import rebuild_typed_storage

from miles.errors import EngineError, WeightUpdateError
from miles.interfaces import BucketReceipt, Engine
from miles.types import WeightVersion

from .buckets import BucketLayout, NamedTensor
from .memory import HEADER_BYTES
from .segment import Filled, Segment


class TorchSharingTransport:
    """`WeightTransport` for SGLang servers on this host. Memory: up to `depth` buckets, kept between publications.

    The engines confirm that they loaded a bucket, but not its checksums: SGLang has none of single HF tensors.
    """

    depth = 2

    def __init__(self, *, ranks_per_engine: int = 1) -> None:
        """`ranks_per_engine`: tensor-parallel size of every engine; each rank is given the whole tensors and takes its part."""
        self._ranks = ranks_per_engine
        self._free = [Segment(anonymous=True) for _ in range(self.depth)]
        self._check_equal = False
        self._order = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "fill-weights")

    def begin(self, *, check_equal: bool = False) -> None:
        """Nothing is left of an earlier publication: the engines copy."""
        self._check_equal = check_equal

    def commit(self, engines: Sequence[Engine]) -> None:
        """Nothing is kept for the engines: they have copied."""

    async def send(
        self,
        tensors: Sequence[NamedTensor],
        engines: Sequence[Engine],
        ready: Awaitable[object] | None = None,
        serve: WeightVersion | None = None,
    ) -> BucketReceipt:
        """See `WeightTransport.send`. SGLang has no request that loads and goes on."""
        segment = self._free.pop()
        loop = asyncio.get_running_loop()
        try:
            bucket, filled = await loop.run_in_executor(self._thread, _fill, segment, tensors, self._check_equal)
            del tensors
            # What was cached of the old weights is of no use to the new ones.
            payload = {
                "serialized_named_tensors": [_pickled(segment, bucket)] * self._ranks,
                "load_format": None,
                "flush_cache": True,
            }
            if ready is not None:
                await ready
            async with self._order:  # first come, first served: engines load the buckets in the order of the calls
                started = time.perf_counter()
                outcomes = await asyncio.gather(
                    *(engine.update_weights(payload) for engine in engines), return_exceptions=True
                )
                load_s = time.perf_counter() - started
        finally:
            self._free.append(segment)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for failure in failures:
            if not isinstance(failure, EngineError):
                raise failure
        if failures:
            raise WeightUpdateError("; and ".join(str(failure) for failure in failures)) from failures[0]
        return BucketReceipt(
            bucket.names, filled.checksums, bucket.payload_nbytes, wire_s=filled.seconds, load_s=load_s
        )

    def close(self) -> None:
        self._thread.shutdown()
        for segment in self._free:
            segment.close()


def _fill(segment: Segment, tensors: Sequence[NamedTensor], checksums: bool) -> tuple[BucketLayout, Filled]:
    bucket = segment.reserve(tensors)
    return bucket, segment.fill(tensors, bucket, checksums=checksums)


def _pickled(segment: Segment, bucket: BucketLayout) -> str:
    """[(name, tensor), ...] as SGLang's MultiprocessingSerializer writes it, base64."""
    memory = _Memory(segment.path, HEADER_BYTES + bucket.nbytes)
    tensors = [
        (
            slot.name,
            _Tensor(memory, slot.dtype, (HEADER_BYTES + slot.offset) // slot.dtype.itemsize, slot.shape),
        )
        for slot in bucket.slots
    ]
    out = io.BytesIO()
    pickle.Pickler(out, protocol=4).dump(tensors)
    return base64.b64encode(out.getvalue()).decode()


class _Memory:
    """Pickles as the mapping of a file, which a pickle has once."""

    def __init__(self, path: str, nbytes: int):
        self._call = torch.UntypedStorage.from_file, (path, True, nbytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


class _Typed:
    """Pickles as the same memory, of a dtype."""

    def __init__(self, memory: _Memory, dtype: torch.dtype):
        self._call = rebuild_typed_storage, (memory, dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


class _Tensor:
    """Pickles as a contiguous tensor that begins `offset` elements after the memory's beginning."""

    def __init__(self, memory: _Memory, dtype: torch.dtype, offset: int, shape: tuple[int, ...]):
        strides = torch.empty(shape, device="meta").stride()
        self._call: tuple[Any, ...] = (
            _rebuild_tensor_v2,
            (_Typed(memory, dtype), offset, shape, strides, False, OrderedDict()),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call
