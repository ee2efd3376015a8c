"""Two sets of weights in one model: the actor's, and while it sleeps the reference's.

Both sleep in host memory. On a CPU the two exchange places without a copy; on a GPU they cross the bus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .hf_names import trained_tensors


class ReferenceWeights:
    """The frozen reference, awake inside `awake()`. Made while the model holds the reference's weights."""

    def __init__(self, model: Iterable[torch.nn.Module]):
        self._params = [tensor for part in model for _, tensor in trained_tensors(part)]
        self._reference = [_host_copy(p) for p in self._params]
        # The actor's place to sleep; on a CPU its own memory is that place.
        self._actor = [_host_copy(p) for p in self._params if p.is_cuda]
        self.is_first = True
        """Not `take`n yet: the reference is what the run was started with."""

    @torch.no_grad()
    def take(self) -> None:
        """The weights that the model has now become the reference."""
        for param, reference in zip(self._params, self._reference, strict=True):
            reference.copy_(param)
        self.is_first = False

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The model computes as the reference; the actor's weights are back, bit for bit, afterwards, also on an error."""
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
        for param, actor, reference in zip(self._params, self._actor, self._reference, strict=True):
            actor.copy_(param, non_blocking=True)
            param.copy_(reference, non_blocking=True)

    @torch.no_grad()
    def _leave(self) -> None:
        if not self._actor:
            self._exchange()
            return
        for param, actor in zip(self._params, self._actor, strict=True):
            param.copy_(actor, non_blocking=True)

    def _exchange(self) -> None:
        for i, param in enumerate(self._params):
            param.data, self._reference[i] = self._reference[i], param.data


def _host_copy(param: Tensor) -> Tensor:
    host = torch.empty(param.shape, dtype=param.dtype, pin_memory=param.is_cuda)
    return host.copy_(param.detach())
