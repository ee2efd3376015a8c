"""Moving rows of a tensor to and from distinct places, with gradients that are the opposite move.

torch's own index_select must assume repeated indices, so its gradient accumulates, row by row on a CPU; here it copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scatter_rows(x: Tensor, slots: Tensor, size: int) -> Tensor:
    """[n, ...] -> [size, ...] with `out[slots[i]] = x[i]` and zeros elsewhere. `slots` [n] int64, distinct."""
    return _Scatter.apply(x, slots, size)


def gather_rows(x: Tensor, slots: Tensor) -> Tensor:
    """[m, ...] -> [n, ...], `out[i] = x[slots[i]]`. `slots` [n] int64, distinct."""
    return _Gather.apply(x, slots)


def _scatter(x: Tensor, slots: Tensor, size: int) -> Tensor:
    return x.new_zeros(size, *x.shape[1:]).index_copy_(0, slots, x)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(slots)
        return _scatter(x, slots, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.size = x.shape[0]
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _scatter(grads[0], ctx.saved_tensors[0], ctx.size), None
