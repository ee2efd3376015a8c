"""Notices when something blocks the event loop, and says what: a generation hook that sleeps stops every other one."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback

logger = logging.getLogger(__name__)


class LoopWatchdog:
    """A thread that asks the loop for a sign of life and logs the loop's stack when none comes for `limit_s` seconds.

    Costs one callback every quarter of the limit. Use as a context manager in the loop's thread.
    """

    def __init__(self, limit_s: float = 5.0):
        self._limit_s = limit_s
        self._stop = threading.Event()
        self._alive_at = time.monotonic()
        self.blocks = 0
        """How often the loop was blocked for longer than the limit."""
        self.blocked_s = 0.0
        """Seconds of these blocks, those that ended."""

    def __enter__(self) -> LoopWatchdog:
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._alive_at = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="loop-watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(timeout=self._limit_s)

    def _watch(self) -> None:
        blocked_since: float | None = None
        while not self._stop.wait(self._limit_s / 4):
            now = time.monotonic()
            silent_s = now - self._alive_at
            if blocked_since is None and silent_s > self._limit_s:
                blocked_since = self._alive_at
                self.blocks += 1
                logger.warning(
                    "the rollout's event loop, got no turn for %.1f s: this code blocks it; await there, or use a thread\n%s",
                    silent_s,
                    self._stack(),
                )
            elif blocked_since is not None and silent_s < self._limit_s:
                self.blocked_s += self._alive_at - blocked_since
                logger.warning("the rollout's event loop runs again after %.1f s", self._alive_at - blocked_since)
                blocked_since = None
            try:
                self._loop.call_soon_threadsafe(self._mark)
            except RuntimeError:  # the loop is closed
                return

    def _mark(self) -> None:
        self._alive_at = time.monotonic()

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._loop_thread)
        return "".join(traceback.format_stack(frame)) if frame is not None else "(no stack: the loop's thread is gone)"
