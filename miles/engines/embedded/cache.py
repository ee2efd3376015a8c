"""Keys and values of the running rows: one slab per layer, row `r` of the batch at row `r` of the slab.

    slab[layer]  [2 (key, value), rows, kv_heads, extent, head_dim]

Rows in use are always the first ones, so a decode step reads views and gathers nothing; a finished row's place is taken
by the last row (`copy_rows`). A slab is little longer than its longest row: what a step reads then lies together, which
halves its time against strides of powers of two. Its memory stays when it changes shape. Or the slabs are `fixed` at their
final size: then strides, extents and batch shapes never change, which deterministic inference needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .model_config import ModelConfig

#: Extents are multiples of this, so that a growing row does not change the shape at every token.
EXTENT_STEP = 8
#: Shortest extent of a fixed cache; the longer ones are its doubles.
FIRST_FIXED_EXTENT = 16


@dataclass(frozen=True)
class ExtentGroup:
    """Rows that attend over the same number of cache positions."""

    extent: int
    bias: torch.Tensor | None
    """[B, 1, 1, extent] 0 where a row may look, -inf elsewhere; None where all rows may look everywhere."""
    rows: torch.Tensor | None
    """[B, 1] bool: rows of this group; None where it is all of them."""


@dataclass(frozen=True)
class DecodePlan:
    """Where one decode step writes and looks; the same for every layer. `B` rows."""

    positions: torch.Tensor
    """[B] the position of the token that is fed in"""
    targets: torch.Tensor
    """[B, 2 * kv_heads] flat (key|value, row, head, position) numbers of the slab"""
    groups: tuple[ExtentGroup, ...]


class KVCache:
    """Used from the decode thread only. Contents of a row beyond its length are finite and never looked at."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        max_tokens: int,
        fixed: tuple[int, int] | None = None,
    ) -> None:
        """`max_tokens` bounds rows x extent. `fixed` (rows, extent) allocates that once and for all."""
        self._config, self._device, self._dtype = config, device, dtype
        self._max_tokens, self._fixed = max_tokens, fixed is not None
        self._rows, self._extent = fixed or (1, EXTENT_STEP)
        # Arrays of numpy share the tensors' memory. At decode sizes products of matrices beat the CPU's fused attention.
        self._on_numpy = device.type == "cpu" and dtype == torch.float32
        self._scale = torch.tensor(config.head_dim**-0.5, device=device, dtype=dtype)
        self._visible = torch.zeros((), device=device, dtype=dtype)
        self._hidden = torch.full((), float("-inf"), device=device, dtype=dtype)
        self._allocate()

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes that one token takes over all layers and the spare slab."""
        return (config.num_layers + 1) * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in (*self._buffers, self._spare))

    def reserve(self, rows: int, extent: int, *, kept_rows: int) -> None:
        """Makes room for `rows` rows of `extent` tokens; the first `kept_rows` keep what they hold.

        Extents grow by a quarter, rows by doubling; exactly to what is asked where that would exceed `max_tokens`. With
        nothing to keep the slabs take just the shape that is asked for. Memory: one spare slab beside those of the layers.
        """
        if self._fixed:
            if rows > self._rows or extent > self._extent:
                raise RuntimeError(f"fixed KV cache of {self._rows} x {self._extent} asked for {rows} x {extent}")
            return
        wanted = round_extent(extent)
        if not kept_rows:
            if (rows, wanted) != (self._rows, self._extent):
                self._reshape(rows, wanted, 0)
            return
        if rows <= self._rows and wanted <= self._extent:
            return
        new_rows = self._rows if rows <= self._rows else max(rows, 2 * self._rows)
        new_extent = self._extent if wanted <= self._extent else max(wanted, round_extent(self._extent * 5 // 4))
        if new_rows * new_extent > self._max_tokens:
            new_rows, new_extent = rows, wanted
        self._reshape(new_rows, new_extent, kept_rows)

    def clear(self) -> None:
        """Forgets all contents, and gives the memory of a growing cache back."""
        if not self._fixed:
            self._rows, self._extent = 1, EXTENT_STEP
        self._allocate()

    def store(
        self, layer: int, first_row: int, sources: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Writes prompts `[N, kv_heads, T, head_dim]` to rows `first_row...`, row j taking prompt `sources[j]`."""
        slab, end, length = self._slabs[layer], first_row + len(sources), keys.shape[2]
        slab[0, first_row:end, :, :length] = keys[sources]
        slab[1, first_row:end, :, :length] = values[sources]

    def copy_rows(self, sources: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray, length: int) -> None:
        """Copies the first `length` positions of whole rows; sources and targets do not overlap."""
        src = torch.as_tensor(np.asarray(sources), device=self._device)
        dst = torch.as_tensor(np.asarray(targets), device=self._device)
        for slab in self._slabs:
            slab[:, dst, :, :length] = slab[:, src, :, :length]

    def plan(self, lengths: np.ndarray) -> DecodePlan:
        """For a step that appends one token to each of the first `B` rows. `lengths` [B]: tokens a row holds before it."""
        num_rows = len(lengths)
        positions = torch.as_tensor(lengths, device=self._device)
        column = positions[:, None]
        targets = self._origins[:num_rows] + column
        if self._fixed:
            distinct, row_length = np.unique(lengths, return_inverse=True)
            own = np.array([self._own_extent(int(length) + 1) for length in distinct])
            extent_of_row = own[row_length]
            occupied = [int(extent) for extent in np.unique(own)]
        else:
            occupied = [int(lengths.max()) + 1]
        groups = []
        for extent in occupied:
            bias = members = None
            if int(lengths.min()) + 1 < extent:
                bias = torch.where(self._range[:extent] <= column, self._visible, self._hidden)[:, None, None]
            if len(occupied) > 1:
                members = torch.as_tensor(extent_of_row == extent, device=self._device)[:, None]
            groups.append(ExtentGroup(extent, bias, members))
        return DecodePlan(positions, targets, tuple(groups))

    def append(self, layer: int, plan: DecodePlan, keys_values: torch.Tensor) -> None:
        """Writes one token per row: `[B, 2 * kv_heads, head_dim]`, keys before values."""
        head_dim = self._config.head_dim
        places = self._slabs[layer].view(-1, head_dim)
        if self._on_numpy:  # half the time of index_copy_: nothing is in the core's caches here
            places.numpy()[plan.targets.numpy()] = keys_values.numpy()
        else:
            places.index_copy_(0, plan.targets.view(-1), keys_values.reshape(-1, head_dim))

    def attend(self, layer: int, plan: DecodePlan, queries: torch.Tensor) -> torch.Tensor:
        """Attention of one query token per row: `[B, heads, head_dim]` -> `[B, heads * head_dim]`.

        In a fixed cache each extent is computed for the whole batch and rows pick their own: a row's arithmetic then has
        shapes that depend on its own length alone.
        """
        out: torch.Tensor | None = None
        for group in plan.groups:
            part = self._attend_extent(layer, group, queries)
            out = part if out is None or group.rows is None else torch.where(group.rows, part, out)
        assert out is not None
        return out

    def _attend_extent(self, layer: int, group: ExtentGroup, queries: torch.Tensor) -> torch.Tensor:
        num_rows, num_heads, head_dim = queries.shape
        kv_heads = self._config.num_kv_heads
        keys, values = self._slabs[layer][:, :num_rows, :, : group.extent]
        # The query heads of one kv head are the rows of one product: grouped-query attention without repeating K, V.
        shape = (num_rows, kv_heads, num_heads // kv_heads, head_dim)
        if self._on_numpy:
            q = (queries * self._scale).view(shape)
            scores = _product(q, keys.transpose(2, 3))
            if group.bias is not None:
                scores += group.bias
            out = _product(scores.softmax(-1), values)
        else:
            out = F.scaled_dot_product_attention(queries.view(shape), keys, values, attn_mask=group.bias)
        return out.reshape(num_rows, num_heads * head_dim)

    def _own_extent(self, length: int) -> int:
        extent = FIRST_FIXED_EXTENT
        while extent < length:
            extent *= 2
        return min(extent, self._extent)

    def _allocate(self) -> None:
        self._spare = self._new_buffer(0)
        self._buffers = [self._new_buffer(self._num_elements()) for _ in range(self._config.num_layers)]
        self._slabs = [self._as_slab(buffer) for buffer in self._buffers]
        self._measure()

    def _reshape(self, rows: int, extent: int, kept_rows: int) -> None:
        """New shape for all slabs, in the memory there is where that is enough."""
        kept_extent = min(self._extent, extent)
        self._rows, self._extent = rows, extent
        size = self._num_elements()
        for i, old in enumerate(self._slabs):
            if kept_rows:
                # The new shape overlaps the old one in its own memory, so layers pass a spare buffer on.
                target = self._spare if self._spare.numel() >= size else self._new_buffer(size)
                self._spare, self._buffers[i] = self._buffers[i], target
            elif self._buffers[i].numel() < size:
                self._buffers[i] = self._new_buffer(size)
            self._slabs[i] = self._as_slab(self._buffers[i])
            self._slabs[i][:, :kept_rows, :, :kept_extent] = old[:, :kept_rows, :, :kept_extent]
        self._measure()

    def _measure(self) -> None:
        """What every plan needs of the slab's shape."""
        heads = self._config.num_kv_heads
        numbers = torch.arange(2 * self._rows * heads, device=self._device).view(2, self._rows, heads)
        # [rows, 2 * kv_heads]: where position 0 of a row's keys and values is in the flat slab.
        self._origins = (numbers * self._extent).transpose(0, 1).contiguous().view(self._rows, 2 * heads)
        self._range = torch.arange(self._extent, device=self._device)

    def _num_elements(self) -> int:
        return 2 * self._rows * self._config.num_kv_heads * self._extent * self._config.head_dim

    def _new_buffer(self, size: int) -> torch.Tensor:
        # Zeros, not garbage: masked positions enter a product with probability 0, and 0 * NaN would be NaN.
        return torch.zeros(size, device=self._device, dtype=self._dtype)

    def _as_slab(self, buffer: torch.Tensor) -> torch.Tensor:
        c = self._config
        return buffer[: self._num_elements()].view(2, self._rows, c.num_kv_heads, self._extent, c.head_dim)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` of `[B, kv_heads, few, n]` and `[B, kv_heads, n, m]`, a small product for each row and head."""
    if torch.get_num_threads() > 1:  # MKL, in batches that threads share
        return torch.matmul(a, b)
    # numpy's OpenBLAS, one by one: twice as fast as MKL's batches of so small products.
    return torch.from_numpy(np.matmul(a.numpy(), b.numpy()))


def round_extent(tokens: int) -> int:
    """The next multiple of EXTENT_STEP."""
    return -(-tokens // EXTENT_STEP) * EXTENT_STEP
