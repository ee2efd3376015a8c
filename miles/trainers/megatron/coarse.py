"""Divergence from a teacher that tells its likeliest tokens alone: of both distributions coarsened to those and one rest.

    hidden [R, H] --chunk @ W^T--> log-softmax [chunk, V] --teacher's tokens, and all others as one--> [R, K + 1] --> divergence [R]

Coarsening can only bring two distributions closer, whatever the f-divergence (log-sum inequality): for the teacher's top tokens
k = 1..K, and T_rest = 1 - sum_k T_k, S_rest likewise,

    D(T, S) >= sum_k d(T_k, S_k) + d(T_rest, S_rest),     equal where K = V

so what is minimised is a lower bound of the whole divergence, at every token. The student's rest is summed over its tokens, not
taken from 1, which would lose small ones to rounding.

Tables of the whole vocabulary exist for a chunk of tokens at a time, also in the backward pass, which makes them again. With the
vocabulary split over ranks each holds its columns; only the K + 1 numbers of a token cross ranks.
Legend: `R` response tokens, `H` hidden size, `V` vocabulary (of this rank), `K` the teacher's top tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles.algo.distillation import generalized_jsd, with_remainder

from .logprobs import Vocabulary, log_softmax_of


@dataclass(frozen=True)
class TopTokens:
    """The teacher's likeliest tokens at every response token, at temperature 1."""

    ids: Tensor
    """[R, K] int64, no token twice."""
    log_probs: Tensor
    """[R, K] fp32"""


def coarse_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: TopTokens,
    vocabulary: Vocabulary,
    *,
    vocab_size: int,
    beta: float,
    chunk_tokens: int = -1,
) -> Tensor:
    """[R] `generalized_jsd` of both distributions over the teacher's tokens and one rest, at temperature 1.

    hidden [R, H], weight [padded V, H]; they get the gradient. vocab_size: tokens of all ranks; with K = vocab_size there is no
    rest. chunk_tokens: tokens whose tables are live at once, -1 takes all.
    """
    with_rest = teacher.ids.shape[1] < vocab_size
    student = coarse_log_probs(hidden, weight, teacher.ids, vocabulary, with_rest=with_rest, chunk_tokens=chunk_tokens)
    theirs = with_remainder(teacher.log_probs) if with_rest else teacher.log_probs
    return generalized_jsd(student, theirs, beta)


def coarse_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    vocabulary: Vocabulary,
    *,
    with_rest: bool = True,
    chunk_tokens: int = -1,
) -> Tensor:
    """[R, K + 1] log-probs of the tokens `ids` [R, K] and of all others together; [R, K] without the rest. fp32, with gradient.

    As in `token_scores`, `hidden` must come through megatron's copy to the tensor-parallel region where the vocabulary is split.
    """
    chunk = max(len(ids), 1) if chunk_tokens == -1 else chunk_tokens
    found: Tensor = _CoarseLogProbs.apply(hidden, weight, ids, vocabulary, with_rest, chunk)
    return found


class _CoarseLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, vocabulary: Vocabulary, with_rest: bool, chunk: int
    ) -> Tensor:
        active, found = weight[: vocabulary.rows], []
        for rows, own in zip(hidden.split(chunk), ids.split(chunk), strict=True):
            table = log_softmax_of(rows, active, rows.new_ones(len(rows), dtype=torch.float32), vocabulary)
            columns, mine = _columns(own, vocabulary, table.shape[1])
            picked = table.gather(1, columns.where(mine, 0)) * mine
            if vocabulary.is_split:
                dist.all_reduce(picked, group=vocabulary.group)
            found.append(torch.cat([picked, _rest(table, columns, vocabulary)], dim=1) if with_rest else picked)
        out = torch.cat(found) if found else hidden.new_zeros(0, ids.shape[1] + with_rest, dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, ids, out)
        ctx.vocabulary, ctx.with_rest, ctx.chunk = vocabulary, with_rest, chunk
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, ids, out = ctx.saved_tensors
        vocabulary, num_ids = ctx.vocabulary, ids.shape[1]
        active = weight[: vocabulary.rows]
        grad_hidden = torch.zeros_like(hidden)
        # Chunks add up in fp32: bf16 sums over many of them would lose the small ones.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, len(ids), ctx.chunk):
            piece = slice(start, start + ctx.chunk)
            rows, of_ids = hidden[piece], grad[piece, :num_ids]
            table = log_softmax_of(rows, active, rows.new_ones(len(rows), dtype=torch.float32), vocabulary)
            columns, mine = _columns(ids[piece], vocabulary, table.shape[1])
            # d log p_k / dz_j = [j = k] - p_j;  d log rest / dz_j = [j is of the rest] p_j / rest - p_j
            slope = table.exp().mul_(-grad[piece].sum(dim=1, keepdim=True))
            if ctx.with_rest:
                shares = (table - out[piece, num_ids:]).masked_fill(_is_named(columns, table.shape[1]), -torch.inf)
                slope.addcmul_(shares.exp_(), grad[piece, num_ids:])
            slope.scatter_add_(1, columns.where(mine, 0), of_ids * mine)
            slope = slope.to(weight.dtype)
            torch.mm(slope, active, out=grad_hidden[piece])
            grad_weight[: vocabulary.rows] += slope.t() @ rows
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _columns(ids: Tensor, vocabulary: Vocabulary, width: int) -> tuple[Tensor, Tensor]:
    """[n, K] the columns of `ids` in this rank's table of `width` columns, `width` where another rank has the token; and [n, K]
    bool, whether it is ours."""
    local = ids - vocabulary.start
    mine = (local >= 0) & (local < width)
    return local.where(mine, width), mine


def _is_named(columns: Tensor, width: int) -> Tensor:
    """[n, width] bool: whether a column is one of `columns`."""
    named = torch.zeros(len(columns), width + 1, dtype=torch.bool, device=columns.device)
    return named.scatter_(1, columns, True)[:, :width]


def _rest(table: Tensor, columns: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[n, 1] log of what all tokens that are not named have together, over all ranks."""
    rest = table.masked_fill(_is_named(columns, table.shape[1]), -torch.inf).logsumexp(dim=1, keepdim=True)
    if not vocabulary.is_split:
        return rest
    assert vocabulary.group is not None
    parts = [torch.empty_like(rest) for _ in range(vocabulary.group.size())]
    dist.all_gather(parts, rest, group=vocabulary.group)
    return torch.cat(parts, dim=1).logsumexp(dim=1, keepdim=True)
