"""The running rows, as columns: everything that a decode step needs of a row is one entry of a numpy array.

Rows in use are the first `num_rows`; a finished row's place is taken by the last one (`remove` says which moves happened,
so that cache and sampler follow). What a row has generated stays in one place for its whole life (`slot`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .requests import Row


class Feature:
    """What a row needs beyond plain sampling at temperature 1; a step pays only for what some row needs.

    Plain ints, or-ed together: arithmetic of enum flags is slow enough to show in a decode step.
    """

    TEMPERATURE = 1
    GREEDY = 2
    SAMPLED = 4
    FILTER = 8
    PENALTY = 16
    BIAS = 32
    MIN_TOKENS = 64
    TEXT_STOP = 128
    TOP_LOG_PROBS = 256
    STREAMED = 512


#: All columns are 8 bytes wide, so that each is a strided array that torch can wrap without a copy.
_COLUMNS = np.dtype(
    [
        ("seed", np.uint64),
        ("step", np.int64),  # tokens generated
        ("length", np.int64),  # tokens in the KV cache
        ("max_new", np.int64),
        ("capacity", np.int64),  # prompt + max_new: what the row may come to hold
        ("slot", np.int64),
        ("token", np.int64),  # the last one sampled
        ("features", np.int64),
        ("min_new", np.int64),
        ("top_k", np.int64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("frequency_penalty", np.float64),
        ("presence_penalty", np.float64),
        ("repetition_penalty", np.float64),
    ]
)
_NO_TOKEN = -1


@dataclass(frozen=True)
class Moves:
    """Rows that changed place: what was at `sources` is now at `targets`."""

    sources: np.ndarray
    targets: np.ndarray


class Batch:
    """Bookkeeping of the running rows. Used from the decode thread only."""

    def __init__(self, capacity: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.rows: list[Row] = []
        self.columns = np.zeros(capacity, _COLUMNS)
        self.columns["temperature"] = 1.0  # idle rows of a fixed-shape step are divided by it too
        self.stop_ids = np.full((capacity, 1), _NO_TOKEN, np.int64)
        self._tokens = np.zeros((capacity, 64), np.int64)
        self._log_probs = np.zeros((capacity, 64), np.float32)
        self._free_slots = list(range(capacity))[::-1]

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def live(self) -> np.ndarray:
        """Columns of the rows in use (a view)."""
        return self.columns[: len(self.rows)]

    @property
    def features(self) -> int:
        """Union over the rows in use."""
        return int(np.bitwise_or.reduce(self.live["features"]))

    def having(self, feature: int) -> np.ndarray:
        """Numbers of the rows with that feature."""
        return np.flatnonzero(self.live["features"] & feature)

    def add(self, row: Row, *, seed: int, max_new: int, stop_ids: tuple[int, ...]) -> int:
        """Appends a row whose context is in the cache; returns its number."""
        p, index = row.params, len(self.rows)
        features = Feature.GREEDY if p.greedy else Feature.SAMPLED
        if p.temperature not in (0.0, 1.0):
            features |= Feature.TEMPERATURE
        top_k = self._vocab_size if p.top_k < 0 else min(p.top_k, self._vocab_size)
        if not p.greedy and (top_k < self._vocab_size or p.top_p < 1.0 or p.min_p > 0.0):
            features |= Feature.FILTER
        features |= Feature.PENALTY if p.penalised else 0
        features |= Feature.BIAS if p.logit_bias else 0
        features |= Feature.MIN_TOKENS if p.min_new_tokens and stop_ids else 0
        features |= Feature.TEXT_STOP if p.stop or p.stop_regex else 0
        features |= Feature.TOP_LOG_PROBS if row.top_logprobs_num else 0
        features |= Feature.STREAMED if row.job.listener is not None else 0
        slot, made = self._free_slots.pop(), len(row.made_ids)
        self._make_room(made)
        self._tokens[slot, :made], self._log_probs[slot, :made] = row.made_ids, row.made_log_probs
        token = int(row.made_ids[-1]) if made else _NO_TOKEN
        self.columns[index] = (
            seed, made, len(row.context), max_new, len(row.input_ids) + max_new, slot, token, features, p.min_new_tokens,
            top_k, p.temperature or 1.0, p.top_p, p.min_p,
            p.frequency_penalty, p.presence_penalty, p.repetition_penalty,
        )  # fmt: skip
        if len(stop_ids) > self.stop_ids.shape[1]:
            wider = np.full((len(self.columns), len(stop_ids)), _NO_TOKEN, np.int64)
            wider[:, : self.stop_ids.shape[1]] = self.stop_ids
            self.stop_ids = wider
        self.stop_ids[index] = _NO_TOKEN
        self.stop_ids[index, : len(stop_ids)] = stop_ids
        row.index = index
        self.rows.append(row)
        return index

    def record(self, tokens: np.ndarray, log_probs: np.ndarray) -> None:
        """One sampled token per row, `[B]` each."""
        live = self.live
        steps, slots = live["step"], live["slot"]
        self._make_room(int(steps.max()) + 1)
        self._tokens[slots, steps] = tokens
        self._log_probs[slots, steps] = log_probs
        live["token"] = tokens
        steps += 1

    def _make_room(self, steps: int) -> None:
        """For that many generated tokens of a row."""
        while steps > self._tokens.shape[1]:
            self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)), 1)
            self._log_probs = np.concatenate((self._log_probs, np.zeros_like(self._log_probs)), 1)

    def stopped(self) -> np.ndarray:
        """[B] bool: the last token is one of the row's stop tokens."""
        return (self.stop_ids[: len(self.rows)] == self.live["token"][:, None]).any(1)

    def exhausted(self) -> np.ndarray:
        """[B] bool: the row has made all the tokens it may."""
        return self.live["step"] >= self.live["max_new"]

    def output(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probs that a row has generated (views)."""
        slot, steps = self.columns[index]["slot"], self.columns[index]["step"]
        return self._tokens[slot, :steps], self._log_probs[slot, :steps]

    def remove(self, indices: np.ndarray) -> Moves:
        """Takes rows out (ascending numbers) and closes the gaps with the last rows."""
        kept = len(self.rows) - len(indices)
        self._free_slots.extend(self.columns["slot"][indices].tolist())
        targets = indices[indices < kept]
        tail_is_kept = np.ones(len(indices), bool)
        tail_is_kept[indices[indices >= kept] - kept] = False
        sources = kept + np.flatnonzero(tail_is_kept)
        for index in indices.tolist():
            self.rows[index].index = -1
        self.columns[targets] = self.columns[sources]
        self.stop_ids[targets] = self.stop_ids[sources]
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self.rows[target] = self.rows[source]
            self.rows[target].index = target
        del self.rows[kept:]
        return Moves(sources, targets)
