"""The gated delta rule in chunks against its recurrence, token by token; the convolution against torch's; what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.errors import ConfigError
from miles_plugins.models.qwen3_5 import GatedDeltaNet, causal_convolution, delta_rule


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _token_by_token(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor, write: torch.Tensor
) -> torch.Tensor:
    query, key = _unit(query) / query.shape[-1] ** 0.5, _unit(key)
    state = torch.zeros(*key.shape[::2], key.shape[-1], value.shape[-1], dtype=key.dtype)
    out = []
    for t in range(key.shape[1]):
        state = state * log_decay[:, t, :, None, None].exp()
        read = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], write[:, t, :, None] * (value[:, t] - read))
        out.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return torch.stack(out, dim=1)


@settings(max_examples=12, deadline=None)
@given(length=st.integers(1, 150))
def test_chunks_are_the_recurrence(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, length, 3, 4), (2, length, 3, 4), (2, length, 3, 5), (2, length, 3), (2, length, 3))
    parts = [torch.randn(shape, generator=generator) for shape in shapes]
    parts[3], parts[4] = -F.softplus(parts[3]), parts[4].sigmoid()
    parts = [part.requires_grad_() for part in parts]
    exact = [part.detach().double().requires_grad_() for part in parts]
    ours, theirs = delta_rule(*parts), _token_by_token(*exact)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)
    up = torch.randn(ours.shape, generator=generator)
    gradients = torch.autograd.grad(ours, parts, up)
    for mine, other in zip(gradients, torch.autograd.grad(theirs, exact, up.double()), strict=True):
        torch.testing.assert_close(mine.double(), other, atol=1e-4, rtol=1e-3)


def test_the_convolution_begins_anew_at_each_sequence() -> None:
    lengths = [7, 3, 1]
    x, weight = torch.randn(sum(lengths), 6), torch.randn(6, 4)
    ours = causal_convolution(x, weight, torch.cat([torch.arange(n) for n in lengths]))
    alone = [F.conv1d(F.pad(row.t(), (3, 0)), weight[:, None], groups=6).t() for row in x.split(lengths)]
    torch.testing.assert_close(ours, torch.cat(alone), atol=1e-6, rtol=1e-5)


def test_context_parallelism_is_refused() -> None:
    config: Any = SimpleNamespace(context_parallel_size=2)
    with pytest.raises(ConfigError, match="--context-parallel-size, got 2: the state of a gated delta net"):
        GatedDeltaNet.__init__(torch.nn.Module.__new__(GatedDeltaNet), config, 1, pg_collection=None)
