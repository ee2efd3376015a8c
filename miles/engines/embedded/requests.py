"""Bodies of POST /generate, parsed and checked. Consumes JSON, produces a `Job` of rows that the scheduler can run.

A field that the engine does not serve is refused by name; nothing is accepted and ignored.
"""

from __future__ import annotations

import difflib
import itertools
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from miles.errors import UserError

from .sampling import derive_seed


class RequestError(UserError):
    """The request is wrong; HTTP 400 with the text."""


@dataclass(frozen=True)
class SamplingParams:
    """One row's `sampling_params`, checked, but for its seed. Names and defaults are SGLang's."""

    max_new_tokens: int | None = 128
    """None: up to the context length."""
    min_new_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    """0 is served as temperature 1 with top_k 1."""
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_regex: tuple[re.Pattern[str], ...] = ()
    ignore_eos: bool = False
    """Also switches `stop_token_ids` off."""
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalised(self) -> bool:
        return (self.frequency_penalty, self.presence_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)


@dataclass(eq=False, slots=True)
class Row:
    """One sequence to generate, and afterwards what came of it. Owned by the decode thread once submitted."""

    rid: str
    input_ids: np.ndarray
    """int64 [prompt_tokens]"""
    params: SamplingParams
    seed: int | None
    """None: the scheduler draws one."""
    return_logprob: bool
    logprob_start_len: int
    """First prompt position whose log-prob is returned; -1 for none."""
    top_logprobs_num: int
    job: Job
    prompt_key: bytes = b""
    """Equal for equal contexts."""

    # Filled in by the scheduler.
    index: int = -1
    """Row of the batch; -1 while waiting and when finished."""
    cached_tokens: int = 0
    output_ids: np.ndarray | None = None
    """int64 [completion_tokens]"""
    output_log_probs: np.ndarray | None = None
    """float32 [completion_tokens]"""
    output_top: list[list[tuple[float, int]]] = field(default_factory=list)
    input_log_probs: np.ndarray | None = None
    """float32 [prompt_tokens - logprob_start_len - 1]: every position but the first of the range"""
    input_top: list[list[tuple[float, int]]] = field(default_factory=list)
    versions: list[tuple[str, int]] = field(default_factory=list)
    """(weight version, first token made with it)"""
    finish_reason: dict[str, Any] | None = None
    made_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64: what it had generated when it was taken back to wait (pause mode retract), and goes on from."""
    made_log_probs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    num_retractions: int = 0
    context: np.ndarray = field(init=False)
    """int64 [prompt_tokens + made]: what has to be in the cache before the next token."""

    def __post_init__(self) -> None:
        self.context = self.input_ids

    @property
    def wants_prompt_scores(self) -> bool:
        return self.logprob_start_len >= 0 and self.input_log_probs is None

    def retract(self, ids: np.ndarray, log_probs: np.ndarray) -> None:
        """Back to waiting, with all that it has generated so far."""
        self.made_ids, self.made_log_probs = ids.copy(), log_probs.copy()
        self.context = np.concatenate((self.input_ids, self.made_ids))
        self.prompt_key = self.context.tobytes()
        self.num_retractions += 1


@dataclass(eq=False, slots=True)
class Job:
    """One HTTP request: its rows in reply order, prompt by prompt."""

    rid: str
    """The client's own, where it gave one for the whole request; aborting it aborts all rows."""
    rows: list[Row] = field(default_factory=list)
    as_list: bool = False
    """The reply is a list: a batch, or n > 1."""
    return_text_in_logprobs: bool = False
    stream: bool = False
    """The client reads the answer while it is made."""
    num_unfinished: int = 0
    listener: Callable[[list[Token]], None] | None = None
    """Called from the decode thread with what each step adds, where somebody streams the answer."""


class Token(NamedTuple):
    """What a step adds to a streamed row; `id` None says that the row has ended, and is filled in."""

    row: Row
    id: int | None
    log_prob: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What requests are checked against."""

    vocab_size: int
    context_length: int
    max_total_tokens: int
    encode: Callable[[str], list[int]] | None
    """None without a tokenizer."""


_SAMPLING_UNSUPPORTED = ("json_schema", "regex", "ebnf", "structural_tag", "custom_params", "stream_interval")
_UNSUPPORTED = (
    "lora_path", "image_data", "video_data", "audio_data", "modalities", "input_embeds", "session_params",
    "custom_logit_processor", "return_hidden_states", "return_routed_experts", "token_ids_logprob", "background",
    "bootstrap_host", "bootstrap_port", "bootstrap_room", "data_parallel_rank", "priority", "extra_key", "log_metrics",
)  # fmt: skip
_SUPPORTED = (
    "text", "input_ids", "sampling_params", "rid", "return_logprob", "logprob_start_len", "top_logprobs_num",
    "return_text_in_logprobs", "stream",
)  # fmt: skip
_SAMPLING_SUPPORTED = (
    "max_new_tokens", "min_new_tokens", "n", "temperature", "top_p", "top_k", "min_p", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "stop", "stop_token_ids", "stop_regex", "ignore_eos",
    "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "logit_bias", "sampling_seed",
)  # fmt: skip

MAX_ROWS_PER_REQUEST = 65536


def parse_generate(body: Any, limits: Limits) -> Job:
    """Parses the body of POST /generate. Raises `RequestError` with one line that names the field.

    Rows that share one `sampling_seed` (n > 1, or one `sampling_params` for a batch) take `derive_seed(seed, row)`.
    """
    if not isinstance(body, Mapping):
        raise RequestError(f"body, got {type(body).__name__}: not a JSON object; send {{input_ids, sampling_params}}")
    _refuse_unknown(body, _SUPPORTED, _UNSUPPORTED, "field")
    prompts, batched = _prompts(body, limits)
    num_prompts = len(prompts)

    raw_params = body.get("sampling_params")
    if isinstance(raw_params, list):
        if not batched or len(raw_params) != num_prompts:
            raise RequestError(
                f"sampling_params, got a list of {len(raw_params)}: the request has "
                f"{f'{num_prompts} prompts' if batched else 'one prompt'}; send one dict, or one per prompt of a batch"
            )
        params = _parse_each(raw_params, limits)
        seeds = [_seed(raw) for raw in raw_params]
        if len({p.n for p in params}) != 1:
            raise RequestError(f"n, got {sorted({p.n for p in params})}: rows of a batch share one n; send equal ones")
    else:
        params = [parse_sampling_params(raw_params or {}, limits)] * num_prompts
        seeds = [_seed(raw_params or {})] * num_prompts
    n = params[0].n
    if num_prompts * n > MAX_ROWS_PER_REQUEST:
        raise RequestError(f"n, got {n}: {num_prompts * n} rows in one request; send at most {MAX_ROWS_PER_REQUEST}")

    return_logprob = _per_prompt(body, "return_logprob", bool, False, num_prompts)
    start_len = _per_prompt(body, "logprob_start_len", int, -1, num_prompts)
    top_num = _per_prompt(body, "top_logprobs_num", int, 0, num_prompts)
    rids = _rids(body.get("rid"), num_prompts, batched)
    job = Job(
        rid=body["rid"] if isinstance(body.get("rid"), str) else "",
        as_list=batched or n > 1,
        return_text_in_logprobs=_flag(body, "return_text_in_logprobs"),
        stream=_flag(body, "stream"),
    )
    if job.return_text_in_logprobs and limits.encode is None:
        raise RequestError("return_text_in_logprobs, got true: the engine has no tokenizer (--skip-tokenizer-init)")
    shared_seed = not isinstance(raw_params, list)
    for i, ids in enumerate(prompts):
        if not i or ids is not prompts[i - 1] or params[i] is not params[i - 1]:
            _check_fits(ids, params[i], limits)
            key = ids.tobytes()
        if not -1 <= start_len[i] < len(ids):
            raise RequestError(
                f"logprob_start_len, got {start_len[i]}: the prompt has {len(ids)} tokens; give -1 or less"
            )
        if not 0 <= top_num[i] <= limits.vocab_size:
            raise RequestError(f"top_logprobs_num, got {top_num[i]}: give 0 to {limits.vocab_size}")
        rows_of_seed = num_prompts * n if shared_seed else n
        for j in range(n):
            seed = seeds[i]
            if seed is not None and rows_of_seed > 1:
                seed = derive_seed(seed, i * n + j if shared_seed else j)
            job.rows.append(
                Row(
                    rid=rids[i] if n == 1 else f"{rids[i]}_{j}",
                    input_ids=ids,
                    params=params[i],
                    seed=seed,
                    return_logprob=return_logprob[i],
                    logprob_start_len=start_len[i] if return_logprob[i] else -1,
                    top_logprobs_num=top_num[i] if return_logprob[i] else 0,
                    job=job,
                    prompt_key=key,
                )
            )
    job.num_unfinished = len(job.rows)
    return job


def parse_sampling_params(raw: Any, limits: Limits) -> SamplingParams:
    """Checks one `sampling_params` object. Raises `RequestError`."""
    if not isinstance(raw, Mapping):
        raise RequestError(f"sampling_params, got {type(raw).__name__}: not an object; send a dict or a list of dicts")
    _refuse_unknown(raw, _SAMPLING_SUPPORTED, _SAMPLING_UNSUPPORTED, "sampling_params field")
    if raw.get("spaces_between_special_tokens", True) is False:
        raise RequestError("spaces_between_special_tokens, got false: the tokenizer decides it; leave it out")
    max_new = raw.get("max_new_tokens", 128)
    params = SamplingParams(
        max_new_tokens=None if max_new is None else _number(raw, "max_new_tokens", int, 128, 0),
        min_new_tokens=_number(raw, "min_new_tokens", int, 0, 0),
        n=_number(raw, "n", int, 1, 1),
        temperature=_number(raw, "temperature", float, 1.0, 0.0),
        top_p=_number(raw, "top_p", float, 1.0, 0.0, 1.0),
        top_k=_number(raw, "top_k", int, -1, -1),
        min_p=_number(raw, "min_p", float, 0.0, 0.0, 1.0),
        frequency_penalty=_number(raw, "frequency_penalty", float, 0.0, -2.0, 2.0),
        presence_penalty=_number(raw, "presence_penalty", float, 0.0, -2.0, 2.0),
        repetition_penalty=_number(raw, "repetition_penalty", float, 1.0, 0.0, 2.0),
        stop=_strings(raw, "stop"),
        stop_token_ids=_token_ids(raw.get("stop_token_ids"), limits),
        stop_regex=_patterns(raw),
        ignore_eos=_flag(raw, "ignore_eos"),
        skip_special_tokens=_flag(raw, "skip_special_tokens", True),
        no_stop_trim=_flag(raw, "no_stop_trim"),
        logit_bias=_logit_bias(raw.get("logit_bias"), limits),
    )
    if params.top_p == 0.0:
        raise RequestError("top_p, got 0: no token would be left; give a number in (0, 1]")
    if params.top_k == 0:
        raise RequestError("top_k, got 0: no token would be left; give -1 for all, or at least 1")
    if params.repetition_penalty == 0.0:
        raise RequestError("repetition_penalty, got 0: logits are divided by it; give a number in (0, 2]")
    if params.max_new_tokens is not None and params.min_new_tokens > params.max_new_tokens:
        raise RequestError(f"min_new_tokens, got {params.min_new_tokens}: more than max_new_tokens; lower it")
    if (params.stop or params.stop_regex) and limits.encode is None:
        raise RequestError("stop, got a text: the engine has no tokenizer (--skip-tokenizer-init); use stop_token_ids")
    return params


def _parse_each(raws: list[Any], limits: Limits) -> list[SamplingParams]:
    """One for each prompt. Answers of a group differ in their seeds alone: what is spelled the same is parsed once."""
    parsed: dict[str, SamplingParams] = {}
    found = []
    for raw in raws:
        rest = {name: value for name, value in raw.items() if name != "sampling_seed"} if isinstance(raw, dict) else raw
        key = repr(rest)
        if key not in parsed:
            parsed[key] = parse_sampling_params(rest, limits)
        found.append(parsed[key])
    return found


def _seed(raw: Mapping[str, Any]) -> int | None:
    seed: int | None = _number(raw, "sampling_seed", int, None, 0, 2**64 - 1)
    return seed


def _prompts(body: Mapping[str, Any], limits: Limits) -> tuple[list[np.ndarray], bool]:
    """Token ids of each prompt, and whether the request is a batch."""
    text, ids = body.get("text"), body.get("input_ids")
    if (text is None) == (ids is None):
        raise RequestError(
            f"prompt, got {'neither' if ids is None else 'both'} of text and input_ids: send exactly one"
        )
    if text is not None:
        if limits.encode is None:
            raise RequestError(
                "text, got a prompt: the engine has no tokenizer (--skip-tokenizer-init); send input_ids"
            )
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise RequestError(f"text, got {_shorten(text)}: send a string or a list of strings")
        encode = limits.encode
        return [_checked_ids(encode(t), limits) for t in texts], not isinstance(text, str)
    if not isinstance(ids, list) or not ids:
        raise RequestError(f"input_ids, got {_shorten(ids)}: send a list of token ids, or a list of such lists")
    if not isinstance(ids[0], list):
        return [_checked_ids(ids, limits)], False
    # A group's answers have one prompt: it is checked once, and its rows share the array.
    prompts = [_checked_ids(ids[0], limits)]
    for previous, row in itertools.pairwise(ids):
        same = row == previous and set(map(type, row)) == {int}  # 1 == True, too
        prompts.append(prompts[-1] if same else _checked_ids(row, limits))
    return prompts, True


def _checked_ids(ids: Any, limits: Limits) -> np.ndarray:
    kinds = set(map(type, ids)) if isinstance(ids, list) else set()
    if bool in kinds:
        raise RequestError(f"input_ids, got {_shorten(ids)}: true and false are no token ids; send integers")
    if kinds != {int}:
        raise RequestError(f"input_ids, got {_shorten(ids)}: a prompt is a non-empty list of integers; send token ids")
    low, high = min(ids), max(ids)
    if low < 0 or high >= limits.vocab_size:
        raise RequestError(
            f"input_ids, got {low if low < 0 else high}: the vocabulary has {limits.vocab_size} tokens; "
            "check that the tokenizer is this model's"
        )
    return np.array(ids, dtype=np.int64)


def _check_fits(ids: np.ndarray, params: SamplingParams, limits: Limits) -> None:
    if (len(ids) >= limits.context_length and params.max_new_tokens != 0) or len(ids) > limits.context_length:
        raise RequestError(
            f"prompt, got {len(ids)} tokens: the context length is {limits.context_length}, prompt and answer together; "
            "shorten the prompt or start the engine with a larger --context-length"
        )
    needed = len(ids) + max_new_tokens(ids, params, limits.context_length)
    if needed > limits.max_total_tokens:
        raise RequestError(
            f"prompt plus max_new_tokens, got {needed} tokens: the KV cache holds {limits.max_total_tokens}; "
            "ask for less or start the engine with a larger --max-total-tokens"
        )


def max_new_tokens(ids: np.ndarray, params: SamplingParams, context_length: int) -> int:
    """How many tokens the row may make: what it asked for, ended by the context length."""
    room = context_length - len(ids)
    return room if params.max_new_tokens is None else min(params.max_new_tokens, room)


def _refuse_unknown(raw: Mapping[str, Any], known: tuple[str, ...], unsupported: tuple[str, ...], what: str) -> None:
    for name, value in raw.items():
        if name in known:
            continue
        if name in unsupported:
            if value in (None, False, [], {}):  # spelled out as off
                continue
            raise RequestError(
                f"{what} {name!r}, got {_shorten(value)}: the embedded engine does not serve it; leave it out"
            )
        near = difflib.get_close_matches(str(name), known, n=1)
        raise RequestError(f"{what}, got {name!r}: unknown; {f'did you mean {near[0]!r}?' if near else 'leave it out'}")


def _number(
    raw: Mapping[str, Any],
    name: str,
    kind: type[Any],
    default: Any,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    value = raw.get(name)
    if value is None:
        return default
    accepted = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise RequestError(f"{name}, got {_shorten(value)}: not {'a number' if kind is float else 'an integer'}")
    # Written so that NaN fails.
    if (low is not None and not value >= low) or (high is not None and not value <= high) or value in (float("inf"),):
        bounds = f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
        raise RequestError(f"{name}, got {value}: out of range; give {bounds}")
    return kind(value)


def _flag(raw: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError(f"{name}, got {_shorten(value)}: send true or false")
    return value


def _strings(raw: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = raw.get(name)
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise RequestError(f"{name}, got {_shorten(value)}: send a non-empty string or a list of them")
    return tuple(values)


def _patterns(raw: Mapping[str, Any]) -> tuple[re.Pattern[str], ...]:
    patterns = []
    for text in _strings(raw, "stop_regex"):
        try:
            patterns.append(re.compile(text))
        except re.error as error:
            raise RequestError(f"stop_regex, got {text!r}: not a regular expression ({error}); repair it") from error
    return tuple(patterns)


def _token_ids(value: Any, limits: Limits) -> tuple[int, ...]:
    if value is None:
        return ()
    values = [value] if type(value) is int else value
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v < limits.vocab_size for v in values):
        raise RequestError(f"stop_token_ids, got {_shorten(value)}: send token ids below {limits.vocab_size}")
    return tuple(values)


def _logit_bias(value: Any, limits: Limits) -> tuple[tuple[int, float], ...]:
    if not value:
        return ()
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias, got {_shorten(value)}: send an object of token id to number")
    pairs = []
    for token, bias in value.items():
        if not str(token).isdecimal() or int(token) >= limits.vocab_size:
            raise RequestError(f"logit_bias, got the key {token!r}: send token ids below {limits.vocab_size}")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not abs(bias) <= 1e30:
            raise RequestError(f"logit_bias of {token}, got {_shorten(bias)}: send a finite number")
        pairs.append((int(token), float(bias)))
    return tuple(pairs)


def _per_prompt(body: Mapping[str, Any], name: str, kind: type[Any], default: Any, num_prompts: int) -> list[Any]:
    value = body.get(name)
    values = [value] * num_prompts if not isinstance(value, list) else value
    if len(values) != num_prompts:
        raise RequestError(f"{name}, got a list of {len(values)}: the request has {num_prompts} prompts; send one each")
    for v in values:
        if v is not None and type(v) is not kind:
            raise RequestError(f"{name}, got {_shorten(v)}: send {'true or false' if kind is bool else 'an integer'}")
    return [default if v is None else v for v in values]


def _rids(value: Any, num_prompts: int, batched: bool) -> list[str]:
    if value is None:
        value = uuid.uuid4().hex
    if isinstance(value, str):
        return [f"{value}_{i}" for i in range(num_prompts)] if batched else [value]
    if isinstance(value, list) and len(value) == num_prompts and all(isinstance(v, str) for v in value):
        return value
    raise RequestError(f"rid, got {_shorten(value)}: send a string, or one per prompt ({num_prompts})")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
