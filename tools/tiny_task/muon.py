"""Muon for a handful of small matrices: momentum, orthogonalised by a Newton-Schulz iteration in fp32.

`torch.optim.Muon` iterates in bf16, which a CPU without bf16 units emulates slowly, and one matrix at a time. Here
matrices of one shape are orthogonalised together.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of the source: steepest at 0, singular values end in 0.7..1.2


def orthogonalize(matrices: torch.Tensor, *, steps: int = 5) -> torch.Tensor:
    """`[N, rows, cols]` -> the same shape, each matrix near the closest one with orthonormal rows (rows <= cols)."""
    if matrices.ndim != 3 or matrices.shape[1] > matrices.shape[2]:
        raise ValueError(f"matrices, got shape {tuple(matrices.shape)}: need [N, rows, cols], rows <= cols; transpose")
    a, b, c = _COEFFICIENTS
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled by sqrt(max(1, rows / cols)). Parameters must be matrices."""

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[torch.nn.Parameter]] = defaultdict(list)
            for param in group["params"]:
                by_shape[min(param.shape), max(param.shape)].append(param)
            for params in by_shape.values():
                self._step_same_shape(params, group["lr"], group["momentum"])

    def _step_same_shape(self, params: list[torch.nn.Parameter], lr: float, momentum: float) -> None:
        directions = []
        for param in params:
            assert param.grad is not None
            average = self.state[param].setdefault("average", torch.zeros_like(param))
            average.lerp_(param.grad, 1 - momentum)
            direction = torch.lerp(param.grad, average, momentum)
            directions.append(direction.mT if param.shape[0] > param.shape[1] else direction)
        for param, update in zip(params, orthogonalize(torch.stack(directions)), strict=True):
            rows, cols = param.shape
            param.add_(update.mT if rows > cols else update, alpha=-lr * max(1.0, rows / cols) ** 0.5)
