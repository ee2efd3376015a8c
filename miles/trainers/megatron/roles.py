"""Several sets of weights in one model: the actor's, and while these sleep the reference's, or those of an earlier actor.

All of them sleep in host memory. On a CPU the two exchange places without a copy; on a GPU they cross the bus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .hf_names import trained_tensors


class SleepingWeights:
    """Other weights of the actor's model, which has them inside `awake()`. Made while the model holds them."""

    def __init__(self, model: Iterable[torch.nn.Module]):
        self._params = [tensor for part in model for _, tensor in trained_tensors(part)]
        self._others = [_host_copy(p) for p in self._params]
        # The actor's place to sleep; on a CPU its own memory is that place.
        self._actor = [_host_copy(p) for p in self._params if p.is_cuda]
        self.is_first = True
        """Not `take`n yet: they are what the run was started with."""

    @torch.no_grad()
    def take(self) -> None:
        """The weights that the model has now sleep from now on."""
        for param, other in zip(self._params, self._others, strict=True):
            other.copy_(param)
        self.is_first = False

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The model computes with these weights; the actor's are back, bit for bit, afterwards, also on an error."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    @torch.no_grad()
    def _enter(self) -> None:
        if not self._actor:
            self._exchange()
            return
        for param, actor, other in zip(self._params, self._actor, self._others, strict=True):
            actor.copy_(param, non_blocking=True)
            param.copy_(other, non_blocking=True)

    @torch.no_grad()
    def _leave(self) -> None:
        if not self._actor:
            self._exchange()
            return
        for param, actor in zip(self._params, self._actor, strict=True):
            param.copy_(actor, non_blocking=True)

    def _exchange(self) -> None:
        for i, param in enumerate(self._params):
            param.data, self._others[i] = self._others[i], param.data


def _host_copy(param: Tensor) -> Tensor:
    host = torch.empty(param.shape, dtype=param.dtype, pin_memory=param.is_cuda)
    return host.copy_(param.detach())
