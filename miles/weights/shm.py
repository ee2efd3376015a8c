"""Weights to engines on the same host through shared memory: the bytes are copied once, HTTP carries only their places.

    POST {segment, progress, adopt, tensors: [{name, dtype, shape, offset}]} -> every engine maps the segment,
    tensors --hash, copy--> segment, and how far it is filled ----------------> follows the filling, hashes,
                              ^                                                 adopts the segment, or copies
                              `------ checksums compared <----------------------'

Engines read while we write, close behind: what they read is still in the processor's cache, and sender and engine work at
the same time also where the whole model is one bucket or one tensor.

An engine that can, adopts: once it holds the whole version, the segments are its weights, shared by all engines of the host,
and nothing is copied a second time. So a segment is not written again before every engine that may use it has confirmed a
later version. Segments take turns then: those of one version are in use while the next one is filled, which takes twice the
weights in shared memory. Where nobody can tell whether an engine still uses a segment (it was lost, or a publication
failed), we let go of the segment and take another: its memory lives on in the engine as long as the engine needs it. An
engine that copies leaves two segments to take turns within one publication.

On Linux a segment is an anonymous memory file that engines open as /proc/<pid>/fd/<n>: it vanishes with this process,
however that ends, but for what engines have mapped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import re
import secrets
import shutil
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import xxhash

from miles.errors import EngineError, WeightUpdateError
from miles.interfaces import BucketReceipt, Engine

from .buckets import ALIGNMENT_BYTES, BucketLayout, NamedTensor, TensorSlot, layout
from .checksum import verify_loaded

logger = logging.getLogger(__name__)

LOAD_FORMAT = "miles_shm"

#: Hashed, copied and made known at a time: it stays in a core's second-level cache between the two.
CHUNK_BYTES = 1024 * 1024

#: A segment begins with two little-endian int64: how many of its bytes are ready, and the number of the filling. The tensors
#: follow.
HEADER_BYTES = ALIGNMENT_BYTES

#: Of host and control group, the part of memory that segments which engines keep leave free.
_RESERVED_PART = 10

#: In place of the number of bytes: the sender could not fill the segment and will not.
GIVEN_UP = -1


class SharedMemoryTransport:
    """`WeightTransport` for engines on this host. Memory: twice the weights where engines
    adopt, else `depth` buckets.

    Segments are kept between publications, since fresh pages cost more than the copy. May be used from one event loop
    after another, not from two at once.
    """

    depth = 2

    def __init__(self, *, anonymous: bool = hasattr(os, "memfd_create")) -> None:
        """`anonymous=False` takes named files in /dev/shm, which only `close` removes."""
        self._anonymous = anonymous
        self._free: deque[Segment] = deque()
        """To be offered, and read by nobody. The one that was used first comes first: it fits the same bucket of the next
        version."""
        self._transit: deque[Segment] = deque()
        """To be copied from, where memory is short; read by nobody."""
        self._filled: list[Segment] = []
        """Kept by engines, for the publication that is under way."""
        self._live: list[Segment] = []
        """Kept by engines that have confirmed the version in them."""
        self._last_load: asyncio.Event | None = None
        self._told = False
        # One thread: two buckets filled at once would only take the memory bus from each other and from the engines.
        self._thread = ThreadPoolExecutor(1, "fill-weights")

    def begin(self) -> None:
        """See `WeightTransport.begin`."""
        # Of a publication that failed: engines may use them or not.
        for segment in self._filled:
            segment.close()
        self._filled.clear()

    def commit(self, engines: Sequence[Engine]) -> None:
        """See `WeightTransport.commit`."""
        confirmed = {engine.identity for engine in engines}
        for segment in self._live:
            if segment.users <= confirmed:
                segment.users.clear()
                self._free.append(segment)
            else:
                segment.close()
        self._live, self._filled = self._filled, []
        # After a version of another size, or of smaller buckets.
        while len(self._free) > max(len(self._live), self.depth):
            self._free.pop().close()

    async def send(
        self, tensors: Sequence[NamedTensor], engines: Sequence[Engine], ready: Awaitable[object] | None = None
    ) -> BucketReceipt:
        """See `WeightTransport.send`."""
        segment, offer = self._take(tensors)
        previous, loaded = self._last_load, asyncio.Event()
        self._last_load = loaded
        loop = asyncio.get_running_loop()
        # Until an engine says otherwise, all that are asked keep the segment, also those that answer nothing.
        kept = False
        try:
            bucket = await loop.run_in_executor(self._thread, segment.reserve, tensors)
            filling = loop.run_in_executor(self._thread, segment.fill, tensors, bucket)
            # Dropped here: what the caller gathered can be freed once our copy of it is complete.
            del tensors
            try:
                if ready is not None:
                    await ready
                if previous is not None:
                    await previous.wait()
            except BaseException:
                await asyncio.gather(filling, return_exceptions=True)
                raise
            kept = offer
            payload = _payload(segment, bucket, adopt=offer)
            # All engines are waited for: they read the segment until then.
            outcomes = await asyncio.gather(
                filling, *(engine.update_weights(payload) for engine in engines), return_exceptions=True
            )
            ended = time.perf_counter()
            kept = offer and any(isinstance(outcome, BaseException) or outcome.get("kept") for outcome in outcomes[1:])
        finally:
            loaded.set()
            if kept:
                segment.users = {engine.identity for engine in engines}
                self._filled.append(segment)
            else:
                (self._free if offer else self._transit).append(segment)
        filled, replies = _successes(outcomes)
        for engine, reply in zip(engines, replies, strict=True):
            verify_loaded(engine.name, filled.checksums, reply.get("checksums") or {})
        return BucketReceipt(filled.checksums, bucket.payload_nbytes, filled.seconds, ended - filled.ended)

    def _take(self, tensors: Sequence[NamedTensor]) -> tuple[Segment, bool]:
        """A segment to fill, and whether to offer it to the engines."""
        if self._free:
            return self._free.popleft(), True
        needed, available = layout(tensors).nbytes, available_bytes(anonymous=self._anonymous)
        if needed <= available // 2:
            return Segment(anonymous=self._anonymous), True
        if not self._told:
            self._told = True
            logger.warning(
                "engines copy weights instead of sharing them: a bucket of %d MB would take more than half of the %d MB "
                "of memory that are free; sharing is faster, and takes twice the weights in shared memory for all engines",
                needed // 10**6,
                available // 10**6,
            )
        return self._transit.popleft() if self._transit else Segment(anonymous=self._anonymous), False

    def close(self) -> None:
        """Gives the memory back; the transport can be used again."""
        for segment in (*self._free, *self._transit, *self._filled, *self._live):
            segment.close()
        self._free.clear()
        self._transit.clear()
        self._filled, self._live = [], []


def available_bytes(*, anonymous: bool) -> int:
    """Memory that shared memory may still take: of the host, of this process's control group, of /dev/shm.

    A tenth of host and group is left to what else grows, such as the activations of the next step.
    """
    memory = psutil.virtual_memory()
    found = [memory.available - memory.total // _RESERVED_PART]
    group = Path("/sys/fs/cgroup")
    # Without a limit the file is missing or says "max".
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())
        # Pages of files that the kernel gives back when memory is asked for count as used.
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        used = int((group / "memory.current").read_text()) - (int(cached[1]) if cached else 0)
        found.append(limit - limit // _RESERVED_PART - used)
    if not anonymous:
        found.append(shutil.disk_usage("/dev/shm").free)
    return max(0, min(found))


def _successes(outcomes: Sequence[Any]) -> tuple[Filled, list[dict[str, Any]]]:
    """Filling and replies where all are successes; else raises, with the texts of all engines that failed."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for failure in failures:
        # Of our own side, and what made the engines fail.
        if not isinstance(failure, EngineError):
            raise failure
    if failures:
        raise WeightUpdateError("; and ".join(str(failure) for failure in failures)) from failures[0]
    filled, *replies = outcomes
    return filled, replies


def _payload(segment: Segment, bucket: BucketLayout, *, adopt: bool) -> dict[str, object]:
    return {
        "load_format": LOAD_FORMAT,
        "segment": segment.path,
        "progress": 0,
        **({"adopt": segment.serial} if adopt else {}),
        "tensors": [
            {
                "name": slot.name,
                "dtype": str(slot.dtype).removeprefix("torch."),
                "shape": list(slot.shape),
                "offset": HEADER_BYTES + slot.offset,
            }
            for slot in bucket.slots
        ],
    }


@dataclass(frozen=True)
class Filled:
    """What `Segment.fill` did."""

    checksums: dict[str, str]
    """HF name -> checksum of the tensor as it was given to us."""
    seconds: float
    ended: float
    """`time.perf_counter()` at the end."""


class Segment:
    """A stretch of memory that another process can open by `path`. Grows by being replaced; empty until first filled."""

    def __init__(self, *, anonymous: bool) -> None:
        self._anonymous = anonymous
        self.users: set[str] = set()
        """Identities of the engines that may compute with what lies in it."""
        self._fd = -1
        self._path = ""
        self._map: mmap.mmap | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._header = np.zeros(2, np.int64)
        self._backed_bytes = 0

    @property
    def path(self) -> str:
        return self._path

    @property
    def serial(self) -> int:
        """Number of the filling; another one for each."""
        return int(self._header[1])

    def reserve(self, tensors: Sequence[NamedTensor]) -> BucketLayout:
        """Makes room, marks all of it as not ready, and returns where the tensors will lie."""
        bucket = layout(tensors)
        self._reserve(HEADER_BYTES + bucket.nbytes)
        self._announce(0)
        self._header[1] += 1
        return bucket

    def fill(self, tensors: Sequence[NamedTensor], bucket: BucketLayout) -> Filled:
        """Copies the tensors in, from whatever device, and says after each chunk how far it is."""
        started = time.perf_counter()
        try:
            checksums = {
                slot.name: self._fill_slot(slot, tensor.detach())
                for slot, (_, tensor) in zip(bucket.slots, tensors, strict=True)
            }
        except BaseException:
            self._announce(GIVEN_UP)
            raise
        ended = time.perf_counter()
        return Filled(checksums, ended - started, ended)

    def _fill_slot(self, slot: TensorSlot, tensor: torch.Tensor) -> str:
        """Returns the checksum, of each chunk just before it is copied, which the hash has brought into the cache.

        What is not contiguous in this host's memory is copied first and hashed in the segment.
        """
        target = self._raw(slot)
        copy = target.numpy()
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            source = tensor.view(-1).view(torch.uint8).numpy()
        else:
            if slot.nbytes:
                target.view(slot.dtype).view(slot.shape).copy_(tensor)
            source = copy
        hasher = xxhash.xxh3_64()
        for begin in range(0, slot.nbytes, CHUNK_BYTES):
            end = min(begin + CHUNK_BYTES, slot.nbytes)
            hasher.update(source[begin:end].data)
            if copy is not source:
                np.copyto(copy[begin:end], source[begin:end])
            self._announce(HEADER_BYTES + slot.offset + end)
        return hasher.hexdigest()

    def _announce(self, ready_bytes: int) -> None:
        # An aligned 8-byte store, after the copy on every processor that keeps stores in order; where one does not, the
        # interpreter lock is given up and taken between the two. Checksums tell whatever arrives otherwise.
        self._header[0] = ready_bytes

    def _raw(self, slot: TensorSlot) -> torch.Tensor:
        begin = HEADER_BYTES + slot.offset
        return self._bytes[begin : begin + slot.nbytes]

    def close(self) -> None:
        """Gives the memory back. The segment can be filled again afterwards."""
        # Both hold the mapping's buffer, and a mapping with a user cannot be unmapped.
        self._bytes, self._header = torch.empty(0, dtype=torch.uint8), np.zeros(2, np.int64)
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
        self._header = np.frombuffer(self._map, np.dtype("<i8"), count=2)
