"""What the reward pool and its workers say to each other: JSON objects behind a 4-byte big-endian length.

    pool -> worker   {"setup": {...}}                                   once
                     {"id", "target", "items", "seeds", "timeout_s"}    a call: one or several items
    worker -> pool   {"ready": {target: concurrent}} | {"error"}        once
                     {"id", "item", "rewards", "changes"}               an item is scored
                     {"id", "item", "error", "traceback", "timeout"}    an item failed

No pickle: a reward worker handles model text and users' code, and neither should be able to run anything here.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import orjson

Frame: TypeAlias = dict[str, Any]
_LENGTH_BYTES = 4
_MAX_BYTES = 1 << 30
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


def encode(frame: Frame) -> bytes:
    """Raises `TypeError` when something in the frame is not JSON."""
    body = orjson.dumps(frame, option=_OPTIONS)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


async def read(stream: asyncio.StreamReader) -> Frame | None:
    """The next frame; None at the end of the stream, also in the middle of a frame."""
    try:
        length = int.from_bytes(await stream.readexactly(_LENGTH_BYTES), "big")
        if length > _MAX_BYTES:
            return None
        frame: Frame = orjson.loads(await stream.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return frame
