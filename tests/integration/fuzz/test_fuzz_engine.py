"""Hostile HTTP at a real engine process: every request gets an answer of one clear line, and the engine serves on as before."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzzing import JSON, NUMBERS, SCALARS, TEXTS, assert_one_clear_line, fuzz
from tests.unit.engines_embedded.checkpoints import VOCAB_SIZE, save_checkpoint

TOKEN = "a-token-of-this-test"
#: No answer takes this long: the context holds 256 tokens.
ANSWER_LIMIT_S = 20.0
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


@dataclass
class Engine:
    process: subprocess.Popen[bytes]
    url: str
    log: Path
    client: httpx.Client
    stranger: httpx.Client
    """Without the token."""
    greedy: Any

    def send(self, method: str, path: str, content: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        return self.client.request(method, self.url + path, content=content, headers=headers or {})

    def post(self, path: str, body: Any) -> httpx.Response:
        # json.dumps and not orjson: lone surrogates and NaN are part of the game.
        return self.send("POST", path, json.dumps(body).encode("utf-8", "surrogatepass"))

    def ask(self) -> Any:
        reply = self.post(
            "/generate", {"input_ids": [5, 6, 7], "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
        )
        assert reply.status_code == 200, reply.text
        return reply.json()["output_ids"]

    def assert_well(self) -> None:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        self.post("/continue_generation", {})
        assert self.ask() == self.greedy
        assert "Traceback" not in self.log.read_text(), self.log.read_text()[-4000:]


def check(reply: httpx.Response) -> None:
    """An answer, or a refusal in one line. A 5xx would be a bug of ours."""
    assert reply.status_code < 500, f"{reply.request.url.path}: {reply.text[:500]}"
    if reply.status_code != 200:
        assert_one_clear_line(reply.json()["message"])


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("fuzz")
    save_checkpoint(directory / "model")
    log = directory / "engine.log"
    command = [sys.executable, "-m", "miles.engines.embedded", "--model-path", str(directory / "model"), "--port", "0"]
    command += ["--weight-version", "0", "--max-running-requests", "16"]
    environment = os.environ | {"MILES_ENGINE_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors)
    try:
        assert process.stdout is not None
        found = re.fullmatch(rb"miles-engine ready url=(http://\S+)\n", process.stdout.readline())
        assert found, log.read_text()
        threading.Thread(target=process.stdout.read, daemon=True).start()
        url = found[1].decode()
        with (
            httpx.Client(headers=AUTHORIZED, timeout=ANSWER_LIMIT_S) as client,
            httpx.Client(timeout=ANSWER_LIMIT_S) as stranger,
        ):
            engine = Engine(process, url, log, client, stranger, None)
            engine.greedy = engine.ask()
            yield engine
            engine.assert_well()
    finally:
        process.kill()
        process.wait(10)


# -------------------------------------------------------------------------------------------------------------- the bodies

IDS = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=5)
HOSTILE = st.one_of(SCALARS, JSON)


def fields(valid: dict[str, Any]) -> Any:
    """Objects of these fields, each with the value that belongs there, a hostile one, or missing; and one that nobody knows."""
    columns = {name: st.one_of(good, good, HOSTILE) for name, good in valid.items()}
    return st.one_of(
        st.fixed_dictionaries({}, optional=columns),
        st.builds(
            lambda body, extra: body | extra,
            st.fixed_dictionaries({}, optional=columns),
            st.dictionaries(TEXTS, JSON, max_size=1),
        ),
    )


SAMPLING = fields(
    {
        "max_new_tokens": st.integers(0, 8),
        "min_new_tokens": st.integers(0, 4),
        "n": st.integers(1, 3),
        "temperature": st.one_of(st.floats(0, 2), st.sampled_from([0, 1e-320, 1e-30, 1e300])),
        "top_p": st.floats(0.01, 1),
        "top_k": st.integers(-1, 60),
        "min_p": st.floats(0, 1),
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2),
        "repetition_penalty": st.one_of(st.floats(0.01, 2), st.just(1e-300)),
        "stop": st.one_of(TEXTS, st.lists(TEXTS, max_size=3)),
        "stop_token_ids": IDS,
        "stop_regex": TEXTS,
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "no_stop_trim": st.booleans(),
        "logit_bias": st.dictionaries(st.one_of(st.integers(0, 60).map(str), TEXTS), NUMBERS, max_size=3),
        "sampling_seed": st.integers(0, 2**64 - 1),
    }
)  # fmt: skip

GENERATE = fields(
    {
        "text": st.one_of(TEXTS, st.lists(TEXTS, max_size=3)),
        "input_ids": st.one_of(IDS, st.lists(IDS, min_size=1, max_size=3)),
        "sampling_params": st.one_of(SAMPLING, st.lists(SAMPLING, max_size=3)),
        "rid": st.one_of(TEXTS, st.lists(TEXTS, max_size=3)),
        "return_logprob": st.one_of(st.booleans(), st.lists(st.booleans(), max_size=3)),
        "logprob_start_len": st.integers(-1, 4),
        "top_logprobs_num": st.integers(0, 5),
        "return_text_in_logprobs": st.booleans(),
        "stream": st.booleans(),
    }
)

TENSOR = fields(
    {
        "name": TEXTS,
        "dtype": st.sampled_from(["float32", "bfloat16", "int4"]),
        "shape": st.lists(NUMBERS, max_size=3),
        "offset": NUMBERS,
    }
)
CONTROL: dict[str, Any] = {
    "/abort_request": fields({"rid": TEXTS, "abort_all": st.booleans()}),
    "/pause_generation": fields({"mode": st.sampled_from(["abort", "retract", "in_place"])}),
    "/continue_generation": JSON,
    "/update_weights_from_tensor": fields(
        {
            "load_format": st.just("miles_shm"),
            "segment": st.one_of(TEXTS, st.sampled_from(["/dev/zero", "/proc/self/mem", "/proc/1/fd/0", "/etc/hostname", "/dev/shm", "/proc/self/fd/0"])),
            "tensors": st.lists(st.one_of(TENSOR, HOSTILE), max_size=2),
            "progress": NUMBERS,
            "adopt": NUMBERS,
            "samples": NUMBERS,
            "weight_version": TEXTS,
            "continue_generation": st.booleans(),
            "flush_cache": st.booleans(),
            "serialized_named_tensors": st.lists(TEXTS, max_size=1),
        }
    ),
    "/update_weight_version": fields({"new_version": TEXTS, "abort_all_requests": st.booleans(), "continue_generation": st.booleans()}),
    "/weights_checker": fields({"action": st.sampled_from(["checksum", "snapshot", "compare"])}),
}  # fmt: skip


@fuzz(150)
@given(body=st.one_of(GENERATE, JSON))
def test_fuzz_generate(engine: Engine, body: Any) -> None:
    check(engine.post("/generate", body))


@fuzz(120)
@given(data=st.data(), path=st.sampled_from(sorted(CONTROL)))
def test_fuzz_control(engine: Engine, data: st.DataObject, path: str) -> None:
    check(engine.post(path, data.draw(st.one_of(CONTROL[path], JSON))))
    engine.assert_well()


@fuzz(60)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
    path=st.one_of(
        st.sampled_from(["/", "/generate", "/flush_cache?timeout=inf", "/flush_cache?timeout=nan", "/flush_cache?timeout=-1", "/flush_cache?timeout=%00", "/v1/models", "/generate/../health", "//", "/%2e%2e", "/server_info", "/health"]),
        st.text("abc/%?&=.0", max_size=12).map(lambda text: "/" + text),
    ),
    content=st.one_of(st.binary(max_size=40), st.sampled_from([b"[" * 100000, b'{"a":' * 5000, b"\xff\xfe{}", b"{}" * 3, b"NaN", b'{"input_ids": [1], "input_ids": [2]}'])),
)  # fmt: skip
def test_fuzz_paths_and_bytes(engine: Engine, method: str, path: str, content: bytes) -> None:
    reply = engine.send(method, path, content)
    assert reply.status_code < 500, reply.text
    if reply.status_code != 200 and reply.content:
        assert_one_clear_line(reply.json()["message"])


@fuzz(60)
@given(
    path=st.sampled_from(["/generate", "/model_info", "/server_info", "/v1/models", "/flush_cache", "/health_generate", *CONTROL]),
    header=st.one_of(
        st.none(),
        st.sampled_from(["", "Bearer", f"bearer {TOKEN}", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Bearer  {TOKEN}", "Bearer " + "A" * 4000]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40).map(str.strip),
    ),
)  # fmt: skip
def test_fuzz_token(engine: Engine, path: str, header: str | None) -> None:
    """Without exactly the token there is no work and no knowledge, whatever the request says."""
    method = "GET" if path in ("/model_info", "/server_info", "/v1/models", "/health_generate") else "POST"
    headers = {} if header is None else {"Authorization": header}
    reply = engine.stranger.request(
        method, f"{engine.url}{path}?token={TOKEN}", json={"token": TOKEN, "api_key": TOKEN}, headers=headers
    )
    assert reply.status_code == 401, reply.text
    assert TOKEN not in reply.text


# ---------------------------------------------------------------------------------------------------------------- the wire


def wire(engine: Engine, data: bytes, *, half_close: bool = False) -> bytes:
    """What comes back for these bytes, at most a little of it; empty where the engine closes without a word."""
    target = urlsplit(engine.url)
    with socket.create_connection((target.hostname, target.port), timeout=ANSWER_LIMIT_S) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        try:
            return connection.recv(4096)
        except ConnectionResetError:
            return b""


HEAD = f"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode()


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # TLS to a plain port
        b"GET / HTTP/9.9\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        HEAD + b"Content-Length: 99999999999999\r\n\r\n{}",
        HEAD + b"Content-Length: 20\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
        HEAD + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
        HEAD + b"X: " + b"A" * 100_000 + b"\r\n\r\n",
        HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n",
    ],
    ids=lambda data: repr(data[:60]),
)
def test_fuzz_wire(engine: Engine, data: bytes) -> None:
    """Broken HTTP from a client that then goes away: refused or dropped; never a 200, never the end of the engine."""
    answer = wire(engine, data, half_close=True)
    assert not answer.startswith(b"HTTP/1.1 200"), answer
    assert b"Traceback" not in answer
    engine.assert_well()


def test_clients_that_stop_half_way_hold_nobody_up(engine: Engine) -> None:
    target = urlsplit(engine.url)
    slow = [socket.create_connection((target.hostname, target.port)) for _ in range(50)]
    try:
        for connection in slow:
            connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        engine.assert_well()
    finally:
        for connection in slow:
            connection.close()
    engine.assert_well()
