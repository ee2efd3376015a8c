"""The engine as a process: ready line, token, protocol of /generate, weight updates, and how it ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import torch
import xxhash

from tests.unit.engines_embedded.checkpoints import EOS, VOCAB_SIZE, make_model, make_tokenizer, save_checkpoint

TOKEN = "a-token-of-this-test"
START_LIMIT_S = 90


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    def call(self, method: str, path: str, body: Any = None, token: str | None = TOKEN) -> httpx.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx.request(method, self.url + path, json=body, headers=headers, timeout=60)

    def post(self, path: str, body: Any = None) -> Any:
        reply = self.call("POST", path, body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def get(self, path: str) -> Any:
        reply = self.call("GET", path)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def state(self) -> dict[str, Any]:
        return self.get("/server_info")["internal_states"][0]


def _start(directory: Path, *flags: str, **popen: Any) -> Server:
    environment = os.environ | {"MILES_ENGINE_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "miles.engines.embedded", "--model-path", str(directory), "--port", "0", *flags]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **popen)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"miles-engine ready url=(http://127\.0\.0\.1:\d+)\n", line)
    assert found, f"no ready line but {line!r}"
    return Server(process, found[1])


@contextmanager
def _running(directory: Path, *flags: str) -> Iterator[Server]:
    server = _start(directory, *flags)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait(10)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Server]:
    with _running(directory, "--weight-version", "0", "--max-running-requests", "16") as server:
        yield server


def _wait_until(condition: Any, limit_s: float = 30) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "condition did not come true"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------------ requests


def test_everything_but_health_needs_the_token(server):
    assert server.call("GET", "/health", token=None).status_code == 200
    for method, path in (
        ("GET", "/model_info"),
        ("GET", "/health_generate"),
        ("POST", "/generate"),
        ("POST", "/health"),
        ("POST", "/update_weights_from_tensor"),
        ("GET", "/nowhere"),
    ):
        for token in (None, "wrong", TOKEN + "x"):
            reply = server.call(method, path, token=token)
            assert reply.status_code == 401, path
            assert "token" in reply.json()["message"]


def test_a_single_reply_has_sglangs_shape(server):
    body = {
        "text": "12+34=",
        "rid": "me",
        "sampling_params": {"max_new_tokens": 6, "sampling_seed": 1, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "return_text_in_logprobs": True,
    }
    reply = server.post("/generate", body)
    assert set(reply) == {"text", "output_ids", "meta_info"}
    meta, tokenizer = reply["meta_info"], make_tokenizer()
    assert meta["id"] == "me"
    assert meta["finish_reason"] == {"type": "length", "length": 6}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (6, 6, 0)
    assert meta["weight_version"] == "0"
    assert meta["weight_versions"] == [{"version": "0", "start": 0, "end": 6}]
    assert meta["e2e_latency"] > 0
    assert [entry[1] for entry in meta["output_token_logprobs"]] == reply["output_ids"]
    assert [entry[2] for entry in meta["output_token_logprobs"]] == [tokenizer.decode([i]) for i in reply["output_ids"]]
    assert all(entry[0] <= 0 for entry in meta["output_token_logprobs"])
    assert meta["input_token_logprobs"][0] == [None, 4, "1"]
    assert len(meta["input_token_logprobs"]) == 6
    assert [len(top) for top in meta["output_top_logprobs"]] == [2] * 6
    assert meta["input_top_logprobs"][0] is None
    assert reply["text"] == tokenizer.decode(reply["output_ids"], skip_special_tokens=True)
    assert server.post("/generate", body)["output_ids"] == reply["output_ids"]


def test_batches_and_n_are_lists_in_order(server):
    params = {"max_new_tokens": 2, "ignore_eos": True}
    assert len(server.post("/generate", {"input_ids": [5], "sampling_params": params | {"n": 3}})) == 3
    replies = server.post(
        "/generate", {"input_ids": [[5], [6, 7]], "sampling_params": params | {"n": 2}, "rid": ["a", "b"]}
    )
    assert [r["meta_info"]["prompt_tokens"] for r in replies] == [1, 1, 2, 2]
    assert [r["meta_info"]["id"] for r in replies] == ["a_0", "a_1", "b_0", "b_1"]
    assert isinstance(server.post("/generate", {"text": ["1"], "sampling_params": params}), list)
    assert "output_token_logprobs" not in replies[0]["meta_info"]


def test_stop_token_stays_in_ids_and_leaves_the_text(server):
    params = {"max_new_tokens": 5, "logit_bias": {str(EOS): 1e6}, "skip_special_tokens": False}
    reply = server.post("/generate", {"input_ids": [5], "sampling_params": params})
    assert (reply["output_ids"], reply["text"]) == ([EOS], "")
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
    kept = server.post("/generate", {"input_ids": [5], "sampling_params": params | {"no_stop_trim": True}})
    assert kept["text"] == "<end>"


def test_stop_strings_are_trimmed_from_the_text_alone(server):
    free = server.post(
        "/generate",
        {"input_ids": [5], "sampling_params": {"max_new_tokens": 30, "ignore_eos": True, "sampling_seed": 3}},
    )
    stop = free["text"][10:12]
    params = {"max_new_tokens": 30, "ignore_eos": True, "sampling_seed": 3, "stop": stop}
    trimmed = server.post("/generate", {"input_ids": [5], "sampling_params": params})
    whole = server.post("/generate", {"input_ids": [5], "sampling_params": params | {"no_stop_trim": True}})
    assert trimmed["text"] == free["text"][: free["text"].index(stop)]
    assert whole["text"] == trimmed["text"] + stop
    assert trimmed["output_ids"] == whole["output_ids"]
    assert trimmed["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


@pytest.mark.parametrize(
    ("path", "content", "named"),
    [
        ("/generate", b"{not json", "not JSON"),
        ("/generate", b"[1]", "object"),
        ("/generate", b'{"input_ids": [99999]}', "vocabulary"),
        ("/generate", b'{"text": "1", "sampling_params": {"json_schema": "{}"}}', "json_schema"),
        ("/generate", b'{"text": "1", "stream": 1}', "stream"),
        ("/abort_request", b"{}", "rid"),
        ("/pause_generation", b'{"mode": "later"}', "in_place"),
        ("/pause_generation", b'{"mode": "sideways"}', "sideways"),
        ("/update_weight_version", b"{}", "new_version"),
        ("/update_weight_version", b'{"new_version": "1", "partial": true}', "partial"),
        ("/weights_checker", b'{"action": "snapshot"}', "snapshot"),
        ("/update_weights_from_tensor", b'{"serialized_named_tensors": ["gASV"]}', "pickled"),
        ("/update_weights_from_tensor", b'{"load_format": "flattened_bucket"}', "miles_shm"),
        ("/update_weights_from_tensor", b'{"load_format": "miles_shm"}', "segment"),
        ("/update_weights_from_tensor", b'{"load_format": "miles_shm", "segment": "", "tensors": [], "adopt": 1}', "adopt"),
        ("/update_weights_from_tensor", b'{"load_format": "miles_shm", "segment": "", "tensors": [], "samples": 4}', "samples"),
        ("/update_weights_from_tensor", b'{"load_format": "miles_shm", "segment": "", "tensors": [], "continue_generation": true}', "weight_version"),
        ("/update_weight_version", b'{"new_version": "1", "continue_generation": 1}', "continue_generation"),
        ("/flush_cache?timeout=soon", b"", "timeout"),
    ],
)  # fmt: skip
def test_bad_input_is_400_with_one_line_and_the_engine_lives(server, path, content, named):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    reply = httpx.post(server.url + path, content=content, headers=headers, timeout=30)
    assert reply.status_code == 400, reply.text
    message = reply.json()["error"]["message"]
    assert named in message
    assert "\n" not in message
    assert server.call("GET", "/health_generate").status_code == 200


def test_information_and_unknown_paths(server, directory):
    for path in ("/model_info", "/get_model_info"):
        info = server.get(path)
        assert (info["model_path"], info["weight_version"], info["vocab_size"]) == (str(directory), "0", VOCAB_SIZE)
    info = server.get("/server_info")
    assert "api_key" not in info
    assert TOKEN not in str(info)
    assert info["max_running_requests"] == 16
    assert server.get("/v1/models")["data"][0]["id"] == str(directory)
    reply = server.call("POST", "/update_weights_from_disk", {})
    assert reply.status_code == 404
    assert "/generate" in reply.json()["message"]
    assert server.call("GET", "/generate").status_code == 405


def test_flush_cache_is_refused_while_requests_run(server):
    assert server.post("/flush_cache")["success"]

    async def scenario() -> None:
        async with aiohttp.ClientSession(server.url, headers={"Authorization": f"Bearer {TOKEN}"}) as session:
            body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 240, "ignore_eos": True, "n": 16}}
            running = asyncio.create_task(session.post("/generate", json=body))
            while True:
                async with session.get("/server_info") as reply:
                    if (await reply.json())["internal_states"][0]["num_running_reqs"]:
                        break
            async with session.post("/flush_cache") as reply:
                assert reply.status == 400
            async with session.post("/flush_cache?timeout=30") as reply:
                assert reply.status == 200
            assert (await running).status == 200

    asyncio.run(scenario())


def test_abort_by_rid_returns_partial_output(server):
    async def scenario() -> None:
        async with aiohttp.ClientSession(server.url, headers={"Authorization": f"Bearer {TOKEN}"}) as session:
            params = {"max_new_tokens": 240, "ignore_eos": True}
            body = {"input_ids": [[5]] * 64, "rid": "many", "sampling_params": params, "return_logprob": True}
            running = asyncio.create_task(session.post("/generate", json=body))
            await asyncio.sleep(0.2)
            async with session.post("/abort_request", json={"rid": "many"}) as reply:
                assert reply.status == 200
            async with await running as reply:
                assert reply.status == 200
                rows = await reply.json()
            async with session.post("/abort_request", json={"rid": "nobody"}) as reply:
                assert reply.status == 200
        reasons = [row["meta_info"]["finish_reason"]["type"] for row in rows]
        assert "abort" in reasons
        for row in rows:
            assert len(row["meta_info"]["output_token_logprobs"]) == len(row["output_ids"])

    asyncio.run(scenario())


def test_a_client_that_goes_away_frees_its_rows(server):
    async def scenario() -> None:
        async with aiohttp.ClientSession(server.url, headers={"Authorization": f"Bearer {TOKEN}"}) as session:
            body = {"input_ids": [[5]] * 200, "sampling_params": {"max_new_tokens": 240, "ignore_eos": True}}
            running = asyncio.create_task(session.post("/generate", json=body))
            await asyncio.sleep(0.3)
            running.cancel()

    before = server.state()["finished_rows"]
    asyncio.run(scenario())
    _wait_until(lambda: server.state()["num_running_reqs"] == 0 and server.state()["num_waiting_reqs"] == 0, 10)
    assert server.state()["finished_rows"] == before + 200


# ------------------------------------------------------------------------------------------------------ weight updates


@contextmanager
def _segment(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    """The body of /update_weights_from_tensor over a memfd of this process."""
    fd, offset, listed = os.memfd_create("miles-bucket"), 0, []
    try:
        for name, tensor in tensors.items():
            os.pwrite(fd, bytes(tensor.contiguous().numpy().data), offset)
            listed.append({"name": name, "dtype": "float32", "shape": list(tensor.shape), "offset": offset})
            offset += -(-tensor.numel() * 4 // 64) * 64
        yield {"load_format": "miles_shm", "segment": f"/proc/{os.getpid()}/fd/{fd}", "tensors": listed}
    finally:
        os.close(fd)


def _weights(seed: int) -> dict[str, torch.Tensor]:
    return {k: v for k, v in make_model("qwen3_tied", seed).state_dict().items() if k != "lm_head.weight"}


def _refusal(server: Server, path: str, body: Any = None) -> str:
    reply = server.call("POST", path, body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["success"] is False
    return str(reply.json()["message"])


def test_a_weight_update_from_pause_to_continue(directory, tmp_path):
    new, names = _weights(seed=5), list(_weights(seed=5))
    expected = {name: xxhash.xxh3_64_hexdigest(tensor.contiguous().numpy().tobytes()) for name, tensor in new.items()}
    greedy = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True}}
    with _running(directory, "--weight-version", "0") as server:
        old_ids = server.post("/generate", greedy)["output_ids"]
        with _segment(dict(list(new.items())[:4])) as body:
            assert "pause_generation first" in _refusal(server, "/update_weights_from_tensor", body)
        server.post("/pause_generation", {"mode": "abort"})
        assert server.call("GET", "/health_generate").status_code == 503

        # A bucket that does not fit: out of service until a full update.
        with _segment({names[0]: torch.zeros(3, 3)}) as body:
            assert names[0] in _refusal(server, "/update_weights_from_tensor", body)
        assert "not whole" in _refusal(server, "/continue_generation")

        server.post("/pause_generation", {"mode": "abort"})
        for part in (names[:4], names[4:9], names[9:]):
            assert "not sent" in _refusal(server, "/update_weight_version", {"new_version": "1"})
            with _segment({name: new[name] for name in part}) as body:
                reply = server.post("/update_weights_from_tensor", body | {"flush_cache": True})
            assert reply["checksums"] == {name: expected[name] for name in part}
            assert "not whole" in _refusal(server, "/continue_generation")
        assert server.get("/model_info")["weight_version"] == "0"
        server.post("/update_weight_version", {"new_version": "1"})
        assert server.get("/model_info")["weight_version"] == "1"
        server.post("/continue_generation")

        listed = server.post("/weights_checker", {"action": "checksum"})["checksums"]
        assert {name: value for entry in listed for name, value in entry.items()} == expected
        reply = server.post("/generate", greedy)
        assert reply["meta_info"]["weight_version"] == "1"
        assert reply["output_ids"] != old_ids

    reference = tmp_path / "new"
    save_checkpoint(reference, seed=5)
    with _running(reference) as server:
        assert server.post("/generate", greedy)["output_ids"] == reply["output_ids"]


def test_requests_sent_during_an_update_are_served_by_the_new_weights(directory):
    async def scenario(server: Server) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with aiohttp.ClientSession(server.url, headers=headers) as session:

            async def post(path: str, body: Any = None) -> Any:
                async with session.post(path, json=body) as reply:
                    assert reply.status == 200, await reply.text()
                    return await reply.json()

            long = {"input_ids": [5], "sampling_params": {"max_new_tokens": 240, "ignore_eos": True, "n": 256}}
            running = asyncio.create_task(post("/generate", long))
            await asyncio.sleep(0.2)
            await post("/pause_generation", {"mode": "abort"})
            rows = await running
            assert {row["meta_info"]["finish_reason"]["type"] for row in rows} == {"abort"}
            assert {row["meta_info"]["weight_version"] for row in rows} == {"0"}
            held = asyncio.create_task(post("/generate", {"input_ids": [5], "sampling_params": {"max_new_tokens": 2}}))
            await asyncio.sleep(0.1)
            with _segment(_weights(seed=6)) as body:
                # The last bucket may name the version itself.
                await post("/update_weights_from_tensor", body | {"weight_version": "7"})
            assert not held.done()
            await post("/continue_generation")
            meta = (await held)["meta_info"]
            assert [span["version"] for span in meta["weight_versions"]] == ["7"]

    with _running(directory, "--weight-version", "0") as server:
        asyncio.run(scenario(server))


# ----------------------------------------------------------------------------------------------------------- processes


def test_sigterm_answers_what_runs_and_exits_0(directory):
    with _running(directory) as server:

        async def scenario() -> list[dict[str, Any]]:
            async with aiohttp.ClientSession(server.url, headers={"Authorization": f"Bearer {TOKEN}"}) as session:
                body = {"input_ids": [[5]] * 500, "sampling_params": {"max_new_tokens": 240, "ignore_eos": True}}
                running = asyncio.create_task(session.post("/generate", json=body))
                await asyncio.sleep(0.3)
                server.process.send_signal(signal.SIGTERM)
                async with await running as reply:
                    return await reply.json()

        rows = asyncio.run(scenario())
        assert rows[-1]["meta_info"]["finish_reason"]["type"] == "abort"
        assert server.process.wait(15) == 0


def test_the_engine_ends_with_its_parent_even_by_sigkill(directory, tmp_path):
    """The parent holds the pipe to the engine's stdin; killing the parent closes it."""
    launcher = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'miles.engines.embedded', *sys.argv[1:]],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)\n"
        "print(child.pid, child.stdout.readline(), flush=True)\n"
        "time.sleep(600)\n"
    )
    flags = ["--model-path", str(directory), "--port", "0", "--exit-with-parent"]
    environment = os.environ | {"MILES_ENGINE_TOKEN": TOKEN}
    parent = subprocess.Popen(
        [sys.executable, "-c", launcher, *flags], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert parent.stdout is not None
        pid, line = parent.stdout.readline().split(maxsplit=1)
        assert line.startswith("miles-engine ready")
        parent.kill()
        _wait_until(lambda: not _alive(int(pid)), 10)
    finally:
        parent.kill()
        parent.wait(10)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model-path", "/nowhere"], "config.json"),
        (["--device", "tpu"], "--device"),
        (["--context-length", "100000"], "--context-length"),
        (["--max-running-requests", "0"], "--max-running-requests"),
        (["--no-such-flag", "1"], "no-such-flag"),
    ],
)
def test_options_that_cannot_work_exit_2_and_are_named(directory, flags, named):
    command = [sys.executable, "-m", "miles.engines.embedded", "--model-path", str(directory), "--port", "0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_LIMIT_S, check=False)
    assert done.returncode == 2
    assert named in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_without_a_token_one_is_made_and_without_a_tokenizer_ids_are_served(directory):
    environment = {k: v for k, v in os.environ.items() if k != "MILES_ENGINE_TOKEN"}
    command = [sys.executable, "-m", "miles.engines.embedded", "--model-path", str(directory), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--skip-tokenizer-init"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        url = process.stdout.readline().strip().split("url=")[1]
        token = next(line for line in process.stderr if "token=" in line).strip().split("token=")[1]
        headers = {"Authorization": f"Bearer {token}"}
        reply = httpx.post(f"{url}/generate", json={"input_ids": [5]}, headers=headers, timeout=30)
        assert reply.status_code == 200
        assert reply.json()["text"] == ""
        assert httpx.post(f"{url}/generate", json={"text": "5"}, headers=headers, timeout=30).status_code == 400
    finally:
        process.kill()
        process.communicate(timeout=10)
