"""The forward pass of a decoder-only transformer over fused weights: plain functions of tensors, no nn.Module.

    prefill(prompts) -> hidden of every position, keys and values stored in the cache
    decode(one token per row) -> hidden of that token
    logits(hidden) -> [*, vocab] float32

Legend: `N` prompts, `T` padded prompt tokens, `B` running rows, `H` hidden. Numerics follow transformers: norms accumulate
in float32, RoPE rotates halves, softmax in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .cache import DecodePlan, KVCache
from .model_config import ModelConfig
from .weights import Experts, Layer, Parameters


@dataclass(frozen=True)
class Scratch:
    """What layers write one after the other, and the views that they need of it.

    Kept from step to step: memory that is still in the core's caches, and views that are made once.
    """

    normed: torch.Tensor
    """[rows, H]"""
    qkv: torch.Tensor
    """[rows, (heads + 2 * kv_heads) * head_dim]"""
    heads: torch.Tensor
    """[rows, heads + 2 * kv_heads, head_dim], a view of qkv"""
    rotated: torch.Tensor
    """[rows, heads + kv_heads, head_dim], queries and keys: a view of qkv"""
    gate_up: torch.Tensor
    """[rows, 2 * intermediate]"""
    gate: torch.Tensor
    up: torch.Tensor
    """[rows, intermediate] each, views of gate_up"""

    @staticmethod
    def like(config: ModelConfig, x: torch.Tensor) -> Scratch:
        """For as many rows as the hidden states `x` `[rows, H]` have."""
        rows, num_rotated = x.shape[0], config.num_heads + config.num_kv_heads
        qkv = x.new_empty(rows, (num_rotated + config.num_kv_heads) * config.head_dim)
        heads = qkv.view(rows, -1, config.head_dim)
        gate_up = x.new_empty(rows, 2 * config.intermediate_size)
        gate, up = gate_up.chunk(2, -1)
        return Scratch(torch.empty_like(x), qkv, heads, heads[:, :num_rotated], gate_up, gate, up)


class DecoderModel:
    """Qwen2, Qwen3, Qwen3-MoE, Llama and Mistral. Holds no state but the parameters and the RoPE tables."""

    def __init__(self, config: ModelConfig, parameters: Parameters, context_length: int) -> None:
        self.config, self.parameters = config, parameters
        self._scratch: Scratch | None = None
        self._eps = torch.tensor(config.norm_eps, device=parameters.device)
        frequencies, scaling = config.inverse_frequencies(context_length)
        angles = torch.outer(torch.arange(context_length, dtype=torch.float32), frequencies)
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        # rotate_half(x) * sin == roll(x, head_dim / 2) * (-sin, sin): one pass less.
        # One table [context_length, 2 * head_dim], so that a step looks up both at once.
        self._rope = torch.cat((cos, cos, -sin, sin), -1).to(parameters.device, parameters.dtype)

    def prefill(self, token_ids: torch.Tensor, cache: KVCache, first_row: int, sources: torch.Tensor) -> torch.Tensor:
        """Runs right-padded prompts `[N, T]` and stores their keys and values.

        Cache rows `first_row...` take prompts `sources` (several rows may take one prompt). Returns hidden `[N, T, H]`,
        meaningless at padding: causal attention keeps padding out of the rest.
        """
        num_prompts, length = token_ids.shape
        c = self.config
        x = F.embedding(token_ids.view(-1), self.parameters.embedding)
        # Tables per token, [N * T, 1, head_dim].
        cos, sin = self._rope[:length].repeat(num_prompts, 1)[:, None].chunk(2, -1)
        scratch = Scratch.like(c, x)
        for i, layer in enumerate(self.parameters.layers):
            self._qkv(layer, x, cos, sin, scratch)
            qkv = scratch.heads.view(num_prompts, length, -1, c.head_dim).transpose(1, 2)
            queries, keys, values = qkv.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
            cache.store(i, first_row, sources, keys, values)
            attended = F.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, enable_gqa=c.num_heads != c.num_kv_heads
            )
            self._finish_layer(layer, x, attended.transpose(1, 2).reshape(num_prompts * length, -1), scratch)
        return x.view(num_prompts, length, -1)

    def decode(self, token_ids: torch.Tensor, cache: KVCache, plan: DecodePlan, x: torch.Tensor) -> None:
        """Feeds one token per row `[B]`; appends to the cache. Writes the hidden states to `x` `[B, H]`."""
        num_heads = self.config.num_heads
        torch.index_select(self.parameters.embedding, 0, token_ids, out=x)
        cos, sin = self._rope.index_select(0, plan.positions)[:, None].chunk(2, -1)
        scratch = self._scratch
        if scratch is None or scratch.normed.shape != x.shape:
            scratch = self._scratch = Scratch.like(self.config, x)
        queries, keys_values = scratch.heads[:, :num_heads], scratch.heads[:, num_heads:]
        for i, layer in enumerate(self.parameters.layers):
            self._qkv(layer, x, cos, sin, scratch)
            cache.append(i, plan, keys_values)
            self._finish_layer(layer, x, cache.attend(i, plan, queries), scratch)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[*, H]` -> `[*, vocab]` float32."""
        normed = self._norm(hidden, self.parameters.norm, None)
        return F.linear(normed, self.parameters.head).float()

    def _qkv(self, layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scratch: Scratch) -> None:
        """From `x` `[rows, H]` to `scratch.qkv`, queries and keys normed and rotated."""
        self._norm(x, layer.input_norm, scratch.normed)
        _linear(scratch.normed, layer.qkv, layer.qkv_bias, scratch.qkv)
        qk = scratch.rotated
        if layer.qk_norm is not None:
            qk = self._norm(qk, layer.qk_norm, None)
        torch.addcmul(qk * cos, qk.roll(self.config.head_dim // 2, -1), sin, out=scratch.rotated)

    def _finish_layer(self, layer: Layer, x: torch.Tensor, attended: torch.Tensor, scratch: Scratch) -> None:
        """Output projection and MLP, both added to `x` in place."""
        _add_linear(x, attended, layer.o, layer.o_bias)
        self._norm(x, layer.post_norm, scratch.normed)
        mlp = layer.mlp
        if isinstance(mlp, Experts):
            self._add_experts(mlp, x, scratch.normed)
            return
        _linear(scratch.normed, mlp.gate_up, mlp.gate_up_bias, scratch.gate_up)
        _add_linear(x, F.silu(scratch.gate, inplace=True).mul_(scratch.up), mlp.down, mlp.down_bias)

    def _add_experts(self, experts: Experts, x: torch.Tensor, normed: torch.Tensor) -> None:
        """`x` `[rows, H]` gets what each row's experts make of `normed`, weighted by their scores."""
        c = self.config
        scores, chosen = (
            torch.mm(normed, experts.router.t()).softmax(-1, torch.float32).topk(c.experts_per_token, dim=-1)
        )
        if c.normalised_scores:
            scores = scores / scores.sum(dim=-1, keepdim=True)
        scores, chosen = scores.to(x.dtype).flatten(), chosen.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=c.num_experts).tolist()
        for number, places in enumerate(order.split(counts)):
            if not len(places):
                continue
            rows = places // c.experts_per_token
            gate, up = torch.mm(normed[rows], experts.gate_up[number].t()).chunk(2, -1)
            out = torch.mm(F.silu(gate).mul_(up), experts.down[number].t())
            x.index_add_(0, rows, out.mul_(scores[places, None]))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, to `out` where given; `weight` broadcasts."""
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return torch.mul(F.rms_norm(x, x.shape[-1:], None, self.config.norm_eps), weight, out=out)
        # torch's own is eight operations on a CPU; this is five, and no Python number among their operands.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return torch.mul(x, scale, out=out).mul_(weight)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """`out = x @ weight.T + bias`."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _add_linear(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """`total += x @ weight.T + bias`."""
    total.addmm_(x, weight.t())
    if bias is not None:
        total.add_(bias)
