"""Multi-head latent attention over packed sequences, arXiv 2405.04434: keys and values of all heads from one narrow vector.

    hidden -> down -> norm -> up -> query of each head, a part of which rotates
    hidden -> down -> norm -> up -> key and value of each head
                '-> rotated, the same for all heads -> key

Legend: `T` packed tokens, `N` heads of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import MLATransformerConfig, ModuleSpec, multi_latent_attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from torch import Tensor

from .attention import PackedCoreAttention, PackedSequences, rotate
from .layers import RMSNorm

# Megatron takes Transformer Engine for installed where only its own wrapper of it is.
multi_latent_attention.HAVE_TE = isinstance(multi_latent_attention.TELinear, type)

#: Of the norms between the projections, whatever the model's own is.
_EPSILON = 1e-6


class _LatentNorm(RMSNorm):
    def __init__(self, config: MLATransformerConfig, hidden_size: int, **_: Any):
        super().__init__(config, hidden_size, eps=_EPSILON)


def latent_attention_spec(backend: str) -> ModuleSpec:
    """Latent attention of megatron's linear layers around our core with this `backend`."""
    return ModuleSpec(
        module=PackedLatentAttention,
        params={"attn_mask_type": AttnMaskType.causal, "backend": backend},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=PackedCoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=_LatentNorm,
            kv_layernorm=_LatentNorm,
        ),
    )


class PackedLatentAttention(MLASelfAttention):
    """Megatron's projections and their sharding, with our rotation and core."""

    def __init__(self, *args: Any, backend: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.core_attention.backend = backend
        self.rotary_pos_emb.inv_freq = self.config.rotary_frequencies
        self.core_attention.softmax_scale = self.softmax_scale * self.config.softmax_factor

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [T, 1, H] -> ([T, 1, H], bias). Arguments are megatron's; only packed input is served."""
        if not isinstance(packed_seq_params, PackedSequences):
            raise TypeError(f"packed_seq_params, got {type(packed_seq_params).__name__}: pass PackedSequences")
        query, key, value = self._heads(hidden_states, packed_seq_params)
        context = self.core_attention(query, key, value, None, packed_seq_params=packed_seq_params)
        output, bias = self.linear_proj(context.unsqueeze(1))
        return output, bias

    def _heads(self, hidden: Tensor, sequences: PackedSequences) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key [T, N, qk_head_dim + qk_pos_emb_head_dim], value [T, N, v_head_dim]."""
        config = self.config
        rotated, plain = config.qk_pos_emb_head_dim, config.qk_head_dim
        if config.q_lora_rank is None:
            query, _ = self.linear_q_proj(hidden)
        else:
            query, _ = self.linear_q_up_proj(
                self.q_layernorm(self._scattered(self._whole(self.linear_q_down_proj, hidden)))
            )
        latent, key_turning = self._whole(self.linear_kv_down_proj, hidden).split(
            [config.kv_lora_rank, rotated], dim=-1
        )
        both, _ = self.linear_kv_up_proj(self.kv_layernorm(self._scattered(latent)))
        if self.tp_group.size() > 1:
            # Each rank's heads give a part of its gradient.
            key_turning = copy_to_tensor_model_parallel_region(key_turning, group=self.tp_group)

        query = query.squeeze(1).unflatten(-1, (-1, plain + rotated))
        key, value = both.squeeze(1).unflatten(-1, (query.shape[1], -1)).split([plain, config.v_head_dim], dim=-1)
        angles = self.rotary_pos_emb(sequences.max_seqlen_q, packed_seq=True)
        cos, sin = (part.squeeze(1) for part in sequences.phases(angles, query.dtype, config.rotary_scale))
        query, query_turning = query.split([plain, rotated], dim=-1)
        query_turning, key_turning = (
            rotate(part, cos, sin, config.latent_interleaved) for part in (query_turning, key_turning)
        )
        query = torch.cat([query, query_turning], dim=-1)
        key = torch.cat([key, key_turning.expand(-1, key.shape[1], -1)], dim=-1)
        return query, key, value

    def _whole(self, linear: ColumnParallelLinear, hidden: Tensor) -> Tensor:
        """[T, 1, rank] of all tokens, from the ranks' pieces."""
        out: Tensor = linear(hidden)[0]
        return out if self.tp_group.size() == 1 else gather_from_tensor_model_parallel_region(out, group=self.tp_group)

    def _scattered(self, x: Tensor) -> Tensor:
        """This rank's tokens, where the ranks share them between the parallel regions."""
        return scatter_to_sequence_parallel_region(x, group=self.tp_group) if self.config.sequence_parallel else x
