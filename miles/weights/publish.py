"""New weights to every engine, all or nothing.

    bucket, bucket, ... --> checks --> version, continue all
    |  gather (a thread: collectives of all ranks)
    |  wire   (into shared memory, or whatever the transport uses)      pause all
    |  load   (the engines)          the next bucket is gathered meanwhile  <-'

Engines are paused once the first bucket is there. It is written meanwhile, and loaded when they stand still. A single engine
is given the version with its last bucket, where the transport can; several wait for each other before any goes on.

Consumes `Trainer.named_weights()` on the main rank while the other ranks iterate theirs. After any failure the engines
stay paused: no request is ever answered with half-updated weights. The remaining weights are still consumed then, so
that the other ranks get through their collectives.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from miles.errors import WeightUpdateError
from miles.interfaces import BucketReceipt, Engine, WeightTransport
from miles.types import WeightVersion

from .buckets import NamedTensor, iter_buckets
from .checksum import verify_held

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishStats:
    """What one publication took. Phases overlap, so together they may exceed `total_s`."""

    version: WeightVersion
    num_tensors: int
    num_buckets: int
    nbytes: int
    total_s: float
    pause_s: float
    """Until every engine stood still."""
    gather_s: float
    """Waiting for `named_weights`: collectives and conversion to HF names."""
    wire_s: float
    load_s: float
    check_s: float
    """Comparing all tensors once more; 0 without `check_equal`."""

    def metrics(self) -> dict[str, float]:
        """`perf/update_weights_*`: seconds as `*_time`, and bytes."""
        prefix = "perf/update_weights"
        return {
            f"{prefix}_time": self.total_s,
            f"{prefix}_pause_time": self.pause_s,
            f"{prefix}_gather_time": self.gather_s,
            f"{prefix}_wire_time": self.wire_s,
            f"{prefix}_load_time": self.load_s,
            f"{prefix}_check_time": self.check_s,
            f"{prefix}_bytes": float(self.nbytes),
            f"{prefix}_buckets": float(self.num_buckets),
        }


async def publish(
    named_weights: Iterator[NamedTensor],
    engines: Sequence[Engine],
    transport: WeightTransport,
    version: WeightVersion,
    buffer_bytes: int,
    *,
    check_equal: bool = False,
) -> PublishStats:
    """Returns once every engine serves `version`.

    `check_equal` compares every parameter of every engine with what was sent before the version is set. Only names of
    the HF checkpoint are sent: no output layer where it is tied to the embedding.
    Raises `WeightUpdateError` naming version, bucket and engine; all engines then stay paused, but where all hold the
    weights and one does not go on to serve them.
    """
    started = time.perf_counter()
    with _Gatherer(named_weights, buffer_bytes) as gatherer:
        try:
            stats = await _update(gatherer, engines, transport, version, check_equal)
        except Exception as error:
            await gatherer.drain()
            raise WeightUpdateError(
                f"weights of version {version}, {error}; an engine that does not serve them stays paused until a whole update "
                "succeeds"
            ) from error
    transport.commit(engines)
    stats = dataclasses.replace(stats, total_s=time.perf_counter() - started)
    logger.info("published %s", stats)
    return stats


async def _update(
    gatherer: _Gatherer,
    engines: Sequence[Engine],
    transport: WeightTransport,
    version: WeightVersion,
    check_equal: bool,
) -> PublishStats:
    """Returns once all engines serve the version; `total_s` is left to the caller."""
    transport.begin(check_equal=check_equal)
    begun = asyncio.Event()
    pausing = asyncio.create_task(_pause_all(engines, begun))
    try:
        # What has still to be compared, or to be waited for, comes before the version.
        serve = version if len(engines) == 1 and not check_equal else None
        receipts = await _send_all(gatherer, engines, transport, begun, pausing, serve)
    finally:
        begun.set()
        # Where it failed, it is the reason.
        pause_s = await pausing
    if not receipts:
        raise WeightUpdateError("got no tensors: the trainer has no weights to publish; check --model-name")

    check_started = time.perf_counter()
    if check_equal:
        checksums = {name: value for receipt in receipts for name, value in receipt.checksums.items()}

        async def check(engine: Engine) -> None:
            verify_held(engine.name, checksums, await engine.checksums())

        await _on_all(engines, check)
    checked = time.perf_counter()

    # Every engine holds all weights by now. One that does not go on is broken, and keeps no other from serving them.
    if not receipts[-1].serving:
        await _on_all(engines, lambda engine: engine.serve(version))
    return PublishStats(
        version=version,
        num_tensors=sum(len(receipt.names) for receipt in receipts),
        num_buckets=len(receipts),
        nbytes=sum(receipt.nbytes for receipt in receipts),
        total_s=0.0,
        pause_s=pause_s,
        gather_s=gatherer.seconds,
        wire_s=sum(receipt.wire_s for receipt in receipts),
        load_s=sum(receipt.load_s for receipt in receipts),
        check_s=checked - check_started,
    )


async def _pause_all(engines: Sequence[Engine], begun: asyncio.Event) -> float:
    """Returns the seconds until the last one stood still, from `begun` on: then there is something to load soon."""
    await begun.wait()
    started = time.perf_counter()
    await _on_all(engines, lambda engine: engine.pause())
    return time.perf_counter() - started


async def _send_all(
    gatherer: _Gatherer,
    engines: Sequence[Engine],
    transport: WeightTransport,
    begun: asyncio.Event,
    pausing: asyncio.Task[float],
    serve: WeightVersion | None,
) -> list[BucketReceipt]:
    """All buckets, at most `transport.depth` of them alive at a time: being gathered, written or loaded.

    `serve` goes with the last one, which engines are given when all others have arrived.
    """
    receipts: list[BucketReceipt] = []
    sending: deque[asyncio.Task[BucketReceipt]] = deque()

    async def finish_first() -> None:
        # Shielded, and left in the queue until it is done: a thread may be writing and engines reading the transport's
        # memory until a send ends, also when this publication is cancelled.
        receipts.append(await asyncio.shield(sending[0]))
        sending.popleft()

    try:
        last = False
        while not last:
            if len(sending) == transport.depth:
                await finish_first()
            bucket, last = await gatherer.next_bucket(len(receipts) + len(sending))
            if not bucket:
                break
            number = len(receipts) + len(sending)
            awaited = [pausing, *(sending if last else ())]
            ready = asyncio.gather(*(asyncio.shield(task) for task in awaited))
            sent = _send(number, bucket, engines, transport, ready, serve if last else None)
            sending.append(asyncio.create_task(sent))
            del bucket
            # Wakes up who waits for it after the task above: writing needs the interpreter lock, and takes longer than pausing.
            begun.set()
        while sending:
            await finish_first()
    finally:
        await asyncio.gather(*sending, return_exceptions=True)
    return receipts


async def _send(
    number: int,
    bucket: list[NamedTensor],
    engines: Sequence[Engine],
    transport: WeightTransport,
    ready: Awaitable[object],
    serve: WeightVersion | None,
) -> BucketReceipt:
    span = f"bucket {number} ({bucket[0][0]} to {bucket[-1][0]})"
    sending = transport.send(bucket, engines, ready, serve)
    del bucket
    try:
        return await sending
    except Exception as error:
        raise WeightUpdateError(f"{span}: {error or type(error).__name__}") from error


async def _on_all(engines: Sequence[Engine], call: Callable[[Engine], Awaitable[None]]) -> None:
    """All engines at once; waits for all of them, then raises the first failure."""
    outcomes = await asyncio.gather(*(call(engine) for engine in engines), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


class _Gatherer:
    """Iterates the trainer's weights in one thread of its own, so that requests go on while a bucket is gathered.

    The thread works on the CUDA device of the thread that made the gatherer; both are per thread in torch.
    """

    def __init__(self, named_weights: Iterator[NamedTensor], buffer_bytes: int) -> None:
        self._named = named_weights
        self._ended = False
        self._buckets = iter_buckets(self._stream(), buffer_bytes)
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, "gather-weights", _use_device, (device,))
        self.seconds = 0.0
        # Asked for at once: the first bucket's way to the engines is the one that nothing else hides.
        self._first: Future[tuple[list[NamedTensor], bool]] | None = self._thread.submit(self._next)

    def __enter__(self) -> _Gatherer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # Idle where all went well; joining it would take as long as to begin.
        self._thread.shutdown(wait=exc_info[0] is not None)

    async def next_bucket(self, number: int) -> tuple[list[NamedTensor], bool]:
        """The next bucket, its tensors ready to be read, and whether it is the last one; empty where there is none at all."""
        gathering, self._first = self._first or self._thread.submit(self._next), None
        try:
            return await asyncio.wrap_future(gathering)
        except WeightUpdateError:
            raise
        except Exception as error:
            raise WeightUpdateError(
                f"bucket {number}, got {type(error).__name__} while it was gathered: {error}"
            ) from error

    async def drain(self) -> None:
        """Consumes what is left; what goes wrong now is logged, since it follows from an earlier error."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._drain)
        except Exception:
            logger.warning("the remaining weights could not be gathered", exc_info=True)

    def _stream(self) -> Iterator[NamedTensor]:
        names: set[str] = set()
        for name, tensor in self._named:
            if name in names:
                raise WeightUpdateError(f"got {name} twice: two parameters map to one HF name; check --model-name")
            names.add(name)
            yield name, tensor
            # The loop variable would keep the tensor alive beyond its bucket.
            del tensor
        self._ended = True

    def _next(self) -> tuple[list[NamedTensor], bool]:
        started = time.perf_counter()
        bucket = next(self._buckets, [])
        for device in {tensor.device for _, tensor in bucket if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        self.seconds += time.perf_counter() - started
        # A bucket ends where one tensor more has been read, or with the stream.
        return bucket, self._ended

    def _drain(self) -> None:
        for _ in self._named:
            pass


def _use_device(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)
