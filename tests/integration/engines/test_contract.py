"""What Miles expects of an engine, the same of ours and of a real SGLang server: one suite over one client.

The embedded engine is always tested. SGLang is where SGLANG_CPU_VENV names a virtual environment that has it
(`scripts/test.sh --sglang` makes one): it takes a minute to start.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import pytest
import torch
from transformers import PreTrainedModel

from miles.engines.client import EngineClient
from miles.engines.launch import EngineProcess, launch_embedded
from miles.engines.sglang import launch_sglang
from miles.errors import EngineRequestError, WeightUpdateError
from miles.weights import SharedMemoryTransport, TorchSharingTransport, publish
from tests.unit.engines_embedded.checkpoints import EOS, WELL_CONDITIONED, make_model, make_tokenizer, save_checkpoint

TOKEN = secrets.token_hex(16)
SGLANG_VENV = os.environ.get("SGLANG_CPU_VENV")
PROMPT = [5, 6, 7, 8]

pytestmark = pytest.mark.timeout(500 if SGLANG_VENV else 180)


@dataclass
class Engine:
    kind: str
    process: EngineProcess
    published: int = 0

    @asynccontextmanager
    async def client(self) -> AsyncIterator[EngineClient]:
        async with EngineClient(self.kind, self.process.url, TOKEN) as client:
            yield client

    def generate(self, **payload: Any) -> Any:
        async def ask() -> Any:
            async with self.client() as client:
                return await client.generate({"return_logprob": True, **payload})

        return asyncio.run(ask())

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        reply = httpx.post(self.process.url + path, json=body, headers=headers, timeout=60)
        assert reply.status_code == 200, reply.text
        return reply

    def publish(self, model: PreTrainedModel, version: str, buffer_bytes: int = 1 << 20) -> Any:
        async def send() -> Any:
            transport = SharedMemoryTransport() if self.kind == "embedded" else TorchSharingTransport()
            try:
                async with self.client() as client:
                    return await publish(iter(sent_weights(model)), [client], transport, version, buffer_bytes)
            finally:
                transport.close()

        return asyncio.run(send())


def sent_weights(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """The names of the checkpoint: no output layer, which is tied."""
    return [(name, p.detach()) for name, p in model.named_parameters() if name != "lm_head.weight"]


async def launch(kind: str, directory: Path, log: Path) -> EngineProcess:
    common: dict[str, Any] = {
        "name": kind,
        "model_path": str(directory),
        "token": TOKEN,
        "log_path": log,
        "env": {"OMP_NUM_THREADS": "1"},
        "device": "cpu",
    }
    if kind == "embedded":
        return await launch_embedded(**common, start_timeout_s=120)
    arguments = {"max_total_tokens": 16384, "max_running_requests": 32}
    python = f"{SGLANG_VENV}/bin/python"
    return await launch_sglang(**common, python=python, server_args=arguments, start_timeout_s=400)


@pytest.fixture(scope="module")
def old_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    directory = tmp_path_factory.mktemp("checkpoint")
    model = save_checkpoint(directory, initializer_range=WELL_CONDITIONED)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    return directory, model


needs_sglang = pytest.mark.skipif(SGLANG_VENV is None, reason="SGLANG_CPU_VENV names no environment with sglang")


@pytest.fixture(scope="module", params=["embedded", pytest.param("sglang", marks=needs_sglang)])
def engine(
    request: pytest.FixtureRequest, old_model: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    log = tmp_path_factory.mktemp("logs") / f"{request.param}.log"
    process = asyncio.run(launch(request.param, old_model[0], log))
    yield Engine(request.param, process)
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    process.terminate(grace_s=5)
    until = time.monotonic() + 10
    while alive := [pid for pid in family if _runs(pid)]:
        assert time.monotonic() < until, f"left behind: {alive}"
        time.sleep(0.05)
    assert TOKEN not in log.read_text(errors="replace")


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def reference_log_probs(
    model: PreTrainedModel, prompt: list[int], answer: list[int], temperature: float
) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def log_probs_of(reply: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([entry[0] for entry in reply["meta_info"]["output_token_logprobs"]], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------- who may ask


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/model_info"),
        ("GET", "/server_info"),
        ("POST", "/generate"),
        ("POST", "/pause_generation"),
        ("POST", "/continue_generation"),
        ("POST", "/abort_request"),
        ("POST", "/flush_cache"),
        ("POST", "/update_weight_version"),
        ("POST", "/update_weights_from_tensor"),
        ("POST", "/weights_checker"),
    ],
)
def test_without_the_token_nothing_but_health_is_answered(engine, method, path):
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        reply = httpx.request(method, engine.process.url + path, json={}, headers=headers, timeout=30)
        assert reply.status_code in (401, 403)
    assert httpx.get(engine.process.url + "/health", timeout=30).status_code == 200


def test_the_token_is_on_no_command_line(engine):
    process = psutil.Process(engine.process.pid)
    for one in [process, *process.children(recursive=True)]:
        assert TOKEN not in " ".join(one.cmdline())


# ----------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_model_at_the_sampling_temperature(engine, old_model, temperature):
    engine.publish(old_model[1], "0")
    params = {"max_new_tokens": 12, "temperature": temperature, "ignore_eos": True}
    for reply in engine.generate(input_ids=[PROMPT, [9, 10]], sampling_params=params):
        answer = reply["output_ids"]
        assert [entry[1] for entry in reply["meta_info"]["output_token_logprobs"]] == answer
        prompt = PROMPT if reply["meta_info"]["prompt_tokens"] == len(PROMPT) else [9, 10]
        expected = reference_log_probs(old_model[1], prompt, answer, temperature)
        torch.testing.assert_close(log_probs_of(reply), expected, atol=1e-5, rtol=0)
        assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 12}
        assert [span["version"] for span in reply["meta_info"]["weight_versions"]] == ["0"]


def test_a_greedy_answer_takes_the_likeliest_tokens_with_log_probs_at_temperature_one(engine, old_model):
    engine.publish(old_model[1], "0")
    params = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    reply = engine.generate(input_ids=PROMPT, sampling_params=params)
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(old_model[1](torch.tensor([ids])).logits[0, -1].argmax()))
    assert reply["output_ids"] == ids[len(PROMPT) :]
    expected = reference_log_probs(old_model[1], PROMPT, reply["output_ids"], 1.0)
    torch.testing.assert_close(log_probs_of(reply), expected, atol=1e-5, rtol=0)


def test_a_prompt_that_nothing_is_asked_after_tells_its_log_probs_and_likeliest_tokens(engine, old_model):
    """What a teacher is asked for: of the tokens after `logprob_start_len`, with their texts. The temperature has no say."""
    engine.publish(old_model[1], "0")
    prompt, start = [5, 6, 7, 8, 9, 10, 11], 2
    with torch.no_grad():
        table = torch.log_softmax(old_model[1](torch.tensor([prompt])).logits[0, start:-1].double(), -1)
    reply = engine.generate(
        input_ids=prompt,
        sampling_params={"max_new_tokens": 0, "temperature": 0.7},
        logprob_start_len=start,
        top_logprobs_num=5,
        return_text_in_logprobs=True,
    )
    meta = reply["meta_info"]
    own = meta["input_token_logprobs"][-len(table) :]
    assert [entry[1] for entry in own] == prompt[start + 1 :]
    assert [entry[2] for entry in own] == [make_tokenizer().decode([token]) for token in prompt[start + 1 :]]
    expected = table.gather(1, torch.tensor(prompt[start + 1 :])[:, None])[:, 0]
    found = torch.tensor([entry[0] for entry in own], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for entries, row in zip(meta["input_top_logprobs"][-len(table) :], table, strict=True):
        values, ids = row.topk(5)
        assert [entry[1] for entry in entries] == ids.tolist()
        found = torch.tensor([entry[0] for entry in entries], dtype=torch.float64)
        torch.testing.assert_close(found, values, atol=1e-5, rtol=0)


def test_a_group_and_a_batch_come_back_in_order_under_their_ids(engine):
    params = {"max_new_tokens": 2, "ignore_eos": True}
    group = engine.generate(input_ids=PROMPT, sampling_params={**params, "n": 3})
    assert len(group) == 3
    batch = engine.generate(input_ids=[[5], [6, 7], [5, 6, 7]], rid=["a", "b", "c"], sampling_params=params)
    assert [reply["meta_info"]["prompt_tokens"] for reply in batch] == [1, 2, 3]
    assert [reply["meta_info"]["id"] for reply in batch] == ["a", "b", "c"]
    each = [{**params, "max_new_tokens": n} for n in (1, 2)]
    batch = engine.generate(input_ids=[[5], [6]], sampling_params=each)
    assert [len(reply["output_ids"]) for reply in batch] == [1, 2]


def test_a_stop_token_stays_in_the_ids_and_leaves_the_text(engine):
    forced = {"max_new_tokens": 5, "logit_bias": {str(EOS): 1000.0}}
    reply = engine.generate(input_ids=[5], sampling_params=forced)
    assert (reply["output_ids"], reply["text"]) == ([EOS], "")
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
    digit = make_tokenizer().convert_tokens_to_ids("7")
    stopped = {"max_new_tokens": 5, "logit_bias": {str(digit): 1000.0}, "stop_token_ids": [digit]}
    reply = engine.generate(input_ids=[5], sampling_params=stopped)
    assert reply["output_ids"] == [digit]
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": digit}


def test_a_stop_string_ends_an_answer(engine):
    digit = make_tokenizer().convert_tokens_to_ids("7")
    params = {"max_new_tokens": 5, "logit_bias": {str(digit): 1000.0}, "stop": ["77"]}
    reply = engine.generate(input_ids=[5], sampling_params=params)
    assert reply["output_ids"] == [digit, digit]
    assert reply["text"] == ""
    assert reply["meta_info"]["finish_reason"]["type"] == "stop"


def test_the_same_seed_gives_the_same_answer(engine):
    if engine.kind == "sglang":
        pytest.skip("SGLang ignores seeds without --enable-deterministic-inference, which needs a GPU")
    params = {"max_new_tokens": 16, "ignore_eos": True, "sampling_seed": 3}
    alone = engine.generate(input_ids=PROMPT, sampling_params=params)
    among = engine.generate(input_ids=[[5], PROMPT, [6]], sampling_params=[{"max_new_tokens": 3}, params, {}])
    assert among[1]["output_ids"] == alone["output_ids"]


def test_what_the_engine_cannot_serve_is_refused_and_never_sent_again(engine):
    with pytest.raises(EngineRequestError, match="400"):
        engine.generate(input_ids=[5], sampling_params={"temperature": -1.0})
    assert (
        len(engine.generate(input_ids=[5], sampling_params={"max_new_tokens": 1, "ignore_eos": True})["output_ids"])
        == 1
    )


# ------------------------------------------------------------------------------------------------------------- aborting

LONG = {"max_new_tokens": 240, "ignore_eos": True, "n": 8}


def _seen_running(reply: Any) -> None:
    rows = reply if isinstance(reply, list) else [reply]
    assert {row["meta_info"]["finish_reason"]["type"] for row in rows} == {"abort"}
    for row in rows:
        assert len(row["meta_info"]["output_token_logprobs"]) == len(row["output_ids"]) < 240


def test_a_stream_grows_into_the_whole_answer(engine):
    params = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True}
    whole = engine.generate(**{k: v for k, v in body.items() if k != "return_logprob"})
    lines = engine.post("/generate", {**body, "stream": True}).text.split("\n\n")
    assert [line for line in lines if line][-1] == "data: [DONE]"
    parts = [orjson.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert parts[-1]["output_ids"] == whole["output_ids"]
    assert parts[-1]["text"] == whole["text"]
    assert parts[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 12}
    torch.testing.assert_close(log_probs_of(parts[-1]), log_probs_of(whole), atol=1e-5, rtol=0)
    for part in parts:
        assert whole["output_ids"][: len(part["output_ids"])] == part["output_ids"]
        assert whole["text"].startswith(part["text"])


@pytest.mark.parametrize("chat", [False, True])
def test_openais_endpoints_answer_as_generate_does(engine, chat):
    params = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    whole = engine.generate(text="12+34=", sampling_params=params)
    asked = {"messages": [{"role": "user", "content": "12+34="}]} if chat else {"prompt": "12+34="}
    body = {"model": "any", **asked, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    reply = engine.post("/v1/chat/completions" if chat else "/v1/completions", body).json()
    [choice] = reply["choices"]
    assert (choice["message"]["content"] if chat else choice["text"]) == whole["text"]
    assert choice["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 6
    assert reply["usage"]["prompt_tokens"] == 6


def test_an_aborted_request_returns_what_it_has(engine):
    async def scenario(rid: str) -> Any:
        async with engine.client() as client:
            payload = {"input_ids": [5], "rid": rid, "return_logprob": True, "sampling_params": {**LONG, "n": 1}}
            running = asyncio.create_task(client.generate(payload))
            while not running.done():
                await asyncio.sleep(0.02)
                await client.abort(rid)
            return await running

    # On a busy machine a request may end before the word reaches it.
    replies = (asyncio.run(scenario(f"long-{i}")) for i in range(20))
    _seen_running(next(r for r in replies if r["meta_info"]["finish_reason"]["type"] != "length"))


def test_a_pause_returns_what_runs_and_holds_what_comes_until_it_ends(engine):
    async def scenario() -> None:
        async with engine.client() as client:
            payload = {"input_ids": [5], "return_logprob": True, "sampling_params": LONG}
            running = asyncio.create_task(client.generate(payload))
            await asyncio.sleep(0.1)
            await client.pause()
            _seen_running(await running)
            short = {"input_ids": [5], "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
            held = asyncio.create_task(client.generate(short))
            await asyncio.sleep(0.5)
            assert not held.done()
            await client.health()
            await client.resume()
            assert len((await held)["output_ids"]) == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_that_keeps_what_runs(engine, mode):
    """The answer goes on after it; meanwhile the cache is held (in_place), or not (retract)."""
    params = {"max_new_tokens": 200, "temperature": 0, "ignore_eos": True}
    whole = engine.generate(input_ids=PROMPT, sampling_params=params)
    for _ in range(20):  # an answer may be complete before the pause comes
        last, is_held = paused_answer(engine, mode, params)
        assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 200}
        assert last["output_ids"] == whole["output_ids"]
        torch.testing.assert_close(log_probs_of(last), log_probs_of(whole), atol=2e-5, rtol=0)
        if is_held or (mode == "retract" and last["meta_info"]["num_retractions"]):
            return
    raise AssertionError(f"no answer of 20 was still being made when the pause ({mode}) came")


def paused_answer(engine: Engine, mode: str, params: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The end of an answer that the engine was paused in, and whether it refused to drop its cache meanwhile."""
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "stream": True}
    url, headers = engine.process.url, {"Authorization": f"Bearer {TOKEN}"}
    with httpx.stream("POST", f"{url}/generate", json=body, headers=headers, timeout=60) as reply:
        lines = reply.iter_lines()
        next(line for line in lines if line)
        engine.post("/pause_generation", {"mode": mode})
        flushed = httpx.post(f"{url}/flush_cache", headers=headers, timeout=60).status_code
        engine.post("/continue_generation", {})
        rest = [line for line in lines if line]
    return orjson.loads(rest[-2].removeprefix("data: ")), flushed == 400


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("buffer_bytes", [1 << 30, 10_000], ids=["one bucket", "many buckets"])
def test_after_a_publication_the_new_weights_answer_under_the_new_version(engine, buffer_bytes):
    engine.published += 1
    model = make_model("qwen3_tied", seed=engine.published, initializer_range=WELL_CONDITIONED)
    version = f"v{engine.published}"
    stats = engine.publish(model, version, buffer_bytes)
    assert stats.num_tensors == len(sent_weights(model))
    assert (stats.num_buckets == 1) == (buffer_bytes == 1 << 30)
    reply = engine.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 12, "ignore_eos": True})
    expected = reference_log_probs(model, PROMPT, reply["output_ids"], 1.0)
    torch.testing.assert_close(log_probs_of(reply), expected, atol=1e-5, rtol=0)
    assert reply["meta_info"]["weight_version"] == version


def test_what_was_cached_of_a_prompt_does_not_outlive_its_weights(engine):
    """The same long prompt before and after: with a stale prefix cache the answer would be of both."""
    prompt = [5 + i % 20 for i in range(100)]
    params = {"max_new_tokens": 4, "ignore_eos": True, "temperature": 0}
    for seed in (31, 32):
        model = make_model("qwen3_tied", seed=seed, initializer_range=WELL_CONDITIONED)
        engine.publish(model, f"s{seed}")
        for _ in range(2):
            reply = engine.generate(input_ids=prompt, sampling_params=params)
            expected = reference_log_probs(model, prompt, reply["output_ids"], 1.0)
            torch.testing.assert_close(log_probs_of(reply), expected, atol=1e-5, rtol=0)


def test_after_a_failed_publication_nothing_is_answered_until_a_whole_one(engine, old_model):
    class Broken(Exception):
        pass

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        yield sent_weights(old_model[1])[0]
        raise Broken("the trainer failed")

    async def scenario() -> None:
        transport = SharedMemoryTransport() if engine.kind == "embedded" else TorchSharingTransport()
        try:
            async with engine.client() as client:
                with pytest.raises(WeightUpdateError, match="the trainer failed"):
                    await publish(weights(), [client], transport, "never", 1)
                short = {"input_ids": [5], "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
                held = asyncio.create_task(client.generate(short))
                await asyncio.sleep(0.5)
                assert not held.done()
                await publish(iter(sent_weights(old_model[1])), [client], transport, "whole", 1 << 20)
                assert (await held)["meta_info"]["weight_version"] == "whole"
        finally:
            transport.close()

    asyncio.run(scenario())
