"""remote_rm: the score comes from an HTTP service at --rm-url.

POST {"prompt", "response", "label", "metadata"} -> 200 with a number, or a JSON object that --reward-key selects from
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import httpx
import orjson
import tenacity

from miles.errors import ConfigError, HookError
from miles.interfaces import Args
from miles.types import Sample

#: What a repetition may mend: no connection, a connection lost, a service that says it failed itself.
_TRANSIENT = (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError)

_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = weakref.WeakKeyDictionary()


class ServiceError(Exception):
    """The service is there and failed (5xx): asking again may help."""


def _client() -> httpx.AsyncClient:
    """One pooled client for each event loop; connections cannot move between loops."""
    loop = asyncio.get_running_loop()
    if loop not in _clients:
        _clients[loop] = httpx.AsyncClient(limits=httpx.Limits(max_connections=256))
    return _clients[loop]


async def close() -> None:
    """Closes this loop's connections, if there are any."""
    client = _clients.pop(asyncio.get_running_loop(), None)
    if client is not None:
        await client.aclose()


async def remote_rm(args: Args, sample: Sample, *, response: str, timeout_s: float) -> float | dict[str, Any]:
    """Asks the service. A lost connection or a 5xx is tried again --rm-max-retries times; a 4xx or a time-out never is.

    Args:
        timeout_s: seconds for one attempt.

    Raises:
        HookError: the service refused the request (4xx) or its answer is neither a number nor an object.
        ServiceError, httpx.HTTPError, TimeoutError: it kept failing, could not be reached, or not in time.
    """
    url = args.rm_url
    if not url:
        raise ConfigError("--rm-url, got nothing: --rm-type remote_rm asks a service; give its address")
    body = orjson.dumps(
        {"prompt": sample.prompt, "response": response, "label": sample.label, "metadata": sample.metadata},
        option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS,
    )
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type((*_TRANSIENT, ServiceError)),
        stop=tenacity.stop_after_attempt(1 + args.rm_max_retries),
        wait=tenacity.wait_exponential_jitter(initial=0.1, max=2.0),
        reraise=True,
    )
    return await retrying(_ask, url, body, timeout_s)


async def _ask(url: str, body: bytes, timeout_s: float) -> float | dict[str, Any]:
    try:
        async with asyncio.timeout(timeout_s):  # httpx's own limit is for each read, not for the whole
            reply = await _client().post(
                url, content=body, headers={"content-type": "application/json"}, timeout=timeout_s
            )
    except (TimeoutError, httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout):
        raise TimeoutError(f"reward service {url}, got no answer within --rm-timeout {timeout_s:g} s") from None
    first_line = reply.text.strip().splitlines()[0][:200] if reply.text.strip() else ""
    if reply.status_code >= 500:
        raise ServiceError(f"{url}, got HTTP {reply.status_code}: {first_line}")
    if reply.status_code != 200:
        raise HookError(f"reward service {url}, got HTTP {reply.status_code}: {first_line}")
    try:
        score = orjson.loads(reply.content)
    except orjson.JSONDecodeError:
        score = None
    if isinstance(score, bool) or not isinstance(score, int | float | dict):
        raise HookError(f"reward service {url}, got {first_line!r}: it must answer a JSON number or object")
    return score
