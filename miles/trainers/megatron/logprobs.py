"""Log-probs and entropy of chosen tokens, straight from hidden states, a chunk of logits at a time.

    hidden [R, H] --chunk @ W^T / temperature--> logits [chunk, V] --log-softmax--> log_probs [R], entropies [R]

The full logits [R, V] never exist. Where R fits one chunk its log-softmax is kept for the backward pass; with more
chunks each is computed again there, so no more than one is ever live. The vocabulary may be split over tensor-parallel
ranks: maxima, sums and the picked entries are then reduced over `group`.

Legend: `R` tokens, `H` hidden size, `V` rows of the output weight on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class TokenScores(NamedTuple):
    """fp32, with gradient where `hidden` has one."""

    log_probs: Tensor
    """[R] of the target under the policy at the token's temperature."""
    entropies: Tensor
    """[R] of the whole distribution at that temperature."""


@dataclass(frozen=True)
class Vocabulary:
    """Which part of the vocabulary this rank holds."""

    start: int = 0
    """Token id of the weight's first row."""
    rows: int | None = None
    """Rows that are tokens; those after them pad the shard and never get probability. None: all."""
    group: dist.ProcessGroup | None = None
    """The ranks that hold the other parts; None where this rank holds all."""

    @property
    def is_split(self) -> bool:
        return self.group is not None and self.group.size() > 1


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperatures: Tensor,
    vocabulary: Vocabulary,
    chunk_tokens: int = -1,
) -> TokenScores:
    """`log softmax(hidden @ weight^T / temperature)[target]`, and the entropy of that distribution.

    hidden [R, H], weight [V, H], targets [R] int64 global token ids, temperatures [R] (0, greedy, counts as 1).
    `chunk_tokens`: tokens whose logits are live at once; -1 takes all. With a split vocabulary `hidden` must come through
    megatron's copy to the tensor-parallel region, which sums its gradient over the ranks.
    """
    if chunk_tokens == 0 or chunk_tokens < -1:
        raise ValueError(f"chunk_tokens, got {chunk_tokens}: it must be positive, or -1 for all at once")
    scale = torch.where(temperatures == 0, 1.0, temperatures).reciprocal().float()
    rows = slice(0, vocabulary.rows)
    local = targets - vocabulary.start
    chunk = max(len(targets), 1) if chunk_tokens == -1 else chunk_tokens
    return TokenScores(*_TokenScores.apply(hidden, weight, rows, local, scale, vocabulary, chunk))


@torch.no_grad()
def is_first_choice(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary, chunk_tokens: int = -1
) -> Tensor:
    """[R] bool: whether no token is more probable than the target. Arguments as in `token_scores`; the temperature has no say."""
    rows, local = slice(0, vocabulary.rows), targets - vocabulary.start
    chunk = max(len(targets), 1) if chunk_tokens == -1 else chunk_tokens
    right = torch.empty(len(targets), dtype=torch.bool, device=targets.device)
    for start in range(0, len(targets), chunk):
        piece = slice(start, start + chunk)
        logits = torch.mm(hidden[piece], weight[rows].t()).float()
        best = logits.amax(dim=-1)
        if vocabulary.is_split:
            dist.all_reduce(best, op=dist.ReduceOp.MAX, group=vocabulary.group)
        right[piece] = _pick(logits, local[piece], vocabulary) >= best
    return right


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: slice,
        targets: Tensor,
        scale: Tensor,
        vocabulary: Vocabulary,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        tokens = len(targets)
        log_probs = scale.new_empty(tokens)
        entropies = scale.new_empty(tokens)
        needs_grad = any(ctx.needs_input_grad[:2])
        kept = None
        for start in range(0, tokens, chunk):
            piece = slice(start, start + chunk)
            table = log_softmax_of(hidden[piece], weight[rows], scale[piece], vocabulary)
            log_probs[piece] = _pick(table, targets[piece], vocabulary)
            entropies[piece] = _entropy(table, vocabulary)
            if needs_grad and tokens <= chunk:
                kept = table
        ctx.save_for_backward(hidden, weight, targets, scale, entropies, kept)
        ctx.rows, ctx.vocabulary, ctx.chunk = rows, vocabulary, chunk
        ctx.set_materialize_grads(False)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_log_probs, grad_entropies = grads
        if grad_log_probs is None and grad_entropies is None:
            return (None,) * 7
        hidden, weight, targets, scale, entropies, kept = ctx.saved_tensors
        rows, vocabulary, chunk = ctx.rows, ctx.vocabulary, ctx.chunk
        tokens = len(targets)
        active = weight[rows]
        grad_hidden = torch.empty_like(hidden)
        # Chunks add up in fp32: bf16 sums over many of them would lose the small ones.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, tokens, chunk):
            piece = slice(start, start + chunk)
            table = kept if kept is not None else log_softmax_of(hidden[piece], active, scale[piece], vocabulary)
            # d log p_t / dz = scale (onehot_t - p);  d entropy / dz = -scale p (log p + entropy)
            slope = torch.zeros_like(scale[piece, None])
            if grad_log_probs is not None:
                slope = slope - grad_log_probs[piece, None]
            if grad_entropies is not None:
                slope = slope - (table + entropies[piece, None]) * grad_entropies[piece, None]
            grad_logits = table.exp().mul_(slope)
            if grad_log_probs is not None:
                _add_at(grad_logits, targets[piece], grad_log_probs[piece])
            grad_logits = grad_logits.mul_(scale[piece, None]).to(weight.dtype)
            torch.mm(grad_logits, active, out=grad_hidden[piece])
            if weight.dtype == torch.float32:
                grad_weight[rows].addmm_(grad_logits.t(), hidden[piece])
            else:
                grad_weight[rows] += grad_logits.t() @ hidden[piece]
        grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def log_softmax_of(hidden: Tensor, weight: Tensor, scale: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[n, V] fp32 log-probs of this rank's tokens."""
    logits = torch.mm(hidden, weight.t()).float().mul_(scale[:, None])
    if not vocabulary.is_split:
        return torch.log_softmax(logits, dim=-1)
    highest = logits.amax(dim=-1, keepdim=True)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=vocabulary.group)
    logits -= highest
    total = logits.exp().sum(dim=-1, keepdim=True)
    dist.all_reduce(total, group=vocabulary.group)
    return logits.sub_(total.log_())


def _pick(table: Tensor, targets: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[n] entries at `targets` (numbers into this rank's rows, or outside them where another rank has the token)."""
    if not vocabulary.is_split:
        return table.gather(1, targets[:, None]).squeeze(1)
    mine = (targets >= 0) & (targets < table.shape[1])
    picked = table.gather(1, targets.where(mine, 0)[:, None]).squeeze(1) * mine
    dist.all_reduce(picked, group=vocabulary.group)
    return picked


def _entropy(table: Tensor, vocabulary: Vocabulary) -> Tensor:
    entropy = -(table.exp() * table).sum(dim=-1)
    if vocabulary.is_split:
        dist.all_reduce(entropy, group=vocabulary.group)
    return entropy


def _add_at(table: Tensor, targets: Tensor, values: Tensor) -> None:
    """`table[i, targets[i]] += values[i]` for the targets that this rank holds. In place."""
    mine = (targets >= 0) & (targets < table.shape[1])
    table.scatter_add_(1, targets.where(mine, 0)[:, None], (values * mine)[:, None])
