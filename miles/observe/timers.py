"""The one timer: named phases of a step, in seconds of wall clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timers:
    """Adds up seconds per phase until they are taken.

    >>> timers = Timers()
    >>> with timers.phase("generate"):
    ...     pass
    >>> sorted(timers.take())
    ['perf/generate_time']
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """`perf/<phase>_time` -> seconds since the last call, which this call starts anew."""
        taken, self._seconds = self._seconds, {}
        return {f"perf/{name}_time": seconds for name, seconds in taken.items()}
