"""A layer with a backward pass of its own on a CPU, where memory and not arithmetic sets the pace.

    x [T, H] -> _Queries: norm, qkv, head norms, rotation -> attention -> _Rest: projection, + x, norm, gated MLP, + -> [T, H]

torch's autograd keeps every intermediate and sweeps all tokens once for each elementwise operation. Here tokens go through
in pieces that stay in a core's cache, and what is cheap is computed again. On other devices, and where tensor
parallelism splits the weights, megatron's own code runs.

Legend: `T` tokens, `H` hidden size, `F` width of the gated MLP, `N` query heads, `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from .attention import PackedCoreAttention, PackedSelfAttention, PackedSequences

#: Tokens of one piece, at most: enough for products of matrices at full speed and for what Python adds to each operation, few
#: enough for a core's caches.
_PIECE_TOKENS = 512


class RMSNorm(torch.nn.RMSNorm):
    """`x / rms(x) * weight`, arXiv 1910.07467. Megatron's wrapper of torch's refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        # Megatron sums the gradients of such weights over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> the same."""
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        normed: Tensor = _RmsNorm.apply(x, self.weight, self.eps)
        return normed


class ZeroCentredRMSNorm(RMSNorm):
    """`x / rms(x) * (1 + weight)`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> the same."""
        weight = 1.0 + self.weight.float()
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)
        normed: Tensor = _RmsNorm.apply(x, weight, self.eps)
        return normed


class LayerNorm(torch.nn.LayerNorm):
    """torch's, marked as `RMSNorm` above."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class _RmsNorm(torch.autograd.Function):
    """With `n = x / rms(x)`: `dx = (g w - n mean(g w n)) / rms(x)`, `dw = sum(g n)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = _inverse_rms(rows, eps)
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(rows, scale).mul_(weight).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        grad = grads[0].reshape(rows.shape)
        normed = rows * scale
        grad_weight = (grad * normed).sum(dim=0)
        return _norm_backward(grad * weight, normed, scale).view(x.shape), grad_weight, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """[..., n] -> [..., 1]"""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_backward(grad: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x from that of `normed = x * scale`, all [..., n] and `scale` [..., 1]. Overwrites `grad`."""
    mean = torch.linalg.vecdot(grad, normed).div_(normed.shape[-1])[..., None]
    return grad.addcmul_(normed, mean, value=-1).mul_(scale)


class GatedMLP(MLP):
    """Megatron's MLP of its own linear layers."""

    def __init__(self, config: TransformerConfig):
        parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, parts, ffn_hidden_size=config.ffn_hidden_size)


class PackedLayer(TransformerLayer):
    """Megatron's layer on packed sequences, which on a CPU runs in pieces where it is a dense one that this rank holds whole."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        attention = self.self_attention
        self._is_plain = (
            config.params_dtype == torch.float32
            and self.tp_group.size() == 1
            and config.normalization == "RMSNorm"
            and isinstance(attention.core_attention, PackedCoreAttention)
            and type(attention) is PackedSelfAttention
            and isinstance(attention.q_layernorm, RMSNorm | IdentityOp | None)
            and isinstance(self.mlp, GatedMLP)
            and config.gated_linear_unit
            and config.activation_func is F.silu
            and not config.add_bias_linear
            and config.activation_func_clamp_value is None
            and not config.glu_linear_offset
            and not config.rotary_interleaved
            and not config.layernorm_zero_centered_gamma
            and not config.attention_output_gate
            and config.rotary_scale == 1.0
        )
        self._heads = attention.num_attention_heads_per_partition, attention.num_query_groups_per_partition
        self._head_dim = attention.hidden_size_per_attention_head
        self.register_buffer("_order", _row_order(*self._heads, self._head_dim), persistent=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[T, 1, H] -> ([T, 1, H], context). Arguments are megatron's."""
        angles, sequences = kwargs.get("rotary_pos_emb"), kwargs.get("packed_seq_params")
        if not self._in_pieces(hidden_states, angles, sequences):
            output: tuple[Tensor, Tensor | None] = super().forward(hidden_states, *args, **kwargs)
            return output
        assert isinstance(sequences, PackedSequences)
        assert isinstance(angles, Tensor)
        attention, eps = self.self_attention, self.config.layernorm_epsilon
        x = hidden_states.squeeze(1)
        qkv = _Queries.apply(
            x,
            self.input_layernorm.weight,
            attention.linear_qkv.weight,
            attention.linear_qkv.bias,
            getattr(attention.q_layernorm, "weight", None),
            getattr(attention.k_layernorm, "weight", None),
            sequences.turns(angles),
            self._order,
            self._heads,
            eps,
        )
        context = attention.core_attention.attend(qkv, self._heads[0], sequences)
        out = _Rest.apply(
            x,
            context,
            attention.linear_proj.weight,
            self.pre_mlp_layernorm.weight,
            self.mlp.linear_fc1.weight,
            self.mlp.linear_fc2.weight,
            eps,
        )
        return out.unsqueeze(1), None

    def _in_pieces(self, hidden: Tensor, angles: Any, sequences: Any) -> bool:
        return (
            self._is_plain
            and hidden.device.type == "cpu"
            and isinstance(sequences, PackedSequences)
            # Rotation covers whole heads.
            and isinstance(angles, Tensor)
            and angles.shape[-1] == self._head_dim
        )


class PostNormLayer(PackedLayer):
    """A layer that also norms what attention and MLP give, before it is added to what they got."""

    def __init__(self, config: TransformerConfig, *args: Any, after_attention: bool, after_mlp: bool, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        eps, size = config.layernorm_epsilon, config.hidden_size
        self.post_self_attn_layernorm = RMSNorm(config, size, eps) if after_attention else IdentityOp()
        self.post_mlp_layernorm = RMSNorm(config, size, eps) if after_mlp else IdentityOp()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[T, 1, H] -> ([T, 1, H], None). Arguments are megatron's."""
        attended, bias = self.self_attention(
            self.input_layernorm(hidden_states),
            None,
            rotary_pos_emb=kwargs.get("rotary_pos_emb"),
            packed_seq_params=kwargs.get("packed_seq_params"),
        )
        hidden = hidden_states + self.post_self_attn_layernorm(attended if bias is None else attended + bias)
        out, bias = self.mlp(self.pre_mlp_layernorm(hidden))
        return hidden + self.post_mlp_layernorm(out if bias is None else out + bias), None


def _row_order(num_heads: int, num_groups: int, width: int) -> Tensor:
    """[(N + 2 K) * D] rows of megatron's qkv weight (for each group its queries, key, value) as all queries, keys, values.

    Those of a query and a key are in pairs (i, i + D/2), which rotation turns as one complex number; both have the same
    order, so their product is what it was.
    """
    rows = torch.arange((num_heads + 2 * num_groups) * width).view(num_groups, -1, width)
    paired = rows.view(num_groups, -1, 2, width // 2).transpose(2, 3).reshape(rows.shape)
    return torch.cat([paired[:, :-2].flatten(), paired[:, -2].flatten(), rows[:, -1].flatten()])


class _Queries(torch.autograd.Function):
    """`rotate(norm(heads(norm(x) W^T + b)))`: x [T, H] -> [T, N + 2 K, D], in the order of `_row_order`.

    The weight of the first norm is taken into W's columns, from whose gradient its own follows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        turns: Tensor,
        order: Tensor,
        heads: tuple[int, int],
        eps: float,
    ) -> Tensor:
        num_turned, num_all = sum(heads), heads[0] + 2 * heads[1]
        width = len(order) // num_all
        folded = weight[order].mul_(norm)
        bias = None if bias is None else bias[order]
        head_norm = None
        if query_norm is not None and key_norm is not None:
            head_norm = torch.cat([_paired(query_norm).expand(heads[0], -1), _paired(key_norm).expand(heads[1], -1)])
        scales = torch.empty(len(x), 1)
        out = torch.empty(len(x), num_all, width)
        normed = torch.empty(len(x), num_turned, width) if head_norm is not None else None
        head_scales = torch.empty(len(x), num_turned, 1) if head_norm is not None else None
        for piece in _pieces(len(x)):
            scales[piece] = _inverse_rms(x[piece], eps)
            flat = out[piece].view(-1, len(order))
            torch.mm(x[piece] * scales[piece], folded.t(), out=flat)
            if bias is not None:
                flat += bias
            turned = out[piece, :num_turned]
            before = turned
            if head_norm is not None and normed is not None and head_scales is not None:
                head_scales[piece] = _inverse_rms(turned, eps)
                before = torch.mul(turned, head_scales[piece], out=normed[piece]) * head_norm
            torch.mul(_complex(before), turns[piece], out=_complex(turned))
        ctx.save_for_backward(x, norm, weight, folded, turns, order, scales, head_norm, normed, head_scales)
        ctx.has_bias, ctx.heads = bias is not None, heads
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, weight, folded, turns, order, scales, head_norm, normed, head_scales = ctx.saved_tensors
        num_turned = sum(ctx.heads)
        grad_x, grad_folded = torch.empty(x.shape), torch.zeros(folded.shape)
        grad_bias = torch.zeros(len(order)) if ctx.has_bias else None
        grad_heads = None if head_norm is None else torch.zeros(head_norm.shape)
        back = turns.conj_physical()
        for piece in _pieces(len(x)):
            grad = grads[0][piece].clone()
            turned = grad[:, :num_turned]
            torch.mul(_complex(turned), back[piece], out=_complex(turned))
            if grad_heads is not None:
                grad_heads += (turned * normed[piece]).sum(dim=0)
                _norm_backward(turned.mul_(head_norm), normed[piece], head_scales[piece])
            flat, rows = grad.view(-1, len(order)), x[piece] * scales[piece]
            if grad_bias is not None:
                grad_bias += flat.sum(dim=0)
            grad_folded.addmm_(flat.t(), rows)
            grad_x[piece] = _norm_backward(flat @ folded, rows, scales[piece])
        grad_query = grad_key = None
        if grad_heads is not None:
            grad_query, grad_key = (_unpaired(part.sum(dim=0)) for part in grad_heads.split(ctx.heads))
        grad_norm, grad_weight = _unfold(grad_folded, weight[order], norm)
        grad_weight = torch.empty_like(weight).index_copy_(0, order, grad_weight)
        if grad_bias is not None:
            grad_bias = torch.empty_like(grad_bias).index_copy_(0, order, grad_bias)
        return grad_x, grad_norm, grad_weight, grad_bias, grad_query, grad_key, None, None, None, None


class _Rest(torch.autograd.Function):
    """`h + (silu(n W_gate^T) * (n W_up^T)) W_out^T` with `h = x + context W_proj^T`, `n = norm(h)`, arXiv 2002.05202.

    x [T, H], context [T, N * D], `w_in` [2 F, H] gate over up, `w_out` [H, F]. Kept for the backward pass: `h` and `n w_in^T`;
    the activation is computed again. The norm's weight is taken into `w_in` as in `_Queries`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, context: Tensor, w_proj: Tensor, norm: Tensor, w_in: Tensor, w_out: Tensor, eps: float
    ) -> Tensor:
        width = w_out.shape[1]
        folded = w_in * norm
        hidden, scales, projected = torch.empty(x.shape), torch.empty(len(x), 1), torch.empty(len(x), 2 * width)
        out = torch.empty(x.shape)
        for piece in _pieces(len(x)):
            h = torch.addmm(x[piece], context[piece], w_proj.t(), out=hidden[piece])
            scales[piece] = _inverse_rms(h, eps)
            both = torch.mm(h * scales[piece], folded.t(), out=projected[piece])
            torch.addmm(h, F.silu(both[:, :width]).mul_(both[:, width:]), w_out.t(), out=out[piece])
        ctx.save_for_backward(context, w_proj, norm, w_in, w_out, folded, hidden, scales, projected)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        context, w_proj, norm, w_in, w_out, folded, hidden, scales, projected = ctx.saved_tensors
        width = w_out.shape[1]
        grad_hidden, grad_context = torch.empty(hidden.shape), torch.empty(context.shape)
        grad_proj, grad_folded, grad_out = (torch.zeros(weight.shape) for weight in (w_proj, w_in, w_out))
        for piece in _pieces(len(hidden)):
            grad, both = grads[0][piece], projected[piece]
            gate, up = both[:, :width], both[:, width:]
            opened = F.silu(gate)
            grad_out.addmm_(grad.t(), opened * up)
            grad_product = grad @ w_out
            grad_both = torch.empty(both.shape)
            torch.mul(grad_product, opened, out=grad_both[:, width:])
            torch.ops.aten.silu_backward(grad_product.mul_(up), gate, grad_input=grad_both[:, :width])
            rows = hidden[piece] * scales[piece]
            grad_folded.addmm_(grad_both.t(), rows)
            grad_rows = _norm_backward(grad_both @ folded, rows, scales[piece])
            grad_h = torch.add(grad, grad_rows, out=grad_hidden[piece])
            grad_proj.addmm_(grad_h.t(), context[piece])
            torch.mm(grad_h, w_proj, out=grad_context[piece])
        grad_norm, grad_in = _unfold(grad_folded, w_in, norm)
        return grad_hidden, grad_context, grad_proj, grad_norm, grad_in, grad_out, None


def _unfold(grad: Tensor, weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `norm` [H] and `weight` [O, H] from that of their product."""
    return (grad * weight).sum(dim=0), grad * norm


def _paired(x: Tensor) -> Tensor:
    """[D] from halves to pairs, the order that `_row_order` gives a head."""
    return x.view(2, -1).t().flatten()


def _unpaired(x: Tensor) -> Tensor:
    return x.view(-1, 2).t().flatten()


def _complex(x: Tensor) -> Tensor:
    """[T, heads, D] -> [T, heads, D/2], a view."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _pieces(tokens: int) -> list[slice]:
    """As few as there can be, of equal size."""
    count = max(1, -(-tokens // _PIECE_TOKENS))
    size = max(1, -(-tokens // count))
    return [slice(start, start + size) for start in range(0, tokens, size)]
