"""Answers as they are made, and OpenAI's two endpoints through OpenAI's own client."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.unit.engines_embedded.checkpoints import make_tokenizer, save_checkpoint

from .test_embedded_server import TOKEN, Server, _running, _wait_until

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'forbidden' %}{{ raise_exception('no such role') }}{% endif %}{{ m.content }}="
    "{% endfor %}{% if tools %}tools{% endif %}{% if add_generation_prompt %}.{% endif %}"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(directory)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    with _running(directory, "--max-running-requests", "16", "--served-model-name", "tiny") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0)


def events(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.stream("POST", server.url + path, json=body, headers=headers, timeout=60) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def alike(reply: dict[str, Any]) -> dict[str, Any]:
    """A reply of /generate without what differs from call to call."""
    meta = {k: v for k, v in reply["meta_info"].items() if k not in ("id", "e2e_latency", "cached_tokens")}
    return {**reply, "meta_info": meta}


def test_a_stream_grows_token_by_token_into_the_whole_reply(server: Server) -> None:
    body = {
        "text": "12+34=",
        "sampling_params": {"max_new_tokens": 100, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 2,
    }
    whole = server.post("/generate", body)
    parts = events(server, "/generate", {**body, "stream": True})
    assert len(parts) >= 2, "a slow reader gets several tokens at once"
    assert alike(parts[-1]) == alike(whole)
    for part in parts[:-1]:
        size = len(part["output_ids"])
        assert part["output_ids"] == whole["output_ids"][:size]
        assert whole["text"].startswith(part["text"])
        assert part["meta_info"]["finish_reason"] is None
        assert part["meta_info"]["output_token_logprobs"] == whole["meta_info"]["output_token_logprobs"][:size]
        assert len(part["meta_info"]["output_top_logprobs"]) == size


def test_rows_of_a_stream_say_which_they_are(server: Server) -> None:
    params = {"max_new_tokens": 5, "temperature": 0, "ignore_eos": True, "n": 2}
    body = {"input_ids": [[5, 6], [7, 8, 9]], "sampling_params": params}
    whole = server.post("/generate", body)
    parts = events(server, "/generate", {**body, "stream": True})
    last = {part["index"]: part for part in parts}
    assert [last[i]["output_ids"] for i in range(4)] == [reply["output_ids"] for reply in whole]


def test_a_stop_string_is_never_seen_in_part(server: Server) -> None:
    params = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}
    text = server.post("/generate", {"text": "1+2=", "sampling_params": params})["text"]
    stop = text[6:9]
    parts = events(
        server, "/generate", {"text": "1+2=", "sampling_params": {**params, "stop": [stop, "zz"]}, "stream": True}
    )
    expected = text[: text.index(stop)]
    assert parts[-1]["text"] == expected
    assert parts[-1]["meta_info"]["finish_reason"]["matched"] == stop
    assert all(expected.startswith(part["text"]) for part in parts)


def test_a_client_that_stops_reading_aborts_its_rows(server: Server) -> None:
    params = {"max_new_tokens": 200, "temperature": 1, "ignore_eos": True, "n": 8}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    body = {"text": "1", "sampling_params": params, "stream": True}
    with httpx.stream("POST", server.url + "/generate", json=body, headers=headers, timeout=60) as reply:
        next(reply.iter_lines())
    _wait_until(lambda: server.state()["num_running_reqs"] == 0, limit_s=10)


def test_aborted_rows_end_their_stream(server: Server) -> None:
    body = {"text": "1", "rid": "waits", "sampling_params": {"max_new_tokens": 5, "n": 16}, "stream": True}
    seen: list[dict[str, Any]] = []
    server.post("/pause_generation", {"mode": "abort"})
    try:
        reader = threading.Thread(target=lambda: seen.extend(events(server, "/generate", body)))
        reader.start()
        _wait_until(lambda: server.state()["num_waiting_reqs"] == 16, limit_s=10)
        server.post("/abort_request", {"rid": "waits"})
        reader.join(10)
    finally:
        server.post("/continue_generation")
    assert sorted(part["index"] for part in seen) == list(range(16))
    assert {part["meta_info"]["finish_reason"]["type"] for part in seen} == {"abort"}


def test_completions(client: openai.OpenAI, server: Server) -> None:
    made = client.completions.create(
        model="any",
        prompt=["12+34=", "5-1="],
        max_tokens=6,
        temperature=0,
        logprobs=2,
        echo=True,
        extra_body={"ignore_eos": True},
    )
    params = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    whole = server.post(
        "/generate",
        {"text": ["12+34=", "5-1="], "sampling_params": params, "return_logprob": True, "logprob_start_len": 0},
    )
    assert [choice.index for choice in made.choices] == [0, 1]
    for choice, reply, prompt in zip(made.choices, whole, ("12+34=", "5-1="), strict=True):
        assert choice.text == prompt + reply["text"]
        assert choice.finish_reason == "length"
        meta = reply["meta_info"]
        expected = [value for value, _, _ in meta["input_token_logprobs"] + meta["output_token_logprobs"]]
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == [None, *(pytest.approx(v, abs=1e-5) for v in expected[1:])]
        assert "".join(choice.logprobs.tokens or []).startswith(prompt)
        assert choice.logprobs.text_offset == [
            sum(map(len, (choice.logprobs.tokens or [])[:i])) for i in range(len(expected))
        ]
        assert all(len(top) == 2 for top in (choice.logprobs.top_logprobs or [])[1:])
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (10, 12)


def test_chat(client: openai.OpenAI, server: Server) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+2"}]},
    ]
    made = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=7, temperature=0, logprobs=True, top_logprobs=3, seed=3
    )
    body = {"text": "ab=1+2=.", "sampling_params": {"max_new_tokens": 7, "temperature": 0}}
    whole = server.post("/generate", {**body, "return_logprob": True})
    [choice] = made.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == whole["text"]
    assert choice.finish_reason == whole["meta_info"]["finish_reason"]["type"]
    assert choice.logprobs is not None
    values = [value for value, _, _ in whole["meta_info"]["output_token_logprobs"]]
    assert [entry.logprob for entry in choice.logprobs.content or []] == pytest.approx(values, abs=1e-5)
    assert all(entry.top_logprobs[0].logprob >= entry.logprob for entry in choice.logprobs.content or [])
    assert made.usage is not None
    assert made.usage.prompt_tokens == len("ab=1+2=.")


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_streams_of_openai(client: openai.OpenAI, kind: str) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 9,
        "temperature": 0,
        "n": 2,
        "extra_body": {"ignore_eos": True},
    }
    if kind == "chat":
        create, options = client.chat.completions.create, options | {"messages": [{"role": "user", "content": "1+"}]}
    else:
        create, options = client.completions.create, options | {"prompt": "1+", "echo": True}
    whole = create(**options)
    texts, reasons, usage = ["", ""], [[], []], None
    for part in create(**options, stream=True, stream_options={"include_usage": True}):
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] += (choice.delta.content if kind == "chat" else choice.text) or ""
            reasons[choice.index].append(choice.finish_reason)
    assert texts == [choice.message.content if kind == "chat" else choice.text for choice in whole.choices]
    assert all(found[-1] == "length" and set(found[:-1]) == {None} for found in reasons)
    assert usage == whole.usage


def test_tools_go_to_the_template_and_the_last_message_may_go_on(client: openai.OpenAI) -> None:
    def prompt_tokens(**more: Any) -> int:
        made = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "1"}], max_tokens=1, **more
        )
        assert made.usage is not None
        return made.usage.prompt_tokens

    tools: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert prompt_tokens() == len("1=.")
    assert prompt_tokens(tools=tools) == len("1=tools.")
    assert prompt_tokens(tools=tools, tool_choice="none") == len("1=.")
    assert prompt_tokens(extra_body={"continue_final_message": True}) == len("1")


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("completions", {}, "prompt"),
        ("completions", {"prompt": "1", "suffix": "x"}, "suffix"),
        ("completions", {"prompt": "1", "best_of": 2}, "best_of"),
        ("completions", {"prompt": "1", "logprobs": True}, "logprobs"),
        ("completions", {"prompt": "1", "temperatur": 1}, "temperatur"),
        ("completions", {"prompt": "1", "top_p": 2}, "top_p"),
        ("completions", {"prompt": "1", "stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"content": "1"}]}, "role"),
        ("chat/completions", {"messages": [{"role": "forbidden", "content": "1"}]}, "no such role"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text"),
        ("chat/completions", {"messages": [{"role": "user", "content": "1"}], "top_logprobs": 2}, "top_logprobs"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "1"}], "response_format": {}},
            "response_format",
        ),
        ("chat/completions", [], "body"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(server: Server, path: str, body: Any, named: str) -> None:
    reply = server.call("POST", f"/v1/{path}", body)
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert named in message
    assert "\n" not in message


def test_the_client_reads_our_errors(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt, got none"):
        client.post("/completions", body={}, cast_to=object)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert [model.id for model in client.models.list()] == ["tiny"]
