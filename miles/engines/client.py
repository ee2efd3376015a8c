"""One rollout engine over HTTP, as SGLang's protocol has it: generation, control, weight updates.

Every request has one time limit that covers all its tries. A try is repeated only where that is safe and can help: no
connection was made, it broke off before the answer, or a gateway answered 502, 503 or 504. All calls made here may be
repeated: control calls set a state, a bucket written twice is the same bucket, and of a generation that broke off nothing
was used. What the engine refuses (4xx) or fails at (500) is never sent again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from miles.errors import (
    EngineError,
    EngineRequestError,
    EngineTimeout,
    EngineUnreachable,
    WeightUpdateError,
)
from miles.types import WeightVersion

logger = logging.getLogger(__name__)

#: Tries of one request, all within its time limit; a wait between them is anything up to 0.1 s, 0.2 s and so on to 2 s.
MAX_TRIES = 4

#: Answers of something between us and the engine that it is not there for the moment.
_GATEWAY_STATUSES = frozenset({502, 503, 504})

#: Token ids may come as arrays, and the keys of a `logit_bias` as ints.
_JSON_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS

#: Spreads retries. Not Python's global stream: a trainer's is part of its checkpoints, and would depend on how often an
#: engine did not answer.
_JITTER = random.Random()


@dataclass(frozen=True)
class Timeouts:
    """Seconds until a call is given up, its repetitions included."""

    connect_s: float = 5.0
    """One attempt to connect."""
    health_s: float = 10.0
    control_s: float = 60.0
    """Pausing, versions, aborts, information, checksums."""
    update_s: float = 300.0
    """Loading one bucket."""
    generate_s: float = 600.0
    """One generation request, the time that the engine is paused included."""


class EngineClient:
    """Implements `miles.interfaces.Engine`, and generation. Cheap to make; connects at the first call.

    Used from one event loop at a time: `close` it there before another loop uses it. Any number of calls may run at once.
    Raises `EngineRequestError` (4xx), `EngineUnreachable`, `EngineTimeout`, else `EngineError`; of a weight update
    `WeightUpdateError`. Each names engine and endpoint.
    """

    def __init__(self, name: str, url: str, token: str, *, timeouts: Timeouts | None = None) -> None:
        self._name = name
        self.url = url.rstrip("/")
        self._token = token
        self.timeouts = timeouts or Timeouts()
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._aborts: set[asyncio.Task[None]] = set()
        self._retired: str | None = None

    def __repr__(self) -> str:
        return f"EngineClient({self._name!r}, {self.url!r})"

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @property
    def name(self) -> str:
        return self._name

    @property
    def identity(self) -> str:
        """Name and address: no two processes that live have both."""
        return f"{self._name} {self.url}"

    @property
    def authorization(self) -> str:
        """The header value that the engine asks for. Secret: for requests to this engine's URL alone."""
        return f"Bearer {self._token}"

    async def close(self) -> None:
        """Closes all connections. The next call opens new ones."""
        for task in tuple(self._aborts):
            task.cancel()
        session, self._session, self._loop = self._session, None, None
        if session is not None:
            await session.close()

    async def retire(self, why: str) -> None:
        """The engine is gone for good: what runs fails with `EngineUnreachable` at once, as does every later call."""
        self._retired = why
        await self.close()

    # ------------------------------------------------------------------------------------------------------ generation

    async def generate(self, payload: Mapping[str, Any]) -> Any:
        """POST /generate: a dict with `text`, `output_ids` and `meta_info`; a list of them for a batch or `n` > 1.

        When this call is given up (time limit, cancellation) the engine is told to abort the payload's `rid`s, if any.
        """
        try:
            return await self._call("POST", "/generate", payload, limit_s=self.timeouts.generate_s)
        except (EngineTimeout, asyncio.CancelledError):
            self._abort_later(payload.get("rid"))
            raise

    async def abort(self, rid: str | None = None) -> None:
        """Ends one request, or all of them; their callers get what was generated so far."""
        await self._control("/abort_request", {"abort_all": True} if rid is None else {"rid": rid})

    def _abort_later(self, rids: str | list[str] | None) -> None:
        if rids and self._session is not None:
            for rid in [rids] if isinstance(rids, str) else rids:
                task = asyncio.create_task(self._try_abort(rid))
                self._aborts.add(task)
                task.add_done_callback(self._aborts.discard)

    async def _try_abort(self, rid: str) -> None:
        try:
            await self.abort(rid)
        except EngineError as error:
            logger.info("abort of %s was not heard: %s", rid, error)

    # --------------------------------------------------------------------------------------------------------- control

    async def health(self) -> None:
        await self._call("GET", "/health", limit_s=self.timeouts.health_s)

    async def model_info(self) -> dict[str, Any]:
        """GET /model_info: among others the live `weight_version`."""
        return await self._call("GET", "/model_info", limit_s=self.timeouts.control_s)

    async def server_info(self) -> dict[str, Any]:
        """GET /server_info: the engine's arguments. Its weight version may lag behind `model_info`."""
        return await self._call("GET", "/server_info", limit_s=self.timeouts.control_s)

    async def pause(self, mode: str = "abort") -> None:
        await self._control("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self._control("/continue_generation", {})

    # --------------------------------------------------------------------------------------------------------- weights

    async def update_weights(self, payload: dict[str, Any]) -> dict[str, Any]:
        endpoint = "/update_weights_from_tensor"
        try:
            reply = await self._call("POST", endpoint, payload, limit_s=self.timeouts.update_s)
            self._expect_success(endpoint, reply)
        except EngineError as error:
            raise WeightUpdateError(str(error)) from error
        return reply

    async def serve(self, version: WeightVersion) -> None:
        """One call where the engine knows of it, two with SGLang."""
        body = {"new_version": version, "continue_generation": True, "abort_all_requests": False}
        reply = await self._control("/update_weight_version", body)
        if not reply.get("serving"):
            await self.resume()

    async def version(self) -> WeightVersion:
        return str((await self.model_info())["weight_version"])

    async def checksums(self) -> dict[str, str]:
        endpoint = "/weights_checker"
        reply = await self._control(endpoint, {"action": "checksum"})
        merged: dict[str, str] = {}
        for part in reply.get("checksums") or []:
            if twice := merged.keys() & part.keys():
                raise EngineError(
                    f"engine {self._name}: POST {endpoint}, got several checksums of {min(twice)}: its ranks hold parts of "
                    f"tensors, which cannot be compared with whole ones; use engines of one GPU for this check"
                )
            merged.update(part)
        if not merged:
            raise EngineError(f"engine {self._name}: POST {endpoint}, got no checksums: {_first_line(reply)}")
        return merged

    # -------------------------------------------------------------------------------------------------------- requests

    async def _control(self, endpoint: str, body: Mapping[str, Any]) -> dict[str, Any]:
        reply = await self._call("POST", endpoint, body, limit_s=self.timeouts.control_s)
        self._expect_success(endpoint, reply)
        return reply if isinstance(reply, dict) else {}

    def _expect_success(self, endpoint: str, reply: Any) -> None:
        """SGLang reports some failures with status 200."""
        if isinstance(reply, dict) and reply.get("success") is False:
            raise EngineError(f"engine {self._name}: POST {endpoint}, got success=false: {_first_line(reply)}")

    async def _call(self, method: str, endpoint: str, body: Mapping[str, Any] | None = None, *, limit_s: float) -> Any:
        """The parsed JSON answer; None where the body is empty or no JSON is due (/health)."""
        where = f"engine {self._name}: {method} {endpoint}"
        data = orjson.dumps(body, option=_JSON_OPTIONS) if body is not None else None
        since = time.time()
        try:
            async with asyncio.timeout(limit_s):
                tries = 0
                while True:  # by hand: tenacity takes a third of what a whole call costs the client
                    try:
                        return await self._try(method, endpoint, data, where)
                    except EngineUnreachable:
                        tries += 1
                        if tries >= MAX_TRIES or self._retired is not None:
                            raise
                    await asyncio.sleep(_JITTER.uniform(0, min(2.0, 0.1 * 2 ** (tries - 1))))
        except TimeoutError as error:
            clock = time.strftime("%H:%M:%S", time.localtime(since))
            rid = f" for {rids}" if (rids := (body or {}).get("rid")) else ""
            raise EngineTimeout(
                f"{where}{rid}, got no answer within {limit_s:g} s (asked at {clock}): the engine is stuck, paused or too "
                f"slow for this limit; see its log"
            ) from error

    async def _try(self, method: str, endpoint: str, data: bytes | None, where: str) -> Any:
        if self._retired is not None:
            raise EngineUnreachable(f"{where} at {self.url}, got no engine: {self._retired}")
        try:
            async with self._open_session().request(
                method, self.url + endpoint, data=data, allow_redirects=False
            ) as response:
                content = await response.read()
                status = response.status
        except (aiohttp.ClientError, ConnectionError) as error:
            raise EngineUnreachable(
                f"{where} at {self.url}, got {type(error).__name__}: {error}; the process died or its host is out of reach"
            ) from error
        if status in _GATEWAY_STATUSES:
            raise EngineUnreachable(f"{where}, got HTTP {status}: {_first_line(content)}")
        if 400 <= status < 500:
            raise EngineRequestError(f"{where}, got HTTP {status}: {_first_line(content)}")
        if status != 200:
            raise EngineError(f"{where}, got HTTP {status}: {_first_line(content)}")
        if not content or endpoint == "/health":
            return None
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise EngineError(f"{where}, got an answer that is not JSON: {_first_line(content)}") from error

    def _open_session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # How many requests run at once is the pool's decision alone.
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.timeouts.connect_s),
                headers={"Authorization": self.authorization, "Content-Type": "application/json"},
            )
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError(
                f"client of engine {self._name}, got a second event loop: its connections belong to the first; "
                f"`await client.close()` there before"
            )
        return self._session


def _first_line(content: bytes | Mapping[str, Any]) -> str:
    """What an error answer says, in one line: its message where it is JSON, else the body's beginning."""
    value: Any = content
    if isinstance(content, bytes):
        try:
            value = orjson.loads(content)
        except orjson.JSONDecodeError:
            value = content.decode("utf-8", "replace")
    while isinstance(value, Mapping):
        found = next((value[key] for key in ("message", "error", "detail") if value.get(key)), None)
        if found is None:
            value = orjson.dumps(dict(value), default=str).decode()
            break
        value = found
    lines = str(value).strip().splitlines()
    return lines[0][:500] if lines else "(empty answer)"
