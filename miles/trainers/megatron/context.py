"""Sequences shared by context-parallel ranks: which tokens each rank has, and scores of tokens put together again.

    sequence, padded to 2 * size pieces:   | 0 | 1 | 2 | 3 |      size 2: rank 0 has pieces 0 and 3, rank 1 has 1 and 2

A late piece sees many keys and an early one few, so with one of each all ranks have the same work (arXiv 2311.09431).
Each rank computes what it can for its own tokens. Scores of response tokens, one number each, are then summed into the table of
all of them, which is the same on every rank: losses see whole rows and know nothing of the split.

Legend: `T` tokens of a micro-batch, `R` response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TokenSplit:
    """How this rank takes part in the tokens of a micro-batch."""

    rank: int = 0
    size: int = 1
    """Ranks that share each sequence."""
    multiple: int = 1
    """Tokens on each rank come in multiples of this: with sequence parallelism its ranks divide them further."""

    def padded(self, lengths: np.ndarray) -> np.ndarray:
        """[S] lengths of sequences -> those that can be cut into pieces; with one rank nothing is."""
        pieces = 2 * self.size if self.size > 1 else 1
        return -(-lengths // pieces) * pieces

    def missing(self, tokens: int) -> int:
        """Tokens on each rank that fill `tokens` of them up to the multiple: an even number where sequences are cut."""
        step = 2 if self.size > 1 else 1
        return next(n for n in range(0, 2 * self.multiple, step) if (tokens + n) % self.multiple == 0)

    def own(self, lengths: np.ndarray) -> np.ndarray:
        """`lengths` [S], padded -> [T / size] which tokens of the packed axis this rank has: of each sequence two pieces."""
        return of_rank(lengths, self.rank, self.size)


def of_rank(lengths: np.ndarray, rank: int, size: int) -> np.ndarray:
    if size == 1:
        return np.arange(int(lengths.sum()))
    piece = lengths // (2 * size)
    starts = np.cumsum(lengths) - lengths
    firsts = np.stack([starts + rank * piece, starts + (2 * size - 1 - rank) * piece], axis=1).flatten()
    each = np.repeat(piece, 2)
    return np.arange(int(each.sum())) + np.repeat(firsts - (np.cumsum(each) - each), each)


def whole(scores: Tensor, own: Tensor | None, total: int, group: dist.ProcessGroup) -> Tensor:
    """`scores` of the response tokens `own` of this rank -> those of all `total` tokens, the same on every rank of `group`.

    Every rank goes on to compute the same from them, so its own part of the gradient is all that its own scores need.
    `own` None: the rank has all tokens.
    """
    if own is None:
        return scores
    joined: Tensor = _Whole.apply(scores, own, total, group)
    return joined


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, own: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(own)
        table = scores.new_zeros(total)
        table[own] = scores
        dist.all_reduce(table, group=group)
        return table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (own,) = ctx.saved_tensors
        return grads[0].index_select(0, own), None, None, None
