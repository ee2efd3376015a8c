"""One sampling step over the batch: consumes logits and the batch's columns, produces a token and a log-prob per row.

Order, as SGLang applies it: penalties, bias, minimum length; temperature; log-softmax (reported); truncation; draw.
Work that only some rows ask for is done on those rows alone; it never changes another row's arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .batch import Batch, Feature, Moves
from .sampling import Filters, draw, log_probs, penalise, truncate, uniforms


@dataclass(frozen=True)
class Sampled:
    """`B` rows; host arrays."""

    tokens: np.ndarray
    """int64 [B]"""
    log_probs: np.ndarray
    """float32 [B]"""
    top: dict[int, list[tuple[float, int]]]
    """Row number -> its likeliest tokens as (log-prob, id), for rows that asked."""


class Sampler:
    """Holds the token counts that penalties need. Used from the decode thread only."""

    def __init__(self, batch: Batch, vocab_size: int, device: torch.device) -> None:
        self._batch, self._vocab_size, self._device = batch, vocab_size, device
        self._counts: torch.Tensor | None = None

    def reset_counts(self, index: int, made: np.ndarray) -> None:
        """A row with penalties took place `index` of the batch; it has generated `made` so far."""
        if self._counts is None:
            self._counts = torch.zeros(len(self._batch.columns), self._vocab_size, device=self._device)
        self._counts[index] = torch.bincount(self._to_device(made), minlength=self._vocab_size)

    def on_moved(self, moves: Moves) -> None:
        """Rows changed places."""
        if self._counts is not None and len(moves.targets):
            self._counts[self._to_device(moves.targets)] = self._counts[self._to_device(moves.sources)]

    def sample(self, logits: torch.Tensor) -> Sampled:
        """`logits` `[B or more, V]` float32, changed in place; rows beyond the batch are computed and dropped."""
        batch, features = self._batch, self._batch.features
        columns = batch.columns[: logits.shape[0]]
        self._adjust(logits, features)
        temperature = None
        if features & Feature.TEMPERATURE:
            temperature = self._to_device(columns["temperature"].astype(np.float32)[:, None])
        scores = log_probs(logits, temperature)
        if features & Feature.SAMPLED:
            probs = scores.exp()
            if features & Feature.FILTER:
                truncate(probs, self._filters())
            tokens = draw(probs, self._to_device(uniforms(columns["seed"], columns["step"])))
            if features & Feature.GREEDY:
                greedy = self._to_device(columns["features"] & Feature.GREEDY) > 0
                tokens = torch.where(greedy, scores.argmax(-1), tokens)
        else:
            tokens = scores.argmax(-1)
        chosen = scores.gather(1, tokens[:, None])[:, 0]
        self._count(tokens, features)
        top = self._top(scores) if features & Feature.TOP_LOG_PROBS else {}
        num_rows = batch.num_rows
        return Sampled(tokens[:num_rows].cpu().numpy(), chosen[:num_rows].cpu().numpy(), top)

    def _adjust(self, logits: torch.Tensor, features: int) -> None:
        batch = self._batch
        if features & Feature.PENALTY:
            rows = batch.having(Feature.PENALTY)
            on_device, columns = self._to_device(rows), batch.columns[rows]
            assert self._counts is not None
            penalties = (
                self._to_device(columns[f"{name}_penalty"].astype(np.float32)[:, None])
                for name in ("frequency", "presence", "repetition")
            )
            logits[on_device] = penalise(logits[on_device], self._counts[on_device], *penalties)
        if features & Feature.BIAS:
            pairs = [
                (i, *pair) for i in batch.having(Feature.BIAS).tolist() for pair in batch.rows[i].params.logit_bias
            ]
            rows_of, ids, values = zip(*pairs, strict=True)
            logits[self._to_device(np.array(rows_of)), self._to_device(np.array(ids))] += self._to_device(
                np.array(values, np.float32)
            )
        if features & Feature.MIN_TOKENS:
            waiting = batch.live["step"] < batch.live["min_new"]
            rows_of_stops, slots = np.nonzero((batch.stop_ids[: batch.num_rows] >= 0) & waiting[:, None])
            ids_of_stops = batch.stop_ids[rows_of_stops, slots]
            logits[self._to_device(rows_of_stops), self._to_device(ids_of_stops)] = float("-inf")

    def _filters(self) -> Filters:
        rows = self._batch.having(Feature.FILTER)
        columns = self._batch.columns[rows]
        return Filters(
            rows=self._to_device(rows),
            top_k=self._to_device(columns["top_k"]),
            top_p=self._to_device(columns["top_p"].astype(np.float32)),
            min_p=self._to_device(columns["min_p"].astype(np.float32)),
        )

    def _count(self, tokens: torch.Tensor, features: int) -> None:
        if features & Feature.PENALTY:
            assert self._counts is not None
            rows = self._to_device(self._batch.having(Feature.PENALTY))
            self._counts[rows, tokens[rows]] += 1

    def _top(self, scores: torch.Tensor) -> dict[int, list[tuple[float, int]]]:
        rows = self._batch.having(Feature.TOP_LOG_PROBS).tolist()
        wanted = {i: self._batch.rows[i].top_logprobs_num for i in rows}
        return top_tokens(scores, wanted)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(array, device=self._device)


def top_tokens(scores: torch.Tensor, wanted: dict[int, int]) -> dict[int, list[tuple[float, int]]]:
    """The likeliest tokens of some rows of `scores` `[*, V]`: row number -> (log-prob, id), likeliest first."""
    rows = list(wanted)
    values, ids = scores[rows].topk(max(wanted.values()), dim=-1)
    listed = zip(rows, values.tolist(), ids.tolist(), strict=True)
    return {row: list(zip(v, i, strict=True))[: wanted[row]] for row, v, i in listed}
