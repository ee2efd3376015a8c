"""Packed attention and rotary positions against the dense textbook computation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.trainers.megatron import attention, cpu
from miles.trainers.megatron.attention import PackedCoreAttention, PackedSequences, rotate

_CPU = torch.device("cpu")
_WINDOWS = st.none() | st.integers(1, 40)
_LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=12).map(lambda lengths: sorted(lengths, reverse=True))


def _attention(
    backend: str = "auto", window: int | None = None, sinks: torch.Tensor | None = None
) -> PackedCoreAttention:
    config: Any = SimpleNamespace(
        context_parallel_size=1,
        tensor_model_parallel_size=1,
        num_attention_heads=4,
        params_dtype=torch.float32,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None,
        softmax_type="vanilla" if sinks is None else "learnable",
    )
    causal: Any = None
    with cpu.cuda_means_cpu():
        core = PackedCoreAttention(config, 1, causal, "self", backend=backend)
    if sinks is not None:
        assert core.softmax_offset is not None
        core.softmax_offset.data.copy_(sinks.data)
    return core


def _dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Explicit softmax over a [T, T] mask; K/V heads repeated."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(n) for n in lengths])
    allowed = (sequence[:, None] == sequence) & (position[:, None] >= position)
    if window is not None:
        allowed &= position[:, None] - position < window
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("qnd,knd->nqk", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], dim=-1)
    weights = scores.softmax(-1)[..., : len(q)]
    return torch.einsum("nqk,knd->qnd", weights, v).flatten(1)


@settings(max_examples=30, deadline=None)
@given(
    lengths=_LENGTHS,
    groups=st.sampled_from([1, 2, 4]),
    backend=st.sampled_from(["auto", "unfused"]),
    window=_WINDOWS,
    has_sinks=st.booleans(),
)
def test_attention_stays_within_each_sequence(
    lengths: list[int], groups: int, backend: str, window: int | None, has_sinks: bool
) -> None:
    tokens = sum(lengths)
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(tokens, heads, 8, generator=generator, requires_grad=True) for heads in (4, groups, groups))
    up = torch.randn(tokens, 32, generator=generator)
    sequences = PackedSequences.of(lengths, _CPU)
    sinks = torch.randn(4, generator=generator, requires_grad=True) if has_sinks else None
    core = _attention(backend, window, sinks)
    with mock.patch.object(attention, "_LEAST_PIECE", 16):
        ours = core(q, k, v, None, packed_seq_params=sequences)
    gradients = torch.autograd.grad(ours, (q, k, v, *core.parameters()), up)
    dense = _dense(q, k, v, lengths, window, sinks)
    inputs = (q, k, v) if sinks is None else (q, k, v, sinks)
    torch.testing.assert_close(ours, dense, atol=2e-6, rtol=1e-5)
    for mine, theirs in zip(gradients, torch.autograd.grad(dense, inputs, up), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    prefixes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    branches=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 70)), min_size=1, max_size=9),
    whole=_LENGTHS,
    backend=st.sampled_from(["auto", "unfused"]),
    window=_WINDOWS,
)
def test_a_shared_prefix_is_the_same_as_one_prefix_for_each_row(
    prefixes: list[int], branches: list[tuple[int, int]], whole: list[int], backend: str, window: int | None
) -> None:
    prefixes = sorted(prefixes, reverse=True)
    tree = sorted(
        ((number % len(prefixes), length) for number, length in branches), key=lambda b: (-prefixes[b[0]], -b[1])
    )
    of, own = [number for number, _ in tree], [length for _, length in tree]
    sequences = PackedSequences.of(whole, _CPU, prefixes=prefixes, branches=own, prefix_of=of)
    tokens = sum(whole) + sum(prefixes) + sum(own)
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(tokens, heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    up = torch.randn(tokens, 32, generator=generator)

    ours = _attention(backend, window)(q, k, v, None, packed_seq_params=sequences)
    gradients = torch.autograd.grad(ours, (q, k, v), up)

    # The same with each branch spelled out behind a copy of its prefix, of which no output is looked at.
    roots = torch.arange(sum(whole), sum(whole) + sum(prefixes)).split(prefixes)
    ends = torch.arange(sum(whole) + sum(prefixes), tokens).split(own)
    first = sum(whole) + sum(prefixes)
    rows = [torch.cat([roots[number], end]) for number, end in zip(of, ends, strict=True)]
    unrolled = torch.cat([torch.arange(first), *rows])
    lengths = [*whole, *prefixes, *map(len, rows)]
    dense = _dense(q[unrolled], k[unrolled], v[unrolled], lengths, window)
    is_own = torch.cat([torch.ones(first, dtype=torch.bool), *(r >= first for r in rows)])
    torch.testing.assert_close(ours, dense[is_own], atol=2e-6, rtol=1e-5)
    for mine, theirs in zip(gradients, torch.autograd.grad(dense[is_own], (q, k, v), up), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    position = torch.cat([torch.arange(n) for n in lengths])
    assert sequences.positions.tolist() == position[is_own].tolist()


@settings(max_examples=50, deadline=None)
@given(lengths=_LENGTHS)
def test_blocks_cover_every_token_and_bound_the_padding(lengths: list[int]) -> None:
    sequences = PackedSequences.of(lengths, _CPU)
    assert [b.start for b in sequences.blocks] == [0, *(b.stop for b in sequences.blocks[:-1])]
    assert sequences.blocks[-1].stop == sum(lengths) == len(sequences.positions)
    assert sum(b.rows for b in sequences.blocks) == len(lengths)
    at = 0
    for block in sequences.blocks:
        mine, at = lengths[at : at + block.rows], at + block.rows
        assert max(mine) == block.length
        assert block.length <= 32 or min(mine) >= 0.75 * block.length
        assert (block.slots is None) == (len(set(mine)) == 1)
    assert sequences.positions.tolist() == [p for n in lengths for p in range(n)]
    assert sequences.cu_seqlens_q.diff().tolist() == lengths


@pytest.mark.parametrize("lengths", [[3, 5], [3, 0]])
def test_lengths_must_fall_and_be_positive(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths, got"):
        PackedSequences.of(lengths, _CPU)
    with pytest.raises(ValueError, match="lengths, got"):
        PackedSequences.of([4], _CPU, prefixes=[2], branches=lengths, prefix_of=[0, 0])


def test_rotation_turns_pairs_and_passes_the_rest_through() -> None:
    angle = torch.tensor([0.3, 1.1])
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0], dtype=torch.float64).reshape(1, 1, 1, 5).requires_grad_()
    cos, sin = angle.double().cos().reshape(1, 1, 1, 2), angle.double().sin().reshape(1, 1, 1, 2)
    turned = torch.view_as_complex(torch.tensor([[1.0, 3.0], [2.0, 4.0]], dtype=torch.float64)) * torch.exp(
        1j * angle.double()
    )
    expected = torch.cat([turned.real, turned.imag, torch.tensor([9.0], dtype=torch.float64)])
    torch.testing.assert_close(rotate(x, cos, sin).flatten(), expected)
    assert torch.autograd.gradcheck(lambda t: rotate(t, cos, sin), (x,))
