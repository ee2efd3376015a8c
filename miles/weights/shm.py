"""Weights to engines on the same host through shared memory: the bytes are copied once, HTTP carries only their places.

    tensors --copy--> segment --POST {segment, tensors: [{name, dtype, shape, offset}]}--> every engine maps and loads it
                        ^                                                                      |
                        `------------- checksums compared, segment free again <----------------'

Two segments take turns: one is filled while engines load the other. On Linux a segment is an anonymous memory file that
engines open as /proc/<pid>/fd/<n>: it vanishes with this process, however that ends.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from miles.errors import EngineError, WeightUpdateError
from miles.interfaces import BucketReceipt, Engine

from .buckets import BucketLayout, NamedTensor, TensorSlot, layout
from .checksum import checksum, verify_loaded

LOAD_FORMAT = "miles_shm"


class SharedMemoryTransport:
    """`WeightTransport` for engines on this host. Memory: up to `depth` segments as large as the largest bucket.

    Segments are kept between publications, since fresh pages cost more than the copy. May be used from one event loop
    after another, not from two at once.
    """

    depth = 2

    def __init__(self, *, anonymous: bool = hasattr(os, "memfd_create")) -> None:
        """`anonymous=False` takes named files in /dev/shm, which only `close` removes."""
        self._segments = [Segment(anonymous=anonymous) for _ in range(self.depth)]
        self._free = list(self._segments)
        self._last_load: asyncio.Event | None = None

    async def send(self, tensors: Sequence[NamedTensor], engines: Sequence[Engine]) -> BucketReceipt:
        """See `WeightTransport.send`."""
        segment = self._free.pop()
        previous, loaded = self._last_load, asyncio.Event()
        self._last_load = loaded
        try:
            started = time.perf_counter()
            # A thread, so that the requests of the bucket before this one go on meanwhile.
            bucket = await asyncio.to_thread(segment.fill, tensors)
            # Dropped here: what the caller gathered can be freed while engines load our copy of it.
            del tensors
            wire_s = time.perf_counter() - started
            if previous is not None:
                await previous.wait()
            started = time.perf_counter()
            payload = _payload(segment.path, bucket)
            # Engines load while we compute what they are to answer. All are waited for: they read the segment until then.
            outcomes = await asyncio.gather(
                asyncio.to_thread(segment.checksums, bucket),
                *(engine.update_weights(payload) for engine in engines),
                return_exceptions=True,
            )
            load_s = time.perf_counter() - started
        finally:
            loaded.set()
            self._free.append(segment)
        checksums, *replies = _successes(outcomes)
        for engine, reply in zip(engines, replies, strict=True):
            verify_loaded(engine.name, checksums, reply.get("checksums") or {})
        return BucketReceipt(checksums, bucket.payload_nbytes, wire_s, load_s)

    def close(self) -> None:
        for segment in self._segments:
            segment.close()


def _successes(outcomes: Sequence[dict[str, Any] | BaseException]) -> list[dict[str, Any]]:
    """The outcomes where all are successes; else raises, with the texts of all engines that failed."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for failure in failures:
        if not isinstance(failure, EngineError):
            raise failure
    if failures:
        raise WeightUpdateError("; and ".join(str(failure) for failure in failures)) from failures[0]
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]


def _payload(path: str, bucket: BucketLayout) -> dict[str, object]:
    return {
        "load_format": LOAD_FORMAT,
        "segment": path,
        "tensors": [
            {
                "name": slot.name,
                "dtype": str(slot.dtype).removeprefix("torch."),
                "shape": list(slot.shape),
                "offset": slot.offset,
            }
            for slot in bucket.slots
        ],
    }


class Segment:
    """A stretch of memory that another process can open by `path`. Grows by being replaced; empty until first filled."""

    def __init__(self, *, anonymous: bool) -> None:
        self._anonymous = anonymous
        self._fd = -1
        self._path = ""
        self._map: mmap.mmap | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._backed_bytes = 0

    @property
    def path(self) -> str:
        return self._path

    def fill(self, tensors: Sequence[NamedTensor]) -> BucketLayout:
        """Copies the tensors in, from whatever device, and returns where they lie."""
        bucket = layout(tensors)
        self._reserve(bucket.nbytes)
        for slot, (_, tensor) in zip(bucket.slots, tensors, strict=True):
            if slot.nbytes:
                self._raw(slot).view(slot.dtype).view(slot.shape).copy_(tensor.detach())
        return bucket

    def checksums(self, bucket: BucketLayout) -> dict[str, str]:
        """Checksum of each tensor as it lies in the segment."""
        return {slot.name: checksum(self._raw(slot).numpy()) for slot in bucket.slots}

    def _raw(self, slot: TensorSlot) -> torch.Tensor:
        return self._bytes[slot.offset : slot.offset + slot.nbytes]

    def close(self) -> None:
        """Gives the memory back. The segment can be filled again afterwards."""
        # The tensor holds the mapping's buffer, and a mapping with a user cannot be unmapped.
        self._bytes = torch.empty(0, dtype=torch.uint8)
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if not self._anonymous:
                Path(self._path).unlink(missing_ok=True)
        self._path, self._backed_bytes = "", 0

    def _reserve(self, nbytes: int) -> None:
        """Makes room. Addresses grow in powers of two and cost nothing; pages are backed as far as they are needed."""
        nbytes = max(nbytes, mmap.PAGESIZE)
        try:
            if nbytes > len(self._bytes):
                self.close()
                self._open(1 << (nbytes - 1).bit_length())
            if nbytes > self._backed_bytes:
                # Asked for now, when running out is an error; on first touch it would be a SIGBUS, here or in an engine.
                os.posix_fallocate(self._fd, 0, nbytes)
                self._backed_bytes = nbytes
        except OSError as error:
            self.close()
            raise WeightUpdateError(
                f"shared memory for a weight bucket, got no {nbytes} bytes ({error.strerror}): the host's memory, or its "
                f"limit, is too small; lower --update-weight-buffer-size or raise the limit"
            ) from error

    def _open(self, nbytes: int) -> None:
        if self._anonymous:
            self._fd = os.memfd_create("miles-weights")
            self._path = f"/proc/{os.getpid()}/fd/{self._fd}"
        else:
            self._path = f"/dev/shm/miles-{os.getpid()}-{secrets.token_hex(8)}"
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(self._fd, nbytes)
        self._map = mmap.mmap(self._fd, nbytes)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
