"""Weights to engines on the same host through shared memory: the bytes are copied once, HTTP carries only their places.

    POST {segment, progress, adopt, samples, tensors: [{name, dtype, shape, offset}]} -> every engine maps the segment,
    tensors --copy--> segment, samples, and how far it is filled -----------------------> follows the filling, compares,
                                                                                          adopts the segment, or copies

What is compared: an engine that copies answers with a checksum of each tensor as it holds it, and so does one that was not part
of the last publication; we compare them with our own. One that adopted all of the last version computes with the very pages that we write, so that
nothing lies between that could change a byte: it compares a sample of each tensor, its first and last 64 bytes as they were given to
us, with what it maps. That tells another segment, another filling, another place, and what is not written yet; it does not
tell a byte in the middle that someone changed. All bytes of all parameters are compared with `check_equal`.

Engines that copy read while we write, close behind: what they read is still in the processor's cache, and sender and engine work
at the same time also where the whole model is one bucket or one tensor.

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
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from miles.errors import EngineError, WeightUpdateError
from miles.interfaces import BucketReceipt, Engine
from miles.types import WeightVersion

from .buckets import BucketLayout, NamedTensor, layout
from .checksum import verify_loaded
from .memory import HEADER_BYTES
from .segment import Filled, Segment, samples_place

logger = logging.getLogger(__name__)

LOAD_FORMAT = "miles_shm"

#: Of host and control group, the part of memory that segments which engines keep leave free.
_RESERVED_PART = 10


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
        self._adopting: set[str] = set()
        """Identities of the engines that adopted all of the last version: the next one they compare by samples."""
        self._copying: set[str] = set()
        """Of those that have copied something of the publication that is under way."""
        self._check_equal = False
        self._last_load: asyncio.Event | None = None
        self._told = False
        # One thread: two buckets filled at once would only take the memory bus from each other and from the engines.
        self._thread = ThreadPoolExecutor(1, "fill-weights")

    def begin(self, *, check_equal: bool = False) -> None:
        """See `WeightTransport.begin`."""
        self._check_equal = check_equal
        self._copying.clear()
        # Of a publication that failed: engines may use them or not.
        for segment in self._filled:
            segment.close()
        self._filled.clear()

    def commit(self, engines: Sequence[Engine]) -> None:
        """See `WeightTransport.commit`."""
        confirmed = {engine.identity for engine in engines}
        self._adopting = confirmed - self._copying
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
        self,
        tensors: Sequence[NamedTensor],
        engines: Sequence[Engine],
        ready: Awaitable[object] | None = None,
        serve: WeightVersion | None = None,
    ) -> BucketReceipt:
        """See `WeightTransport.send`. Goes on with `serve` where one engine compares samples itself."""
        previous, loaded = self._last_load, asyncio.Event()
        self._last_load = loaded
        adopting = all(engine.identity in self._adopting for engine in engines)
        preparing = self._thread.submit(self._prepare, tensors)
        filling = asyncio.wrap_future(
            self._thread.submit(_fill, preparing, tensors, adopting and not self._check_equal)
        )
        # Dropped here: what the caller gathered can be freed once our copy of it is complete.
        del tensors
        try:
            segment, bucket, offer = await asyncio.wrap_future(preparing)
        except BaseException:
            loaded.set()
            await asyncio.gather(filling, return_exceptions=True)
            raise
        # Until an engine says otherwise, all that are asked keep the segment, also those that answer nothing.
        kept = False
        try:
            try:
                if ready is not None:
                    await ready
                if previous is not None:
                    await previous.wait()
            except BaseException:
                await asyncio.gather(filling, return_exceptions=True)
                raise
            kept = offer
            sampled = offer and adopting
            resume = serve if sampled and len(engines) == 1 else None
            payload = _payload(segment, bucket, adopt=offer, sampled=sampled, serve=resume)
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
            self._compare(engine, reply, None if sampled else filled.checksums)
        return BucketReceipt(
            bucket.names,
            filled.checksums,
            bucket.payload_nbytes,
            filled.seconds,
            ended - filled.ended,
            serving=resume is not None and bool(replies[0].get("serving")),
        )

    def _compare(self, engine: Engine, reply: Mapping[str, Any], checksums: Mapping[str, str] | None) -> None:
        """Raises `WeightUpdateError` where an engine has loaded something else than `checksums`, or, without them, has not
        compared samples itself."""
        if not reply.get("kept"):
            self._copying.add(engine.identity)
        if checksums is not None:
            verify_loaded(engine.name, checksums, reply.get("checksums") or {})
        elif not (reply.get("kept") and reply.get("sampled")):
            self._adopting.discard(engine.identity)
            raise WeightUpdateError(
                f"weights on {engine.name}, got no word that it adopted them and compared samples, as it did before: nothing "
                "tells what it holds; see the engine's log, then publish the whole weights again"
            )

    def _prepare(self, tensors: Sequence[NamedTensor]) -> tuple[Segment, BucketLayout, bool]:
        """A segment with room for the tensors, where they will lie, and whether to offer it to the engines."""
        if self._free or self._may_share(tensors):
            segment = self._free.popleft() if self._free else Segment(anonymous=self._anonymous)
            try:
                return segment, segment.reserve(tensors), True
            except WeightUpdateError as error:
                self._tell(str(error))
        segment = self._transit.popleft() if self._transit else Segment(anonymous=self._anonymous)
        return segment, segment.reserve(tensors), False

    def _may_share(self, tensors: Sequence[NamedTensor]) -> bool:
        """Whether there is memory for one more segment that engines keep."""
        needed, available = layout(tensors).nbytes, available_bytes(anonymous=self._anonymous)
        if needed > available // 2:
            self._tell(
                f"a bucket of {needed // 10**6} MB would take more than half of the {available // 10**6} MB of memory that are free"
            )
        return needed <= available // 2

    def _tell(self, why: str) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "engines copy weights instead of sharing them: %s; sharing is faster, and takes twice the weights in shared "
                "memory for all engines",
                why,
            )

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


def _fill(
    preparing: Future[tuple[Segment, BucketLayout, bool]], tensors: Sequence[NamedTensor], samples_suffice: bool
) -> Filled:
    """`samples_suffice` where engines adopt; a segment that is not offered is copied from."""
    segment, bucket, offer = preparing.result()  # of an earlier task of the same thread
    return segment.fill(tensors, bucket, checksums=not (offer and samples_suffice))


def _payload(
    segment: Segment, bucket: BucketLayout, *, adopt: bool, sampled: bool, serve: WeightVersion | None
) -> dict[str, object]:
    return {
        "load_format": LOAD_FORMAT,
        "segment": segment.path,
        "progress": 0,
        **({"adopt": segment.serial} if adopt else {}),
        **({"samples": samples_place(bucket)} if sampled else {}),
        **({"weight_version": serve, "continue_generation": True} if serve is not None else {}),
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
