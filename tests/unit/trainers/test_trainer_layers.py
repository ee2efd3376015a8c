"""Layers with a backward pass of their own against what torch's autograd makes of the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from miles.trainers.megatron import layers
from miles.trainers.megatron.layers import RMSNorm, _Queries, _Rest


@pytest.mark.parametrize("shape", [(7, 1, 16), (5, 1, 3, 8), (0, 1, 8)])
def test_norm_equals_its_formula(shape: tuple[int, ...]) -> None:
    width = shape[-1]
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm.__new__(RMSNorm)
    torch.nn.RMSNorm.__init__(norm, width, eps=1e-3)
    norm.weight.data.uniform_(0.5, 1.5, generator=generator)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    up = torch.randn(shape, generator=generator)
    ours = torch.autograd.grad(norm(x), (x, norm.weight), up)
    exact = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = _normed(*exact, 1e-3)
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-6, rtol=1e-6)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, exact, up.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [0, 1, 5, 16, 17])
def test_what_follows_attention_equals_its_formula_in_any_number_of_pieces(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_PIECE_TOKENS", 4)
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, 6), (tokens, 8), (6, 8), (6,), (20, 6), (6, 10))
    parts = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    up = torch.randn(tokens, 6, generator=generator)
    out = _Rest.apply(*parts, 1e-3)
    x, context, w_proj, norm, w_in, w_out = exact = [part.detach().double().requires_grad_() for part in parts]
    hidden = x + context @ w_proj.t()
    gate, value = (_normed(hidden, norm, 1e-3) @ w_in.t()).chunk(2, -1)
    expected = hidden + (F.silu(gate) * value) @ w_out.t()
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad(out, parts, up)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, exact, up.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_head_norms", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 5, 16])
def test_queries_keys_and_values_equal_their_formula_but_for_the_order_in_a_head(
    tokens: int, has_head_norms: bool, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_PIECE_TOKENS", 4)
    heads, groups, width = 4, 2, 6
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    rows = (heads + 2 * groups) * width
    x, norm, weight, bias = random(tokens, 5), random(5), random(rows, 5), random(rows) if has_bias else None
    q_norm, k_norm = (random(width), random(width)) if has_head_norms else (None, None)
    angles = torch.rand(tokens, 1, width // 2, generator=generator) * 7
    turns = torch.polar(torch.ones_like(angles), angles)
    order = layers._row_order(heads, groups, width)
    out = _Queries.apply(x, norm, weight, bias, q_norm, k_norm, turns, order, (heads, groups), 1e-3)

    leaves = [part for part in (x, norm, weight, bias, q_norm, k_norm) if part is not None]
    exact = {id(part): part.detach().double().requires_grad_() for part in leaves}
    x_, norm_, weight_ = (exact[id(part)] for part in (x, norm, weight))
    flat = _normed(x_, norm_, 1e-3) @ weight_.t() + (0 if bias is None else exact[id(bias)])
    # Megatron's weight: for each group its queries, then its key, then its value.
    grouped = flat.view(tokens, groups, heads // groups + 2, width)
    query, key, value = grouped.split((heads // groups, 1, 1), dim=2)
    if q_norm is not None and k_norm is not None:
        query, key = _normed(query, exact[id(q_norm)], 1e-3), _normed(key, exact[id(k_norm)], 1e-3)
    cos, sin = (f(angles.double())[:, :, None] for f in (torch.cos, torch.sin))
    query, key = (
        torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (t.chunk(2, -1) for t in (query, key))
    )
    expected = torch.cat([t.flatten(1, 2) for t in (query, key, value)], dim=1)

    def in_halves(t: torch.Tensor) -> torch.Tensor:
        turned, rest = t.split((heads + groups, groups), dim=1)
        return torch.cat([turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), rest], dim=1)

    torch.testing.assert_close(in_halves(out).double(), expected, atol=1e-5, rtol=1e-5)
    up = torch.randn(expected.shape, generator=generator)
    ours = torch.autograd.grad(in_halves(out), leaves, up)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, list(exact.values()), up.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-4, rtol=1e-5)


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
