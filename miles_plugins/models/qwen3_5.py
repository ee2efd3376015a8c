"""Qwen3-Next and Qwen3.5: most layers have a gated delta net in the place of attention, arXiv 2412.06464.

    hidden -> projections -> causal convolution -> query, key, value of each head -> delta rule -> gated norm -> projection

A head keeps a matrix S, from which each token's key first reads what is there and then writes what is missing:

    S_t = a_t S_{t-1} + k_t u_t^T      u_t = b_t (v_t - a_t S_{t-1}^T k_t)      o_t = S_t^T q_t

Sequences are packed; convolution and S begin anew at each. Megatron's own module needs kernels of a GPU and takes no packed
sequences. Context parallelism is refused: S goes through the whole sequence.

Legend: `T` packed tokens, `B` rows of a block, `L` tokens of a row, `C` tokens of a chunk, `K`, `H` key and value heads of
this rank, `D` their dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from miles.errors import ConfigError
from miles.trainers.megatron.attention import Block, PackedSequences
from miles.trainers.megatron.model import local_layer_spec, norm_class

#: Tokens of a chunk: products of this size squared, and one step of the state for each.
_CHUNK_TOKENS = 64


def get_qwen3_5_spec(args: Any, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """For --spec: the layers of this pipeline stage, by --linear-attention-freq and --moe-layer-freq."""
    linear, experts = config.linear_attention_freq, config.moe_layer_freq
    if isinstance(experts, int):
        experts = [int(config.num_moe_experts is not None)] * config.num_layers
    first = get_transformer_layer_offset(config, vp_stage)
    layers = []
    for i in range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage)):
        layer = local_layer_spec(config, backend=args.attention_backend, experts=bool(experts[i]))
        if linear[i]:
            layer.module = TransformerLayer
            layer.submodules.self_attention = ModuleSpec(module=GatedDeltaNet)
        layers.append(layer)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm_class(config))


class GatedDeltaNet(MegatronModule):
    """Heads are shared out over the tensor-parallel ranks: of each rank's rows the queries come first, then keys, values, gates,
    and the numbers that b and a are made of."""

    def __init__(self, config: TransformerConfig, layer_number: int, *, pg_collection: Any, **_: Any):
        """Raises ConfigError for what this layer does not compute."""
        super().__init__(config)
        if config.context_parallel_size > 1:
            raise ConfigError(
                f"--context-parallel-size, got {config.context_parallel_size}: the state of a gated delta net goes through the "
                "whole sequence; leave it at 1"
            )
        self._tp = pg_collection.tp
        size = self._tp.size()
        self._key_dim, self._value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self._value_heads = config.linear_num_value_heads // size
        self._keys = config.linear_num_key_heads // size * self._key_dim
        self._values = self._value_heads * self._value_dim
        linear = {"config": config, "bias": False, "tp_group": self._tp}
        self.in_proj = ColumnParallelLinear(
            config.hidden_size,
            2 * size * (self._keys + self._values + self._value_heads),
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            **linear,
        )
        self.out_proj = RowParallelLinear(
            size * self._values,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **linear,
        )

        def parameter(*shape: int, is_cut: bool = True) -> torch.nn.Parameter:
            made = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device()))
            if is_cut:
                set_tensor_model_parallel_attributes(made, True, 0, 1)
            return made

        self.conv_weight = parameter(2 * self._keys + self._values, 1, config.linear_conv_kernel_dim)
        self.A_log, self.dt_bias = parameter(self._value_heads), parameter(self._value_heads)
        self.norm_weight = parameter(self._value_dim, is_cut=False)
        # With sequence parallelism megatron sums its gradient over the ranks, whose heads are different ones.
        self.norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [T, 1, H] -> ([T, 1, H], None). Arguments are megatron's; only packed input is served."""
        if not isinstance(packed_seq_params, PackedSequences):
            raise TypeError(f"packed_seq_params, got {type(packed_seq_params).__name__}: pass PackedSequences")
        projected = self.in_proj(hidden_states)[0].squeeze(1)
        rows = (2 * self._keys + self._values, self._values, self._value_heads, self._value_heads)
        mixed, gate, write, decay = projected.split(rows, dim=-1)
        mixed = F.silu(causal_convolution(mixed, self.conv_weight.squeeze(1), packed_seq_params.positions))
        query, key, value = mixed.split((self._keys, self._keys, self._values), dim=-1)
        query, key = (part.unflatten(-1, (-1, self._key_dim)) for part in (query, key))
        repeats = self._value_heads // query.shape[1]
        parts = (
            query.repeat_interleave(repeats, dim=1),
            key.repeat_interleave(repeats, dim=1),
            value.unflatten(-1, (-1, self._value_dim)),
            -self.A_log.float().exp() * F.softplus(decay.float() + self.dt_bias),
            write.sigmoid(),
        )
        out = torch.cat([_in_block(block, parts) for block in packed_seq_params.blocks])
        weight = self.norm_weight
        if self._tp.size() > 1 and not self.config.sequence_parallel:
            weight = copy_to_tensor_model_parallel_region(weight, group=self._tp)
        normed = F.rms_norm(out, out.shape[-1:], weight.float(), self.config.layernorm_epsilon)
        normed = normed * F.silu(gate.float().unflatten(-1, (-1, self._value_dim)))
        output, bias = self.out_proj(normed.flatten(1).to(hidden_states.dtype).unsqueeze(1))
        return output, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """Rows of queries, keys and so on each by themselves, so that another number of ranks finds its own."""
        own: dict[str, Tensor] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        cut = dict.fromkeys(("conv_weight", "A_log", "dt_bias"), 0)
        state = make_sharded_tensors_for_checkpoint(own, prefix, cut, sharded_offsets)
        for name, module in self.named_children():
            state.update(sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata))
        rows = [self._keys, self._keys, self._values, self._values, self._value_heads, self._value_heads]
        names = ["query", "key", "value", "gate", "write", "decay"]
        for name, count in (("in_proj.weight", 6), ("conv_weight", 3)):
            whole = state[prefix + name]
            state[prefix + name] = _by_rows(whole, rows[:count], names[:count], sharded_offsets)
        return state


def _by_rows(whole: Any, rows: list[int], names: list[str], offsets: tuple[Any, ...]) -> ShardedTensorFactory:
    """A megatron sharded tensor as several, of so many rows each."""

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id: Any, flattened_range: slice | None) -> list[Any]:
        return [
            make_tp_sharded_tensor_for_checkpoint(
                piece, f"{key}.{name}", replica_id=replica_id, prepend_offsets=offsets
            )
            for name, piece in zip(names, tensor.split(rows), strict=True)
        ]

    def merge(pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces)

    return ShardedTensorFactory(whole.key, whole.data, build, merge, whole.replica_id)


def causal_convolution(x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """`y_t = sum over j of w[:, width - 1 - j] * x_{t-j}`, within each sequence: x [T, n], weight [n, width], positions [T]."""
    out = x * weight[:, -1]
    for lag in range(1, weight.shape[1]):
        before = F.pad(x, (0, 0, lag, 0))[: len(x)] * (positions >= lag)[:, None]
        out = out + before * weight[:, -1 - lag]
    return out


def _in_block(block: Block, parts: tuple[Tensor, ...]) -> Tensor:
    """[tokens of the block, H, D] fp32 from the arguments of `delta_rule` as [T, ...] each."""
    assert block.prefixes is None, "a model with --spec shares no prompts"
    if block.inputs is None:
        own = [part[block.start : block.stop] for part in parts]
    else:
        own = [part.index_select(0, block.inputs) for part in parts]
    out = delta_rule(*(part.unflatten(0, (block.rows, block.length)) for part in own)).flatten(0, 1)
    return out if block.slots is None else out.index_select(0, block.slots)


def delta_rule(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, write: Tensor) -> Tensor:
    """What the queries read, [B, L, H, D of values] fp32, of rows that each begin with an empty S.

    query, key [B, L, H, D], value [B, L, H, D'], log_decay (of a) and write (b) [B, L, H]. With c_t the sum of log decays up to
    t in a chunk that S enters, all u of the chunk solve `u_t + b_t sum over s < t of e^(c_t - c_s) (k_t k_s) u_s = b_t (v_t -
    e^(c_t) S^T k_t)`, a triangular system, which is solved for all chunks at once; only S goes from one to the next.
    """
    length, width = query.shape[1], query.shape[-1]
    chunk = min(_CHUNK_TOKENS, length)
    query, key, value, log_decay, write = (
        _chunks(part.float(), chunk) for part in (_unit(query) * width**-0.5, _unit(key), value, log_decay, write)
    )
    sums = log_decay.cumsum(dim=-1)
    entered = sums.exp()[..., None]
    faded = (sums[..., :, None] - sums[..., None, :]).tril().exp().tril()
    write = write[..., None]
    system = (write * (key @ key.transpose(-1, -2)) * faded).tril(-1)
    solved = torch.linalg.solve_triangular(
        system, torch.cat([write * value, write * entered * key], dim=-1), upper=False, unitriangular=True
    )
    fresh, reading = solved.split((value.shape[-1], width), dim=-1)
    seen = (query @ key.transpose(-1, -2)) * faded
    leaving = key * (sums[..., -1:] - sums).exp()[..., None]
    query = query * entered
    state = value.new_zeros(*value.shape[:2], width, value.shape[-1])
    out = []
    for i in range(value.shape[2]):
        written = fresh[:, :, i] - reading[:, :, i] @ state
        out.append(query[:, :, i] @ state + seen[:, :, i] @ written)
        state = entered[:, :, i, -1:] * state + leaving[:, :, i].transpose(-1, -2) @ written
    return torch.cat(out, dim=2)[:, :, :length].transpose(1, 2)


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x * (x.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, L, H, ...] -> [B, H, chunks, C, ...], with zeros at the end: they write nothing."""
    missing = -x.shape[1] % chunk
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
    return x.transpose(1, 2).unflatten(2, (-1, chunk))
