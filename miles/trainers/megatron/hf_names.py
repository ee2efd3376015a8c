"""Names and layouts of weights: Hugging Face on one side, megatron-core on the other, for each kind of model.

    HF parts --merge--> this rank's megatron shard          shards of all ranks --split--> HF parts

A model kind is a tuple of `Rule`s: which megatron weight holds which HF weights, and how (`Layout`). Both directions are
exact: they copy, concatenate and cut, and never compute. A new family is a new entry in `model_kinds`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from miles.algo.registry import Registry
from miles.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """What layouts need to know of a model."""

    num_query_groups: int
    heads_per_group: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    delta_rows: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Of linear attention: key heads, and rows of all keys, of all values, and of one number for each value head."""


class Layout(Protocol):
    """How HF weights lie in a megatron weight, and how that one is cut over tensor-parallel ranks."""

    def merge(self, parts: Sequence[Tensor], shape: Shape, rank: int, size: int) -> Tensor:
        """The shard of tensor-parallel rank `rank` of `size`."""
        ...

    def split(self, shards: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        """The HF weights, from the shards of all ranks in order. Views where nothing has to move."""
        ...


class Whole:
    """One weight, the same on every rank."""

    def merge(self, parts: Sequence[Tensor], shape: Shape, rank: int, size: int) -> Tensor:
        return parts[0]

    def split(self, shards: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Cut:
    """One weight, cut along `dim`."""

    dim: int

    def merge(self, parts: Sequence[Tensor], shape: Shape, rank: int, size: int) -> Tensor:
        return parts[0].chunk(size, self.dim)[rank]

    def split(self, shards: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        return [_join(shards, self.dim)]


class VocabularyRows:
    """Embedding or output weight, cut along the vocabulary after padding it with rows of zeros."""

    def merge(self, parts: Sequence[Tensor], shape: Shape, rank: int, size: int) -> Tensor:
        full = parts[0]
        missing = shape.padded_vocab_size - full.shape[0]
        if missing > 0:
            full = torch.cat([full, full.new_zeros(missing, *full.shape[1:])])
        return full.chunk(size)[rank]

    def split(self, shards: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        return [_join(shards, 0)[: shape.vocab_size]]


class FusedQkv:
    """Q, K and V, weights or biases, as megatron fuses them: for each K/V head its query heads, its key, its value."""

    def merge(self, parts: Sequence[Tensor], shape: Shape, rank: int, size: int) -> Tensor:
        rest = parts[0].shape[1:]
        grouped = [part.reshape(shape.num_query_groups, -1, *rest) for part in parts]
        return torch.cat(grouped, dim=1).reshape(-1, *rest).chunk(size)[rank]

    def split(self, shards: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        full = _join(shards, 0)
        rest = full.shape[1:]
        rows = [shape.heads_per_group * shape.head_dim, shape.head_dim, shape.head_dim]
        grouped = full.reshape(shape.num_query_groups, sum(rows), *rest)
        return [part.reshape(-1, *rest) for part in grouped.split(rows, dim=1)]


class FusedGatedQkv:
    """The same where HF has behind each query head the gate of what it gives; megatron has a group's gates behind its queries."""

    def merge(self, parts: Sequence[Tensor], shape: Shape, rank: int, size: int) -> Tensor:
        rest = parts[0].shape[1:]
        both = parts[0].reshape(shape.num_query_groups, shape.heads_per_group, 2, shape.head_dim, *rest)
        return FusedQkv().merge([both.transpose(1, 2).reshape(parts[0].shape), *parts[1:]], shape, rank, size)

    def split(self, shards: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        doubled = dataclasses.replace(shape, heads_per_group=2 * shape.heads_per_group)
        both, *others = FusedQkv().split(shards, doubled)
        grouped = both.reshape(shape.num_query_groups, 2, shape.heads_per_group, shape.head_dim, *both.shape[1:])
        return [grouped.transpose(1, 2).reshape(both.shape), *others]


@dataclass(frozen=True)
class DeltaRows:
    """Weights of a gated delta net: rows of queries, keys, values and so on, of all of which each rank has its piece.

    `of` says for each HF weight which rows lie in it one after the other: key, value (rows of heads) or head (one number each).
    by_head: they lie so for each key head by itself.
    """

    of: tuple[tuple[str, ...], ...]
    by_head: bool = False

    def merge(self, parts: Sequence[Tensor], shape: Shape, rank: int, size: int) -> Tensor:
        pieces = []
        for part, kinds in zip(parts, self.of, strict=True):
            grouped = part.reshape(self._groups(shape), -1, *part.shape[1:])
            for rows in grouped.split(self._rows(kinds, shape), dim=1):
                pieces.append(rows.flatten(0, 1).chunk(size)[rank])
        return torch.cat(pieces)

    def split(self, shards: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        groups = self._groups(shape)
        rows = [count * groups // len(shards) for kinds in self.of for count in self._rows(kinds, shape)]
        pieces = [_join(piece, 0) for piece in zip(*(shard.split(rows) for shard in shards), strict=True)]
        parts = []
        for kinds in self.of:
            mine, pieces = pieces[: len(kinds)], pieces[len(kinds) :]
            grouped = torch.cat([piece.reshape(groups, -1, *piece.shape[1:]) for piece in mine], dim=1)
            parts.append(grouped.flatten(0, 1))
        return parts

    def _groups(self, shape: Shape) -> int:
        return shape.delta_rows[0] if self.by_head else 1

    def _rows(self, kinds: Sequence[str], shape: Shape) -> list[int]:
        counts = dict(zip(("key", "value", "head"), shape.delta_rows[1:], strict=True))
        return [counts[kind] // self._groups(shape) for kind in kinds]


class GateUp:
    """Gate and up projection, one after the other; each rank holds its piece of both."""

    def merge(self, parts: Sequence[Tensor], shape: Shape, rank: int, size: int) -> Tensor:
        return torch.cat([part.chunk(size)[rank] for part in parts])

    def split(self, shards: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [_join([half[side] for half in halves], 0) for side in (0, 1)]


class GateOverUp:
    """The same of one HF weight that has the gate's rows first."""

    def merge(self, parts: Sequence[Tensor], shape: Shape, rank: int, size: int) -> Tensor:
        return GateUp().merge(parts[0].chunk(2), shape, rank, size)

    def split(self, shards: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        return [torch.cat(GateUp().split(shards, shape))]


class GateBesideUp:
    """The same of one HF weight that takes them in turns, transposed; or of its bias."""

    def merge(self, parts: Sequence[Tensor], shape: Shape, rank: int, size: int) -> Tensor:
        rows = _transposed(parts[0])
        return GateUp().merge([rows[::2], rows[1::2]], shape, rank, size)

    def split(self, shards: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        return [_transposed(torch.stack(GateUp().split(shards, shape), dim=1).flatten(0, 1))]


class TransposedRows:
    """One weight, transposed, whose rows are cut."""

    def merge(self, parts: Sequence[Tensor], shape: Shape, rank: int, size: int) -> Tensor:
        return _transposed(parts[0]).chunk(size, 1)[rank]

    def split(self, shards: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        return [_transposed(_join(shards, 1))]


def _transposed(x: Tensor) -> Tensor:
    """A vector stays."""
    return x.t() if x.dim() == 2 else x


def _join(shards: Sequence[Tensor], dim: int) -> Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim)


@dataclass(frozen=True)
class Rule:
    """One megatron weight and the HF weights in it; `{layer}` and `{expert}` stand for their numbers in the whole model."""

    megatron: str
    hf: tuple[str, ...]
    layout: Layout
    stacked: bool = False
    """The HF weights hold all experts along their first dimension; the layout is that of one expert's piece."""


@dataclass(frozen=True)
class Match:
    """A rule applied to one weight."""

    rule: Rule
    layer: int
    expert: int | None
    """Its number; None where the weight is no expert's."""

    @property
    def layout(self) -> Layout:
        return self.rule.layout

    @property
    def hf(self) -> tuple[str, ...]:
        return self.names(self.expert)

    def names(self, expert: int | None) -> tuple[str, ...]:
        """The HF names of the same weight of another expert."""
        return tuple(name.format(layer=self.layer, expert=expert) for name in self.rule.hf)


#: HF `model_type` (or --model-name) -> rules.
model_kinds: Registry[tuple[Rule, ...]] = Registry("--model-name (model_type of config.json)")

_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def _in_layer(megatron: str, hf: Sequence[str], layout: Layout, *, stacked: bool = False) -> Rule:
    return Rule(_LAYER + megatron, tuple(_HF_LAYER + name for name in hf), layout, stacked)


def _with(rules: Sequence[Rule], *others: Rule) -> tuple[Rule, ...]:
    """`rules` and `others`, which take the place of those of the same megatron weight."""
    return tuple({rule.megatron: rule for rule in (*rules, *others)}.values())


def _below(rules: Sequence[Rule], prefix: str) -> tuple[Rule, ...]:
    """The same rules of a file that has the text model below `prefix` in the place of `model.`"""
    return tuple(
        dataclasses.replace(rule, hf=tuple(re.sub(r"^model\.", prefix, name) for name in rule.hf)) for rule in rules
    )


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

#: The Llama layout, which Qwen and Mistral share; a model without biases or query norms just has fewer weights.
_DENSE = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VocabularyRows()),
    Rule("output_layer.weight", ("lm_head.weight",), VocabularyRows()),
    Rule("score.weight", ("score.weight",), Whole()),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Whole()),
    _in_layer("input_layernorm.weight", ["input_layernorm.weight"], Whole()),
    _in_layer("self_attention.linear_qkv.layer_norm_weight", ["input_layernorm.weight"], Whole()),
    _in_layer("self_attention.linear_qkv.weight", [f"{name}.weight" for name in _QKV], FusedQkv()),
    _in_layer("self_attention.linear_qkv.bias", [f"{name}.bias" for name in _QKV], FusedQkv()),
    _in_layer("self_attention.q_layernorm.weight", ["self_attn.q_norm.weight"], Whole()),
    _in_layer("self_attention.k_layernorm.weight", ["self_attn.k_norm.weight"], Whole()),
    _in_layer("self_attention.linear_proj.weight", ["self_attn.o_proj.weight"], Cut(1)),
    _in_layer("pre_mlp_layernorm.weight", ["post_attention_layernorm.weight"], Whole()),
    _in_layer("mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm.weight"], Whole()),
    _in_layer("mlp.linear_fc1.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], GateUp()),
    _in_layer("mlp.linear_fc2.weight", ["mlp.down_proj.weight"], Cut(1)),
)
model_kinds.register("llama", "mistral", "qwen2", "qwen3")(_DENSE)


def _experts(fc1: Sequence[str], fc2: Sequence[str]) -> tuple[Rule, ...]:
    """Of experts that HF keeps one by one, under these names of each; the router is `mlp.gate`."""
    rules = [_in_layer("mlp.router.weight", ["mlp.gate.weight"], Whole())]
    for one in ("mlp.experts.local_experts.{expert}.linear_fc%d.weight", "mlp.experts.linear_fc%d.weight{expert}"):
        rules += [_in_layer(one % 1, fc1, GateUp()), _in_layer(one % 2, fc2, Cut(1))]
    return tuple(rules)


def _shared_expert(name: str) -> tuple[Rule, ...]:
    """Of the expert of all tokens, which HF calls `name`."""
    return (
        _in_layer(
            "mlp.shared_experts.linear_fc1.weight", [f"{name}.gate_proj.weight", f"{name}.up_proj.weight"], GateUp()
        ),
        _in_layer("mlp.shared_experts.linear_fc2.weight", [f"{name}.down_proj.weight"], Cut(1)),
    )


_EXPERTS = _experts(
    ["mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"],
    ["mlp.experts.{expert}.down_proj.weight"],
)
model_kinds.register("qwen3_moe")((*_DENSE, *_EXPERTS))

model_kinds.register("glm4")(
    _with(
        _DENSE,
        _in_layer("post_self_attn_layernorm.weight", ["post_self_attn_layernorm.weight"], Whole()),
        _in_layer("post_mlp_layernorm.weight", ["post_mlp_layernorm.weight"], Whole()),
        _in_layer("mlp.linear_fc1.weight", ["mlp.gate_up_proj.weight"], GateOverUp()),
    )
)

_GROUPED_EXPERTS = (
    *_EXPERTS,
    _in_layer("mlp.router.expert_bias", ["mlp.gate.e_score_correction_bias"], Whole()),
    *_shared_expert("mlp.shared_experts"),
)
model_kinds.register("glm4_moe")((*_DENSE, *_GROUPED_EXPERTS))
model_kinds.register("deepseek_v3", "kimi_k2")(
    (
        *_DENSE,
        *_GROUPED_EXPERTS,
        _in_layer("self_attention.linear_q_proj.weight", ["self_attn.q_proj.weight"], Cut(0)),
        _in_layer("self_attention.linear_q_down_proj.weight", ["self_attn.q_a_proj.weight"], Cut(0)),
        _in_layer("self_attention.q_layernorm.weight", ["self_attn.q_a_layernorm.weight"], Whole()),
        _in_layer("self_attention.linear_q_up_proj.weight", ["self_attn.q_b_proj.weight"], Cut(0)),
        _in_layer("self_attention.linear_kv_down_proj.weight", ["self_attn.kv_a_proj_with_mqa.weight"], Cut(0)),
        _in_layer("self_attention.kv_layernorm.weight", ["self_attn.kv_a_layernorm.weight"], Whole()),
        _in_layer("self_attention.linear_kv_up_proj.weight", ["self_attn.kv_b_proj.weight"], Cut(0)),
    )
)

_DELTA = "self_attention."
_GATED = _with(
    _DENSE,
    *_EXPERTS,
    *_shared_expert("mlp.shared_expert"),
    _in_layer("mlp.shared_experts.gate_weight", ["mlp.shared_expert_gate.weight"], Whole()),
    _in_layer("self_attention.linear_qkv.weight", [f"{name}.weight" for name in _QKV], FusedGatedQkv()),
    _in_layer(_DELTA + "conv_weight", ["linear_attn.conv1d.weight"], DeltaRows((("key", "key", "value"),))),
    _in_layer(_DELTA + "A_log", ["linear_attn.A_log"], Cut(0)),
    _in_layer(_DELTA + "dt_bias", ["linear_attn.dt_bias"], Cut(0)),
    _in_layer(_DELTA + "norm_weight", ["linear_attn.norm.weight"], Whole()),
    _in_layer(_DELTA + "out_proj.weight", ["linear_attn.out_proj.weight"], Cut(1)),
)
model_kinds.register("qwen3_next")(
    _with(
        _GATED,
        _in_layer(
            _DELTA + "in_proj.weight",
            ["linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"],
            DeltaRows((("key", "key", "value", "value"), ("head", "head")), by_head=True),
        ),
    )
)
_QWEN3_5 = _with(
    _GATED,
    _in_layer(
        _DELTA + "in_proj.weight",
        [f"linear_attn.in_proj_{name}.weight" for name in ("qkv", "z", "b", "a")],
        DeltaRows((("key", "key", "value"), ("value",), ("head",), ("head",))),
    ),
)
model_kinds.register("qwen3_5_text", "qwen3_5_moe_text")(_QWEN3_5)
model_kinds.register("qwen3_5", "qwen3_5_moe")(_below(_QWEN3_5, "model.language_model."))

_EXPERT = "mlp.experts.local_experts.{expert}."
model_kinds.register("gpt_oss")(
    _with(
        _DENSE,
        _in_layer("self_attention.core_attention.softmax_offset", ["self_attn.sinks"], Cut(0)),
        _in_layer("self_attention.linear_proj.bias", ["self_attn.o_proj.bias"], Whole()),
        _in_layer("mlp.router.weight", ["mlp.router.weight"], Whole()),
        _in_layer("mlp.router.bias", ["mlp.router.bias"], Whole()),
        _in_layer(_EXPERT + "linear_fc1.weight", ["mlp.experts.gate_up_proj"], GateBesideUp(), stacked=True),
        _in_layer(_EXPERT + "linear_fc1.bias", ["mlp.experts.gate_up_proj_bias"], GateBesideUp(), stacked=True),
        _in_layer(_EXPERT + "linear_fc2.weight", ["mlp.experts.down_proj"], TransposedRows(), stacked=True),
        _in_layer(_EXPERT + "linear_fc2.bias", ["mlp.experts.down_proj_bias"], Whole(), stacked=True),
    )
)


def trained_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and what else of a model has an HF name: the biases by which routers choose experts."""
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(".router.expert_bias"))


#: Beginnings of names that stay as they are: a vision tower, and what predicts further tokens.
UNTRAINED = ("model.visual.", "mtp.")


class NameMap:
    """Finds the rule of a megatron weight."""

    def __init__(self, model_type: str, shape: Shape):
        """Raises ConfigError, with the known kinds, for one that has no rules."""
        self.model_type, self.shape = model_type, shape
        self._rules = {rule.megatron: rule for rule in model_kinds.get(model_type)}

    def match(self, megatron_name: str, layer_offset: int = 0, expert_offset: int = 0) -> Match:
        """`megatron_name` as this rank's module has it; `layer_offset` layers come before this pipeline stage, and
        `expert_offset` experts before those of this rank."""
        layer, pattern = _numbered(megatron_name, _LAYER_NUMBER, "{layer}", layer_offset)
        expert, pattern = _numbered(pattern, _EXPERT_NUMBER, "{expert}", expert_offset)
        if pattern not in self._rules:
            raise ConfigError(
                f"weight {megatron_name}, got no HF name: the mapping of {self.model_type!r} does not cover it; "
                "add a rule to miles/trainers/megatron/hf_names.py"
            )
        return Match(self._rules[pattern], layer or 0, expert)


_LAYER_NUMBER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
#: Of experts one by one, and of those that Transformer Engine computes together.
_EXPERT_NUMBER = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)|(?<=\.experts\.linear_fc[12]\.weight)\d+$")


def _numbered(name: str, number: re.Pattern[str], placeholder: str, offset: int) -> tuple[int | None, str]:
    """The number in `name` plus `offset`, and the name with `placeholder` in its place. None where there is none."""
    found = number.search(name)
    return (None, name) if found is None else (int(found.group()) + offset, number.sub(placeholder, name))
