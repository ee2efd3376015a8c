"""Self-attention over packed sequences: rotary positions and a causal core, without any [T, T] mask.

    hidden [T, 1, H] -> qkv -> norms -> rotate by position -> causal attention within each sequence -> projection

Sequences lie side by side in one axis of T tokens ("thd"), longest first. `PackedSequences` says where each begins; it
is computed once per micro-batch and shared by all layers. The core takes flash-attn's variable-length kernel on a GPU
that has it, and torch's SDPA otherwise: sequences of similar length are right-padded into one [rows, length] block,
where a causal query never sees the padding behind it, so no mask is needed.

With SDPA, sequences that begin alike may share that beginning: a prefix is packed once, and each branch holds only the
tokens that follow it, whose queries see the prefix's keys before their own.

    [ sequences, longest first | prefixes, longest first | branches, by length of prefix, then longest first ]

Context-parallel ranks hold two pieces of each sequence (see `context`), whose queries see the keys of all ranks, gathered.

Legend: `T` packed tokens, `S` sequences, `N` query heads, `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from .context import of_rank

#: A block takes sequences down to this share of its longest; the rest open the next block.
_MIN_FILL = 0.75
#: Below this length a second block costs more than the padding it saves.
_SMALL_LENGTH = 32
#: Dimensions that sinks add to a head: GPU kernels want multiples of 8.
_MORE_WIDTH = 8
#: Queries that are masked at a time, at least: fewer would be too little work for one kernel.
_LEAST_PIECE = 256


@dataclass(frozen=True)
class Prefixes:
    """What the rows of a block continue: neighbouring sequences of one length."""

    start: int
    stop: int
    """Tokens `start:stop` of the packed axis."""
    length: int
    """Tokens of each."""
    of_row: Tensor
    """[rows] which of them each row of the block continues, from 0."""
    mask: Tensor
    """[length of the block, `length` + length of the block] bool: what a query sees, the prefix and what is not after it."""


@dataclass(frozen=True)
class Block:
    """Neighbouring sequences that attention computes as one padded [rows, length] block."""

    start: int
    stop: int
    """Tokens `start:stop` of the packed axis."""
    rows: int
    length: int
    slots: Tensor | None
    """[stop - start] position of each token in the flattened block; None where no token is padding."""
    inputs: Tensor | None
    """[rows * (prefix + length)] the packed token at each place of the block with its prefixes in front, any at padding;
    None where the block is just its tokens."""
    prefixes: Prefixes | None = None

    @property
    def before(self) -> int:
        """Tokens in front of each row that are its prefix."""
        return 0 if self.prefixes is None else self.prefixes.length


@dataclass(frozen=True)
class SharedBlock:
    """Neighbouring sequences of one length, of each of which this rank has an early and a late piece."""

    start: int
    stop: int
    """Tokens `start:stop` of this rank's axis: for each sequence its two pieces."""
    rows: int
    length: int
    """Tokens of a piece."""
    keys: tuple[Tensor, Tensor]
    """For each piece [rows * keys that its last query sees], numbers into the tokens of all ranks, rank by rank."""


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of packed sequences, with what our own layers need besides. All on the model's device."""

    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """[T] position of each token in its sequence, prefix included."""
    blocks: tuple[Block, ...] = ()
    shared: tuple[SharedBlock, ...] = ()
    """In the place of blocks, where context-parallel ranks share the sequences."""
    _phases: tuple[Tensor, Tensor] | None = None
    _turns: Tensor | None = None

    @classmethod
    def of(
        cls,
        lengths: Sequence[int] | np.ndarray,
        device: torch.device,
        *,
        prefixes: Sequence[int] | np.ndarray = (),
        branches: Sequence[int] | np.ndarray = (),
        prefix_of: Sequence[int] | np.ndarray = (),
        padding: int = 0,
    ) -> PackedSequences:
        """`lengths` [S] of whole sequences, `prefixes`, and `branches` without their prefix: tokens, each at least 1.

        `prefix_of` [branches] numbers the prefix that each continues. Orders as in the module's drawing. `padding` tokens
        of no sequence follow at the end.
        """
        whole, roots, own, of = (np.asarray(v, dtype=np.int64) for v in (lengths, prefixes, branches, prefix_of))
        before = roots[of]
        for part, earlier in ((whole, None), (roots, None), (own, before)):
            # Longest first, or by the lengths of the prefixes and then longest first.
            falls = (
                np.diff(part) <= 0
                if earlier is None
                else (np.diff(earlier) < 0) | ((np.diff(earlier) == 0) & (np.diff(part) <= 0))
            )
            if (part < 1).any() or not falls.all():
                raise ValueError(
                    f"lengths, got {part.tolist()}: sequences are packed longest first, each of 1 token or more"
                )
        rest = np.array([padding] if padding else [], dtype=np.int64)
        every = np.concatenate([whole, roots, own, rest])
        ends = np.cumsum(every)
        starts = ends - every
        offsets = np.concatenate([np.zeros(len(whole) + len(roots), dtype=np.int64), before, np.zeros_like(rest)])
        positions = np.arange(ends[-1]) + np.repeat(offsets - starts, every)
        boundaries = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device)
        longest = int((every + offsets).max())
        first_root, first_branch = len(whole), len(whole) + len(roots)
        blocks = _blocks(whole, 0, device) + _blocks(roots, int(whole.sum()), device)
        for length in np.unique(before)[::-1]:
            mine, its = np.flatnonzero(before == length), np.flatnonzero(roots == length)
            start, stop = int(starts[first_root + its[0]]), int(ends[first_root + its[-1]])
            at = 0
            for block in _blocks(own[mine], int(starts[first_branch + mine[0]]), device):
                of_row = torch.from_numpy(of[mine[at : at + block.rows]] - its[0]).to(device)
                at += block.rows
                mask = torch.ones(block.length, int(length) + block.length, dtype=torch.bool, device=device)
                prefix = Prefixes(start, stop, int(length), of_row, mask.tril_(int(length)))
                shared = start + of_row[:, None] * int(length) + torch.arange(int(length), device=device)
                inputs = torch.cat([shared, _tokens(block, device)], dim=1).flatten()
                blocks.append(replace(block, prefixes=prefix, inputs=inputs))
        blocks += _blocks(rest, int(ends[-1]) - padding, device)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            positions=torch.from_numpy(positions).to(device),
            blocks=tuple(blocks),
        )

    @classmethod
    def split(cls, lengths: np.ndarray, device: torch.device, rank: int, size: int) -> PackedSequences:
        """This rank's part of sequences that `size` ranks share. `lengths` [S] of whole ones, multiples of 2 * size."""
        starts = np.cumsum(lengths) - lengths
        place = np.empty(int(lengths.sum()), dtype=np.int64)
        """Where each token is among those of all ranks, rank by rank."""
        place[np.concatenate([of_rank(lengths, other, size) for other in range(size)])] = np.arange(len(place))
        mine = of_rank(lengths, rank, size)
        blocks, first, at = [], 0, 0
        while first < len(lengths):
            length = int(lengths[first])
            last = first + int(np.argmin(np.append(lengths[first:] == length, False)))
            piece, rows = length // (2 * size), last - first
            tokens = starts[first:last, None] + np.arange(length)
            seen = ((rank + 1) * piece, length - rank * piece)
            early, late = (torch.from_numpy(place[tokens[:, :end]].flatten()).to(device) for end in seen)
            blocks.append(SharedBlock(at, at + 2 * piece * rows, rows, piece, (early, late)))
            first, at = last, at + 2 * piece * rows
        boundaries = torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32)).to(device)
        longest = int(lengths.max())
        return cls(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            positions=torch.from_numpy(mine - np.repeat(starts, lengths // size)).to(device),
            shared=tuple(blocks),
        )

    def phases(
        self, angles: Tensor, dtype: torch.dtype, scale: float = 1.0, *, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`scale` times cos and sin [T, 1, 1, rotated / 2] for each token, from megatron's `angles` [positions, 1, 1, rotated].

        Kept for the other layers, which ask for the same. interleaved: the angles have both of a pair side by side.
        """
        if self._phases is None:
            each = angles[..., ::2] if interleaved else angles[..., : angles.shape[-1] // 2]
            mine = each.index_select(0, self.positions)
            self._phases = (mine.cos() * scale).to(dtype), (mine.sin() * scale).to(dtype)
        return self._phases

    def turns(self, angles: Tensor) -> Tensor:
        """The same as complex numbers `cos + i sin`, [T, 1, rotated / 2]."""
        if self._turns is None:
            cos, sin = self.phases(angles, torch.float32)
            self._turns = torch.complex(cos, sin).squeeze(1)
        return self._turns


def _blocks(lengths: np.ndarray, start: int, device: torch.device) -> list[Block]:
    """Blocks of neighbouring sequences, longest first, the first of which begins at token `start`."""
    blocks = []
    first = 0
    while first < len(lengths):
        longest = int(lengths[first])
        floor = 1 if longest <= _SMALL_LENGTH else int(np.ceil(_MIN_FILL * longest))
        last = first + int(np.searchsorted(-lengths[first:], -floor, side="right"))
        mine = lengths[first:last]
        stop = start + int(mine.sum())
        slots = None
        if mine[-1] < longest:
            padding_before = np.arange(len(mine)) * longest - (np.cumsum(mine) - mine)
            slots = torch.from_numpy(np.arange(stop - start) + np.repeat(padding_before, mine)).to(device)
        block = Block(start, stop, len(mine), longest, slots, None)
        blocks.append(block if slots is None else replace(block, inputs=_tokens(block, device).flatten()))
        first, start = last, stop
    return blocks


def _tokens(block: Block, device: torch.device) -> Tensor:
    """[rows, length] the packed token at each place of a block; at padding, its first."""
    if block.slots is None:
        return torch.arange(block.start, block.stop, device=device).view(block.rows, block.length)
    tokens = torch.full((block.rows * block.length,), block.start, device=device)
    tokens[block.slots] = torch.arange(block.start, block.stop, device=device)
    return tokens.view(block.rows, block.length)


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention for training on packed sequences.

    The projections, norms and their sharding are megatron's. Its own forward rotates each sequence by itself, in a Python
    loop over all of them in every layer; here one gather per micro-batch does.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        sequence_len_offset: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [T, 1, H] -> ([T, 1, H], bias). The signature is megatron's; only packed input is served."""
        if not isinstance(packed_seq_params, PackedSequences):
            raise TypeError(f"packed_seq_params, got {type(packed_seq_params).__name__}: pass PackedSequences")
        gated = self.config.attention_output_gate
        query, key, value, *gate = self.get_query_key_value_tensors(hidden_states, output_gate=gated)
        if rotary_pos_emb is not None:
            pairs, scale = self.config.rotary_interleaved, self.config.rotary_scale
            cos, sin = packed_seq_params.phases(rotary_pos_emb, query.dtype, scale, interleaved=pairs)
            query, key = rotate(query, cos, sin, pairs), rotate(key, cos, sin, pairs)
        context = self.core_attention(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            attention_mask,
            attn_mask_type=self.attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )
        if gate:
            context = self._apply_output_gate(context, gate[0])
        output, bias = self.linear_proj(context.reshape(context.shape[0], 1, -1))
        return output, bias


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of `x` [T, 1, heads, D]: pairs (i, i + rotated/2) turn by the token's phases; interleaved: (2i, 2i + 1).

    arXiv 2104.09864; most models have the half-split layout. `cos`, `sin` [T, 1, 1, rotated / 2]; dimensions past `rotated`
    pass through.
    """
    return _Rotate.apply(x, cos, sin, interleaved)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the opposite rotation, so nothing of `x` is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, 1, interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1, ctx.interleaved), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    a, b = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    first, second = x[..., a], x[..., b]
    torch.mul(first, cos, out=out[..., a]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out[..., b]).addcmul_(first, sin, value=direction)
    if x.shape[-1] > 2 * half:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


class PackedCoreAttention(torch.nn.Module):
    """Causal softmax attention within each packed sequence. Grouped queries; no dropout.

    The only parameters are sinks, where the model has them: a logit for each head that takes part in the softmax and has no
    value.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        backend: str = "auto",
        **_: Any,
    ):
        """`backend`: auto, flash (flash-attn), local (torch picks a kernel) or unfused (matmul, softmax, matmul)."""
        super().__init__()
        self._context = None if pg_collection is None else pg_collection.cp
        self.softmax_scale = softmax_scale
        self.backend = backend
        self.window = None
        """Tokens that a token sees, the last of them itself; None: all before it."""
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = config.window_size[0] + 1
        self.softmax_offset = None
        """[N of this rank] sinks, under megatron's name."""
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            sinks = torch.empty(heads, dtype=config.params_dtype, device=torch.cuda.current_device())
            self.softmax_offset = torch.nn.Parameter(sinks)
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """query [T, N, D], key and value [T, K, D] -> [T, N * D]. Values may be narrower; so is then what they give."""
        assert packed_seq_params is not None, "PackedSelfAttention passes it"
        if (width := value.shape[-1]) < query.shape[-1]:
            wide = F.pad(value, (0, query.shape[-1] - width))
            out = self(query, key, wide, attention_mask, packed_seq_params=packed_seq_params)
            narrow: Tensor = out.unflatten(1, (query.shape[1], -1))[..., :width].flatten(1)
            return narrow
        can_flash = self.softmax_offset is None and not packed_seq_params.shared
        if can_flash and uses_flash_attn(query.device, self.backend):
            return self._flash(query, key, value, packed_seq_params).flatten(1)
        return self.attend(torch.cat([query, key, value], dim=1), query.shape[1], packed_seq_params)

    def attend(self, qkv: Tensor, num_heads: int, sequences: PackedSequences) -> Tensor:
        """qkv [T, N + 2 K, D], queries then keys then values, `num_heads` N -> [T, N * D]. With torch's kernels."""
        if sequences.shared:
            return self._attend_shared(qkv, num_heads, sequences)
        parts = _Divide.apply(qkv, num_heads, sequences.blocks)
        outputs = []
        with sdpa_kernel(SDPBackend.MATH) if self.backend == "unfused" else nullcontext():
            for i, block in enumerate(sequences.blocks):
                query, key, value = (part.transpose(1, 2) for part in parts[3 * i : 3 * i + 3])
                if self.softmax_offset is not None:
                    out = self._with_mask(query, key, value, self.window or key.shape[2])
                elif self.window is not None and key.shape[2] > self.window:
                    out = self._with_mask(query, key, value, self.window)
                else:
                    out = self._sdpa(query, key, value, None if block.prefixes is None else block.prefixes.mask)
                outputs.append(out.transpose(1, 2))
        return _Join.apply(sequences.blocks, *outputs)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query [rows, N, length, D], key and value [rows, K, keys, D] -> as query. Without a mask it is causal."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _attend_shared(self, qkv: Tensor, num_heads: int, sequences: PackedSequences) -> Tensor:
        """As `attend`, of this rank's pieces of each sequence, with the keys and values of all ranks."""
        num_groups = (qkv.shape[1] - num_heads) // 2
        gathered = gather_from_sequence_parallel_region(qkv[:, num_heads:].contiguous(), group=self._context)
        outputs = []
        with sdpa_kernel(SDPBackend.MATH) if self.backend == "unfused" else nullcontext():
            for block in sequences.shared:
                own = qkv[block.start : block.stop, :num_heads].unflatten(0, (block.rows, 2, block.length))
                pieces = []
                for number, seen in enumerate(block.keys):
                    both = gathered.index_select(0, seen).unflatten(0, (block.rows, -1)).transpose(1, 2)
                    parts = own[:, number].transpose(1, 2), both[:, :num_groups], both[:, num_groups:]
                    if self.softmax_offset is not None or self.window is not None:
                        out = self._with_mask(*parts, self.window or both.shape[2])
                    else:
                        out = self._sdpa(*parts, causal_lower_right(block.length, both.shape[2]))
                    pieces.append(out.transpose(1, 2))
                outputs.append(torch.stack(pieces, dim=1).reshape(block.stop - block.start, -1))
        return torch.cat(outputs)

    def _with_mask(self, query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
        """The same with the sinks, each query on the last `window` keys up to its own; queries are at the keys' last positions.

        A piece of queries at a time, with the keys that it sees: time and memory grow with the window, not with the length.
        """
        length, before = query.shape[2], key.shape[2] - query.shape[2]
        pieces = []
        for start in range(0, length, piece := max(window, _LEAST_PIECE)):
            stop = min(start + piece, length)
            first, last = max(before + start - window + 1, 0), before + stop
            # Of query i of the piece and key j of its keys, j - i is `offset` where they are the same token.
            offset = before + start - first
            seen = torch.ones(stop - start, last - first, dtype=torch.bool, device=query.device)
            seen = seen.tril_(offset).triu_(offset - window + 1)
            parts = query[:, :, start:stop], key[:, :, first:last], value[:, :, first:last]
            attend = self._sdpa if self.softmax_offset is None else self._sdpa_with_sinks
            pieces.append(attend(*parts, seen))
        return torch.cat(pieces, dim=2)

    def _sdpa_with_sinks(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """A first key without a value, and dimensions in which only it and the queries have something: their product there
        is the head's sink. So kernels that know no sinks compute with them."""
        assert self.softmax_offset is not None
        rows, _, length, width = query.shape
        scale = self.softmax_scale or width**-0.5
        sinks = (self.softmax_offset / scale).to(query.dtype).view(1, -1, 1, 1).expand(rows, -1, length, 1)
        query = torch.cat([query, sinks, query.new_zeros(*query.shape[:3], _MORE_WIDTH - 1)], dim=-1)
        key, value = (F.pad(part, (0, _MORE_WIDTH, 1, 0)) for part in (key, value))
        of_sink = torch.zeros(key.shape[2:], dtype=key.dtype, device=key.device)
        of_sink[0, width] = 1
        out = F.scaled_dot_product_attention(
            query, key + of_sink, value, F.pad(mask, (1, 0), value=True), scale=scale, enable_gqa=True
        )
        return out[..., :width]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """What a checkpoint holds of it: the sinks, cut by heads."""
        own = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(own, prefix, dict.fromkeys(own, 0), sharded_offsets)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        out: Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            sequences.cu_seqlens_q,
            sequences.cu_seqlens_kv,
            sequences.max_seqlen_q,
            sequences.max_seqlen_kv,
            softmax_scale=self.softmax_scale,
            causal=True,
            window_size=(-1, -1) if self.window is None else (self.window - 1, 0),
        )
        return out


def has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def uses_flash_attn(device: torch.device, backend: str) -> bool:
    """Whether the core takes flash-attn's kernel, which knows no shared prefixes."""
    return device.type == "cuda" and backend in ("auto", "flash") and has_flash_attn()


class _Divide(torch.autograd.Function):
    """[T, N + 2 K, D] -> for each block its queries [rows, length, N, D], then keys and values [rows, prefix + length, K, D]."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, blocks: tuple[Block, ...]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.num_heads, ctx.blocks = qkv.shape, num_heads, blocks
        flat = qkv.reshape(len(qkv), -1)
        heads = (num_heads, (qkv.shape[1] - num_heads) // 2, (qkv.shape[1] - num_heads) // 2)
        parts: list[Tensor] = []
        for block in blocks:
            own = flat[block.start : block.stop] if block.inputs is None else flat.index_select(0, block.inputs)
            query, key, value = own.view(block.rows, -1, *qkv.shape[1:]).split(heads, dim=2)
            parts += (query[:, block.before :], key, value)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        out = grads[0].new_empty(ctx.shape)
        flat = out.view(len(out), -1)
        for i, block in enumerate(ctx.blocks):
            query, key, value = grads[3 * i : 3 * i + 3]
            before = block.before
            own = torch.cat([query, key[:, before:], value[:, before:]], dim=2).view(block.rows * block.length, -1)
            mine = flat[block.start : block.stop]
            if block.slots is None:
                mine.copy_(own)
            else:
                torch.index_select(own, 0, block.slots, out=mine)
            if block.prefixes is not None:
                # A prefix stands before its branches, so what its own block gave is there already. Whole prefixes are
                # added: long runs and not single tokens.
                shared = out[block.prefixes.start : block.prefixes.stop, ctx.num_heads :]
                added = torch.cat([key[:, :before], value[:, :before]], dim=2).reshape(block.rows, -1)
                total = added.new_zeros(len(shared) // before, added.shape[1]).index_add_(
                    0, block.prefixes.of_row, added
                )
                shared += total.view(shared.shape)
        return out, None, None


class _Join(torch.autograd.Function):
    """What the blocks [rows, length, N, D] hold, without padding, side by side: [T, N * D]."""

    @staticmethod
    def forward(ctx: Any, blocks: tuple[Block, ...], *outputs: Tensor) -> Tensor:
        ctx.blocks, ctx.heads = blocks, outputs[0].shape[2:]
        joined = outputs[0].new_empty(blocks[-1].stop, ctx.heads.numel())
        for block, output in zip(blocks, outputs, strict=True):
            rows, mine = output.reshape(block.rows * block.length, -1), joined[block.start : block.stop]
            if block.slots is None:
                mine.copy_(rows)
            else:
                torch.index_select(rows, 0, block.slots, out=mine)
        return joined

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts: list[Tensor | None] = [None]
        for block in ctx.blocks:
            part = grads[0][block.start : block.stop]
            if block.slots is not None:
                part = part.new_zeros(block.rows * block.length, part.shape[1]).index_copy_(0, block.slots, part)
            parts.append(part.reshape(block.rows, block.length, *ctx.heads))
        return tuple(parts)
