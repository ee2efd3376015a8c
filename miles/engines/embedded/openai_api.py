"""OpenAI's completions and chat completions: their JSON to /generate's, and what came of it back.

    POST /v1/completions       {prompt, max_tokens, n, echo, logprobs, ...}
    POST /v1/chat/completions  {messages, tools, max_completion_tokens, logprobs, top_logprobs, ...}

Beside OpenAI's fields, SGLang's sampling fields are served (top_k, min_p, ignore_eos, ...). A field that would be ignored is
refused by name. Tools are rendered by the chat template; calls that the model makes stay text.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .replies import final_texts, token_texts
from .requests import Job, RequestError, Row
from .text import Tokenizer

RenderChat = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None, bool, dict[str, Any]], list[int]]
"""`render(messages, tools, continues, kwargs)` -> token ids; `continues`: the last message goes on."""

#: Field -> its name in sampling_params.
_SAMPLING = {
    **{
        name: name
        for name in ("temperature", "top_p", "top_k", "min_p", "stop", "n", "frequency_penalty", "presence_penalty")
    },
    **{
        name: name
        for name in (
            *("repetition_penalty", "logit_bias", "stop_token_ids", "stop_regex", "ignore_eos"),
            *("skip_special_tokens", "no_stop_trim"),
        )
    },
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
}
#: Fields that change nothing in the answer, or are OpenAI's own bookkeeping.
_WITHOUT_EFFECT = ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
#: Field -> the values that ask for nothing.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "auto", "none"),
    "parallel_tool_calls": (None, True, False),
    "modalities": (None, ["text"]),
    "reasoning_effort": (None,),
}
_SHARED = ("max_tokens", "stream", "stream_options", "logprobs", "rid", *_SAMPLING, *_WITHOUT_EFFECT, *_ONLY)
_TEXT = ("prompt", "echo")
_CHAT = (
    *("messages", "max_completion_tokens", "top_logprobs", "tools", "chat_template_kwargs"),
    *("continue_final_message", "add_generation_prompt"),
)
#: OpenAI's default of /v1/completions.
_TEXT_MAX_TOKENS = 16


@dataclass(frozen=True)
class Question:
    """One request."""

    kind: Literal["text", "chat"]
    id: str
    created: int
    """Unix time."""
    model: str
    generate: Mapping[str, Any]
    """The body of /generate that asks for the same."""
    stream: bool
    include_usage: bool
    """The last chunk of a stream counts tokens."""
    log_probs: bool
    echo: bool


def parse_completion(body: Any, model: str) -> Question:
    """Raises `RequestError`, as all of this module."""
    body = _checked(body, (*_SHARED, *_TEXT))
    prompt = body.get("prompt")
    if prompt is None:
        raise RequestError("prompt, got none: send a text or token ids, or a list of them")
    is_text = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str))
    top, echo = body.get("logprobs"), _flag(body, "echo")
    if top is not None and (type(top) is not int or not 0 <= top <= 20):
        raise RequestError(f"logprobs, got {top!r}: send how many of the likeliest tokens to list, 0 to 20")
    generate = {
        "text" if is_text else "input_ids": prompt,
        "sampling_params": _sampling(body, _TEXT_MAX_TOKENS),
        **({"return_logprob": True, "top_logprobs_num": top} if top is not None else {}),
        **({"logprob_start_len": 0} if top is not None and echo else {}),
    }
    return _question("text", body, model, generate, log_probs=top is not None, echo=echo)


def parse_chat(body: Any, model: str, render: RenderChat) -> Question:
    body = _checked(body, (*_SHARED, *_CHAT))
    messages, tools, kwargs = body.get("messages"), body.get("tools"), body.get("chat_template_kwargs") or {}
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise RequestError(f"messages, got {type(messages).__name__}: send a non-empty list of objects")
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise RequestError(f"tools, got {type(tools).__name__}: send a list of objects")
    if not isinstance(kwargs, dict):
        raise RequestError(f"chat_template_kwargs, got {type(kwargs).__name__}: send an object")
    continues = _flag(body, "continue_final_message")
    if body.get("add_generation_prompt", not continues) is continues:
        raise RequestError("add_generation_prompt, got the opposite of what follows the last message: leave it out")
    log_probs, top = _flag(body, "logprobs"), body.get("top_logprobs") or 0
    if type(top) is not int or not 0 <= top <= 20 or (top and not log_probs):
        raise RequestError(f"top_logprobs, got {top!r}: send 0 to 20, beside logprobs: true")
    if body.get("max_completion_tokens") is not None:
        body = {**body, "max_tokens": body["max_completion_tokens"]}
    shown = None if body.get("tool_choice") == "none" else tools
    generate = {
        "input_ids": render([_with_text(message) for message in messages], shown, continues, kwargs),
        "sampling_params": _sampling(body, None),
        **({"return_logprob": True, "top_logprobs_num": top} if log_probs else {}),
    }
    return _question("chat", body, model, generate, log_probs=log_probs, echo=False)


def reply(question: Question, job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """The whole answer, of a finished job."""
    texts = final_texts(job.rows, tokenizer)
    prompts = _prompt_texts(job, tokenizer) if question.echo else [""] * len(job.rows)
    choices = []
    for number, (row, prompt, text) in enumerate(zip(job.rows, prompts, texts, strict=True)):
        content: dict[str, Any] = {"text": prompt + text}
        if question.kind == "chat":
            content = {"message": {"role": "assistant", "content": text}}
        choices.append(_choice(question, number, row, content, tokenizer, since=0))
    return {**_head(question, is_chunk=False), "choices": choices, "usage": usage(job)}


def chunk(question: Question, number: int, row: Row, added: str, tokenizer: Tokenizer, *, since: int) -> dict[str, Any]:
    """One event of a stream: the text that choice `number` gained, and its tokens from number `since` on."""
    content: dict[str, Any]
    if question.kind == "chat":
        content = {"delta": {**({} if since else {"role": "assistant"}), "content": added}}
    else:
        prompt = tokenizer.decode_batch([row.input_ids.tolist()], skip_special_tokens=True)[0]
        content = {"text": (prompt if question.echo and not since else "") + added}
    return {
        **_head(question, is_chunk=True),
        "choices": [_choice(question, number, row, content, tokenizer, since=since)],
        **({"usage": None} if question.include_usage else {}),
    }


def usage_chunk(question: Question, job: Job) -> dict[str, Any]:
    """The last event where the client asked for it."""
    return {**_head(question, is_chunk=True), "choices": [], "usage": usage(job)}


def usage(job: Job) -> dict[str, int]:
    """Tokens of each prompt once, and of all answers."""
    asked = sum(len(row.input_ids) for row in job.rows[:: job.rows[0].params.n])
    answers = sum(0 if row.output_ids is None else len(row.output_ids) for row in job.rows)
    return {"prompt_tokens": asked, "completion_tokens": answers, "total_tokens": asked + answers}


# --------------------------------------------------------------------------------------------------------------- requests


def _checked(body: Any, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(body, Mapping):
        raise RequestError(f"body, got {type(body).__name__}: not a JSON object; send one")
    for name, value in body.items():
        if name not in known:
            raise RequestError(f"field, got {name!r}: it is not served here; leave it out")
        if name in _ONLY and value not in _ONLY[name]:
            raise RequestError(f"{name}, got {value!r}: the embedded engine does not serve it; leave it out")
    return body


def _question(
    kind: Literal["text", "chat"],
    body: Mapping[str, Any],
    model: str,
    generate: dict[str, Any],
    *,
    log_probs: bool,
    echo: bool,
) -> Question:
    stream, options = _flag(body, "stream"), body.get("stream_options") or {}
    if not isinstance(options, Mapping) or set(options) - {"include_usage"} or (options and not stream):
        raise RequestError(f"stream_options, got {options!r}: only include_usage is served, beside stream: true")
    prefix = "chatcmpl" if kind == "chat" else "cmpl"
    return Question(
        kind=kind,
        id=str(body.get("rid") or f"{prefix}-{uuid.uuid4().hex}"),
        created=int(time.time()),
        model=str(body.get("model") or model),
        generate={**generate, **({"rid": body["rid"]} if body.get("rid") is not None else {})},
        stream=stream,
        include_usage=_flag(options, "include_usage"),
        log_probs=log_probs,
        echo=echo,
    )


def _sampling(body: Mapping[str, Any], max_tokens: int | None) -> dict[str, Any]:
    given = {theirs: body[ours] for ours, theirs in _SAMPLING.items() if body.get(ours) is not None}
    asked = body.get("max_tokens")
    return {**given, "max_new_tokens": max_tokens if asked is None else asked}


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name}, got {value!r}: send true or false")
    return bool(value)


def _with_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its content as one text, whether it came so or in parts."""
    content = message.get("content")
    if not isinstance(message.get("role"), str):
        raise RequestError(f"messages, got one with role {message.get('role')!r}: every message has a role")
    if not isinstance(content, list):
        return dict(message)
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise RequestError("messages, got a part that is not text: the embedded engine serves texts; send those")
    return {**message, "content": "".join(map(str, texts))}


# ---------------------------------------------------------------------------------------------------------------- answers


def _head(question: Question, *, is_chunk: bool) -> dict[str, Any]:
    kind = {"text": "text_completion", "chat": f"chat.completion{'.chunk' * is_chunk}"}[question.kind]
    return {"id": question.id, "object": kind, "created": question.created, "model": question.model}


def _choice(
    question: Question, number: int, row: Row, content: Mapping[str, Any], tokenizer: Tokenizer, *, since: int
) -> dict[str, Any]:
    log_probs = None
    if question.log_probs:
        shape = _chat_log_probs if question.kind == "chat" else _text_log_probs
        log_probs = shape(_entries(question, row, tokenizer, since=since))
    reason = row.finish_reason
    return {
        "index": number,
        **content,
        "logprobs": log_probs,
        "finish_reason": None if reason is None else reason["type"],
    }


@dataclass(frozen=True)
class _Entry:
    """A token with its log-prob; None for the first token of a prompt."""

    text: str
    log_prob: float | None
    top: Sequence[tuple[str, float]]
    """The likeliest tokens in its place."""


def _entries(question: Question, row: Row, tokenizer: Tokenizer, *, since: int) -> list[_Entry]:
    assert row.output_ids is not None
    assert row.output_log_probs is not None
    ids = row.output_ids.tolist()[since:]
    values: list[float | None] = row.output_log_probs.tolist()[since:]
    tops: list[list[tuple[float, int]]] = row.output_top[since:] or [[]] * len(ids)
    if question.echo and not since:
        known = [] if row.input_log_probs is None else row.input_log_probs.tolist()
        ids, values = [*row.input_ids.tolist(), *ids], [None, *known, *values]
        tops = [[], *(row.input_top or [[]] * len(known)), *tops]
    texts = iter(token_texts([*ids, *(token for top in tops for _, token in top)], tokenizer))
    own = [next(texts) for _ in ids]
    return [
        _Entry(text, value, [(next(texts), likely) for likely, _ in top])
        for text, value, top in zip(own, values, tops, strict=True)
    ]


def _chat_log_probs(entries: Sequence[_Entry]) -> dict[str, Any]:
    def one(text: str, value: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    return {
        "content": [
            {**one(entry.text, entry.log_prob), "top_logprobs": [one(*pair) for pair in entry.top]} for entry in entries
        ]
    }


def _text_log_probs(entries: Sequence[_Entry]) -> dict[str, Any]:
    offsets, end = [], 0
    for entry in entries:
        offsets.append(end)
        end += len(entry.text)
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [entry.log_prob for entry in entries],
        "top_logprobs": [dict(entry.top) or None for entry in entries],
        "text_offset": offsets,
    }


def _prompt_texts(job: Job, tokenizer: Tokenizer) -> list[str]:
    return tokenizer.decode_batch([row.input_ids.tolist() for row in job.rows], skip_special_tokens=True)
