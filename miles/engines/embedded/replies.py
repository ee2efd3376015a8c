"""What POST /generate answers: a finished `Job` as SGLang's JSON. Runs off the decode thread."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from .requests import Job, Row
from .text import Tokenizer, trim_at_stop


def build_reply(job: Job, tokenizer: Tokenizer | None, latency_s: float) -> dict[str, Any] | list[dict[str, Any]]:
    """One object, or a list for a batch and for n > 1."""
    texts = final_texts(job.rows, tokenizer)
    replies = [row_reply(row, text, tokenizer, latency_s) for row, text in zip(job.rows, texts, strict=True)]
    return replies if job.as_list else replies[0]


def row_reply(row: Row, text: str, tokenizer: Tokenizer | None, latency_s: float) -> dict[str, Any]:
    """Of one row: finished, or as far as it is (`finish_reason` None)."""
    assert row.output_ids is not None
    meta: dict[str, Any] = {
        "id": row.rid,
        "finish_reason": row.finish_reason,
        "prompt_tokens": len(row.input_ids),
        "completion_tokens": len(row.output_ids),
        "cached_tokens": row.cached_tokens,
        "num_retractions": row.num_retractions,
        "weight_version": row.versions[-1][0],
        "weight_versions": _version_spans(row),
        "e2e_latency": latency_s,
    }
    if row.return_logprob:
        _add_log_probs(meta, row, tokenizer if row.job.return_text_in_logprobs else None)
    return {"text": text, "output_ids": row.output_ids.tolist(), "meta_info": meta}


def _add_log_probs(meta: dict[str, Any], row: Row, tokenizer: Tokenizer | None) -> None:
    assert row.output_ids is not None
    assert row.output_log_probs is not None
    meta["output_token_logprobs"] = _triples(row.output_log_probs.tolist(), row.output_ids, tokenizer)
    if row.top_logprobs_num:
        meta["output_top_logprobs"] = [_top(top, tokenizer) for top in row.output_top]
    meta["input_token_logprobs"] = []
    if row.logprob_start_len >= 0:
        # The first position has no log-prob: nothing in the range predicts it.
        values = [] if row.input_log_probs is None else row.input_log_probs.tolist()
        ids = row.input_ids[row.logprob_start_len :][: len(values) + 1]
        meta["input_token_logprobs"] = _triples([None, *values], ids, tokenizer)
        if row.top_logprobs_num:
            meta["input_top_logprobs"] = [None, *(_top(top, tokenizer) for top in row.input_top)]


def _triples(values: list[Any], ids: np.ndarray, tokenizer: Tokenizer | None) -> list[tuple[Any, int, str | None]]:
    tokens = ids.tolist()
    texts = itertools.repeat(None, len(tokens)) if tokenizer is None else token_texts(tokens, tokenizer)
    return list(zip(values, tokens, texts, strict=True))


def _top(top: list[tuple[float, int]], tokenizer: Tokenizer | None) -> list[list[Any]]:
    texts = [None] * len(top) if tokenizer is None else token_texts([token for _, token in top], tokenizer)
    return [[value, token, text] for (value, token), text in zip(top, texts, strict=True)]


def token_texts(tokens: list[int], tokenizer: Tokenizer) -> list[str]:
    return tokenizer.decode_batch([[token] for token in tokens], skip_special_tokens=False)


def _version_spans(row: Row) -> list[dict[str, Any]]:
    """Which tokens of the answer `[start, end)` each weight version made."""
    assert row.output_ids is not None
    starts = [start for _, start in row.versions]
    ends = [*starts[1:], len(row.output_ids)]
    spans = [(version, start, end) for (version, start), end in zip(row.versions, ends, strict=True)]
    filled = [span for span in spans if span[2] > span[1]] or spans[-1:]
    return [{"version": version, "start": start, "end": end} for version, start, end in filled]


def final_texts(rows: list[Row], tokenizer: Tokenizer | None) -> list[str]:
    """The answers as text; what stopped a row is trimmed off unless it asked otherwise."""
    if tokenizer is None:
        return [""] * len(rows)
    texts = [""] * len(rows)
    for skip in {row.params.skip_special_tokens for row in rows}:
        chosen = [i for i, row in enumerate(rows) if row.params.skip_special_tokens is skip]
        decoded = tokenizer.decode_batch([_text_ids(rows[i]) for i in chosen], skip_special_tokens=skip)
        for i, text in zip(chosen, decoded, strict=True):
            texts[i] = _trim(rows[i], text)
    return texts


def _matched(row: Row) -> int | str | None:
    matched = (row.finish_reason or {}).get("matched")
    return matched if isinstance(matched, int | str) else None


def _text_ids(row: Row) -> list[int]:
    assert row.output_ids is not None
    ids: list[int] = row.output_ids.tolist()
    return ids[:-1] if isinstance(_matched(row), int) and not row.params.no_stop_trim else ids


def _trim(row: Row, text: str) -> str:
    matched = _matched(row)
    if not isinstance(matched, str) or row.params.no_stop_trim:
        return text
    if matched in row.params.stop:
        return trim_at_stop(text, matched)
    return trim_at_stop(text, next(p for p in row.params.stop_regex if p.pattern == matched))
