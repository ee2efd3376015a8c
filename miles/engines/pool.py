"""All engines of a run as one: each request goes to the engine with the fewest samples in flight.

    generate(payload) --waits for room, first come first served--> least-loaded engine --> reply
                              ^                                        |
                              `---- another engine, if this one died <-'

Consumes payloads of /generate, produces their replies. Waits for room on an engine (`concurrency` samples each), which
another request's end gives; gives up when nothing moves for `stall_limit_s`, or no engine is left for `recovery_limit_s`.

An engine that is down gets no request until it answers again with the weights that the pool expects, or until its owner
gives another in its place (`replace`). What it was working on is sent again as it was, seeds included.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from miles.errors import EngineError, EngineTimeout, EngineUnreachable, WaitTimeout
from miles.types import WeightVersion

from .client import EngineClient

logger = logging.getLogger(__name__)

#: Engines that one request may see die before it is taken for the cause.
MAX_ENGINES_PER_REQUEST = 3

#: Seconds between two looks at an engine that is down.
_PROBE_INTERVAL_S = 1.0

_open_pools: weakref.WeakSet[EnginePool] = weakref.WeakSet()


def open_pools() -> Iterator[EnginePool]:
    """The pools of this process that are not closed: the engines whose token it holds."""
    return iter(tuple(_open_pools))


@dataclass(frozen=True)
class PoolStats:
    """The pool at one moment. Numbers count samples."""

    in_flight: dict[str, int]
    """Per engine."""
    queued: int
    """Waiting for room on an engine."""
    down: dict[str, str]
    """Engines that get no requests for now, and why."""


@dataclass(eq=False)
class _Seat:
    """What the pool knows of one engine."""

    client: EngineClient
    in_flight: int = 0
    down: str | None = None
    probe: asyncio.Task[None] | None = None
    lost_samples: int = 0
    """In flight on it when it died; they go to another engine."""


@dataclass(eq=False)
class _Waiter:
    """A request that waits for room; the future gets its engine."""

    places: int
    payload: Mapping[str, Any]
    since: float
    future: asyncio.Future[_Seat] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class EnginePool:
    """Back-pressure, balance and fail-over over the run's engines. Lives in one event loop.

    A request of n samples (rows times `n`) takes n of an engine's `concurrency` places; one that is larger than that
    waits for an idle engine and has it alone. Requests are placed in the order of their calls.
    """

    def __init__(
        self,
        clients: Sequence[EngineClient],
        concurrency: int,
        *,
        stall_limit_s: float | None = None,
        recovery_limit_s: float = 30.0,
        whose: str = "engines of the run",
    ) -> None:
        """`stall_limit_s` defaults to twice the clients' limit for one generation: by then a request has ended."""
        if not clients:
            raise ValueError("clients, got none: a pool needs an engine; start at least one")
        if concurrency < 1:
            raise ValueError(
                f"concurrency, got {concurrency}: an engine takes at least one sample; give a positive number"
            )
        self._seats = [_Seat(client) for client in clients]
        self._concurrency = concurrency
        self._stall_limit_s = (
            2 * max(client.timeouts.generate_s for client in clients) if stall_limit_s is None else stall_limit_s
        )
        self._recovery_limit_s, self._whose = recovery_limit_s, whose
        self._queue: deque[_Waiter] = deque()
        self._moved = time.monotonic()
        self._none_left_since: float | None = None
        self._watch: asyncio.Task[None] | None = None
        self._retired: list[EngineClient] = []
        self._closed = False
        self.version: WeightVersion | None = None
        """What an engine that was down must hold to be asked again; None: whatever it holds."""
        _open_pools.add(self)

    @property
    def engines(self) -> tuple[EngineClient, ...]:
        return tuple(seat.client for seat in self._seats)

    @property
    def former_engines(self) -> tuple[EngineClient, ...]:
        """Those that were replaced: a hook may still have their URLs."""
        return tuple(self._retired)

    def stats(self) -> PoolStats:
        return PoolStats(
            in_flight={seat.client.name: seat.in_flight for seat in self._seats},
            queued=sum(waiter.places for waiter in self._queue),
            down={seat.client.name: seat.down for seat in self._seats if seat.down is not None},
        )

    async def generate(self, payload: Mapping[str, Any], *, num_samples: int | None = None) -> Any:
        """The reply of /generate from whichever engine has room. `num_samples` is read off the payload if not given.

        Raises what the engine's client raises; `EngineUnreachable` after engines died under it, `EngineError` when none is
        left, `WaitTimeout` when no room came.
        """
        places = min(count_samples(payload) if num_samples is None else num_samples, self._concurrency)
        died: list[EngineUnreachable] = []
        while True:
            seat = await self._take(places, payload, first_in_line=bool(died))
            client = seat.client
            try:
                return await client.generate(payload)
            except EngineTimeout as error:
                # A stuck engine would look idle and draw all requests; one that was only slow answers the probe.
                self._mark_down(seat, client, error)
                raise
            except EngineUnreachable as error:
                died.append(error)
                if seat.client is client:
                    seat.lost_samples += places
                self._mark_down(seat, client, error)
                if len(died) == MAX_ENGINES_PER_REQUEST:
                    names = ", ".join(sorted({seat.client.name for seat in self._seats if seat.down is not None}))
                    raise EngineUnreachable(
                        f"request {_describe(payload)}, got {len(died)} engines out of reach while they worked on it "
                        f"({names}): it may be what kills them; last: {error}"
                    ) from error
            finally:
                self._give_back(seat, places)

    async def abort_all(self) -> None:
        """Ends every running request on the engines that are up; callers get what was generated so far."""
        await _all([seat.client.abort() for seat in self._seats if seat.down is None])

    async def pause_all(self, mode: str = "abort") -> None:
        """Raises for an engine that is down too: one that was not paused must not be forgotten."""
        await _all([seat.client.pause(mode) for seat in self._seats])

    async def resume_all(self) -> None:
        await _all([seat.client.resume() for seat in self._seats])

    def take_out(self, name: str, why: str) -> None:
        """The engine's owner knows that it is dead: no request goes there, not even a probe, until `replace`."""
        seat = self._seat(name)
        self._stop_probe(seat)
        self._set_down(seat, why)

    async def replace(self, client: EngineClient) -> int:
        """The engine of the client's name is another process now, which holds the expected weights and serves.

        Returns how many samples its predecessor was working on when it died. The URL of an engine that was not taken out
        changes nothing.
        """
        seat = self._seat(client.name)
        former = seat.client
        taken_out = seat.down is not None and seat.probe is None
        if former.url == client.url and not taken_out:
            await client.close()
            return 0
        self._stop_probe(seat)
        lost, seat.lost_samples = seat.lost_samples + seat.in_flight, 0
        seat.client = client
        self._retired.append(former)
        self._set_up(seat)
        # Requests that its end has not reached yet fail now, and are sent again.
        await former.retire("it was replaced")
        return lost

    async def close(self) -> None:
        """Fails whoever still waits and closes all connections. Requests that run are best cancelled before."""
        _open_pools.discard(self)
        self._closed = True
        while self._queue:
            waiter = self._queue.popleft()
            if not waiter.future.done():
                waiter.future.set_exception(_closing())
        for task in (self._watch, *(seat.probe for seat in self._seats)):
            if task is not None:
                task.cancel()
        await asyncio.gather(*(client.close() for client in self.engines))

    # ---------------------------------------------------------------------------------------------------------- places

    async def _take(self, places: int, payload: Mapping[str, Any], *, first_in_line: bool) -> _Seat:
        """Places on an engine, reserved. A request whose engine died goes to the head of the queue."""
        if self._closed:
            raise _closing()
        waiter = _Waiter(places, payload, time.monotonic())
        if first_in_line:
            self._queue.appendleft(waiter)
        else:
            self._queue.append(waiter)
        self._dispatch()
        if self._queue and (self._watch is None or self._watch.done()):
            self._watch = asyncio.create_task(self._watch_queue(), name="engine pool queue")
        try:
            return await waiter.future
        except BaseException:  # cancelled, too
            if waiter in self._queue:
                self._queue.remove(waiter)
                # A large request at the head holds up smaller ones behind it.
                self._dispatch()
            elif not waiter.future.cancelled() and waiter.future.exception() is None:
                self._give_back(waiter.future.result(), places)
            raise

    async def _watch_queue(self) -> None:
        """Fails the requests that wait beyond the limits, as long as any waits."""
        interval_s = min(_PROBE_INTERVAL_S, self._stall_limit_s / 4, self._recovery_limit_s / 4)
        while self._queue:
            now = time.monotonic()
            for waiter in tuple(self._queue):
                error = self._overdue(waiter, now)
                if error is not None:
                    self._queue.remove(waiter)
                    if not waiter.future.done():
                        waiter.future.set_exception(error)
            self._dispatch()
            await asyncio.sleep(interval_s)

    def _overdue(self, waiter: _Waiter, now: float) -> Exception | None:
        """Why the wait is over its limit, if it is."""
        if self._none_left_since is not None and now - self._none_left_since >= self._recovery_limit_s:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.stats().down.items())
            return EngineError(
                f"{self._whose}, got none that answers for {self._recovery_limit_s:g} s: {reasons}; see the engines' logs"
            )
        if now - max(waiter.since, self._moved) < self._stall_limit_s:
            return None
        clock = time.strftime("%H:%M:%S", time.localtime(time.time() - (now - waiter.since)))
        stats = self.stats()
        return WaitTimeout(
            f"wait of request {_describe(waiter.payload)} for room on an engine, got none since {clock}, and no request "
            f"ended for {self._stall_limit_s:g} s: in flight {stats.in_flight} of {self._concurrency} samples each, "
            f"{stats.queued} queued; engines are stuck or were left paused, see their logs"
        )

    def _dispatch(self) -> None:
        """Gives places to the head of the queue while there are any."""
        while self._queue:
            waiter = self._queue[0]
            if waiter.future.done():  # cancelled, and not yet cleaned up by its task
                self._queue.popleft()
                continue
            fitting = [
                seat
                for seat in self._seats
                if seat.down is None and seat.in_flight + waiter.places <= self._concurrency
            ]
            if not fitting:
                return
            seat = min(fitting, key=lambda seat: seat.in_flight)
            seat.in_flight += waiter.places
            self._queue.popleft()
            waiter.future.set_result(seat)

    def _give_back(self, seat: _Seat, places: int) -> None:
        seat.in_flight -= places
        self._moved = time.monotonic()
        self._dispatch()

    # --------------------------------------------------------------------------------------------------------- failing

    def _seat(self, name: str) -> _Seat:
        return next(seat for seat in self._seats if seat.client.name == name)

    def _mark_down(self, seat: _Seat, client: EngineClient, error: EngineError) -> None:
        """A request to `client` failed, who may have been replaced meanwhile."""
        if seat.down is not None or seat.client is not client:
            return
        logger.warning("%s is down: %s", client.name, error)
        self._set_down(seat, str(error))
        seat.probe = asyncio.create_task(self._probe(seat), name=f"probe {client.name}")

    def _set_down(self, seat: _Seat, why: str) -> None:
        seat.down = why
        if self._none_left_since is None and all(other.down is not None for other in self._seats):
            self._none_left_since = time.monotonic()

    def _set_up(self, seat: _Seat) -> None:
        seat.down, self._none_left_since, self._moved = None, None, time.monotonic()
        self._dispatch()

    def _stop_probe(self, seat: _Seat) -> None:
        if seat.probe is not None:
            seat.probe.cancel()
            seat.probe = None

    async def _probe(self, seat: _Seat) -> None:
        """Looks at an engine that is down until it answers again, with the weights that it should hold."""
        while True:
            await asyncio.sleep(_PROBE_INTERVAL_S)
            try:
                await seat.client.health()
                version = None if self.version is None else await seat.client.version()
            except EngineError:
                continue
            if version != self.version:
                seat.down = f"it answers with weights {version} where the run has {self.version}"
                continue
            logger.warning("%s answers again", seat.client.name)
            seat.probe = None
            self._set_up(seat)
            return


def count_samples(payload: Mapping[str, Any]) -> int:
    """Samples that a /generate payload asks for: rows, times `n` of its sampling parameters."""
    ids, text = payload.get("input_ids"), payload.get("text")
    if ids is not None:
        rows = len(ids) if len(ids) and hasattr(ids[0], "__len__") else 1
    else:
        rows = len(text) if isinstance(text, (list, tuple)) else 1
    params = payload.get("sampling_params") or {}
    if isinstance(params, Mapping):
        return rows * int(params.get("n") or 1)
    return sum(int(entry.get("n") or 1) for entry in params)


def _describe(payload: Mapping[str, Any]) -> str:
    rid = payload.get("rid")
    if isinstance(rid, (list, tuple)):
        rid = f"{rid[0]} and {len(rid) - 1} more" if rid else None
    return f"{rid or 'without rid'} ({count_samples(payload)} samples)"


def _closing() -> EngineError:
    return EngineError("engine pool, got a request after it was closed: the run is ending; generate before `close`")


async def _all(calls: Sequence[Any]) -> None:
    """Waits for all of them, then raises the first failure."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
