"""HF and megatron layouts: exact both ways, for any tensor-parallel size."""

from __future__ import annotations

import pytest
import torch

from miles.errors import ConfigError
from miles.trainers.megatron.hf_names import (
    Cut,
    FusedQkv,
    GateUp,
    Layout,
    NameMap,
    Shape,
    VocabularyRows,
    Whole,
    model_kinds,
)

#: 4 K/V heads of 2 query heads each, head dimension 2, hidden 6.
_SHAPE = Shape(num_query_groups=4, heads_per_group=2, head_dim=2, vocab_size=13, padded_vocab_size=16)
_QKV = [torch.arange(rows * 6.0).reshape(rows, 6) + offset for rows, offset in ((16, 0), (8, 1000), (8, 2000))]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("layout", "parts"),
    [
        (Whole(), [torch.randn(6)]),
        (Cut(0), [torch.randn(8, 6)]),
        (Cut(1), [torch.randn(6, 8)]),
        (VocabularyRows(), [torch.randn(13, 6)]),
        (FusedQkv(), _QKV),
        (FusedQkv(), [part[:, 0] for part in _QKV]),
        (GateUp(), [torch.randn(8, 6), torch.randn(8, 6)]),
    ],
)
def test_split_undoes_merge(layout: Layout, parts: list[torch.Tensor], size: int) -> None:
    shards = [layout.merge(parts, _SHAPE, rank, size) for rank in range(size)]
    assert len({shard.shape for shard in shards}) == 1
    back = layout.split(shards, _SHAPE)
    assert len(back) == len(parts)
    assert all(torch.equal(a, b) for a, b in zip(back, parts, strict=True))


def test_fused_qkv_is_grouped_by_key_head() -> None:
    """Rows of the first K/V head by hand: query rows 0-3, key rows 0-1, value rows 0-1."""
    fused = FusedQkv().merge(_QKV, _SHAPE, 0, 4)
    assert fused[:, 0].tolist() == [0, 6, 12, 18, 1000, 1006, 2000, 2006]


def test_padding_rows_are_zero() -> None:
    last = VocabularyRows().merge([torch.ones(13, 6)], _SHAPE, 3, 4)
    assert last[:, 0].tolist() == [1, 0, 0, 0]


def test_layer_numbers_count_from_the_first_pipeline_stage() -> None:
    names = NameMap("qwen3", _SHAPE)
    assert names.match("decoder.layers.1.mlp.linear_fc1.weight", 10).hf == (
        "model.layers.11.mlp.gate_proj.weight",
        "model.layers.11.mlp.up_proj.weight",
    )
    assert names.match("output_layer.weight").hf == ("lm_head.weight",)
    # Transformer Engine's fused norm and the plain one are the same HF weight.
    assert (
        names.match("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight").hf
        == names.match("decoder.layers.0.input_layernorm.weight").hf
    )


def test_unknown_weights_and_kinds_are_named() -> None:
    with pytest.raises(ConfigError, match=r"decoder\.layers\.0\.mlp\.router\.weight"):
        NameMap("qwen3", _SHAPE).match("decoder.layers.0.mlp.router.weight")
    with pytest.raises(ConfigError, match="qwen2"):
        NameMap("qwen22", _SHAPE)
    assert {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe"} <= set(model_kinds)


@pytest.mark.parametrize("name", ["mlp.experts.local_experts.1.linear_fc2.weight", "mlp.experts.linear_fc2.weight1"])
def test_experts_count_from_the_first_of_all_ranks(name: str) -> None:
    match = NameMap("qwen3_moe", _SHAPE).match(f"decoder.layers.2.{name}", 10, 4)
    assert match.hf == ("model.layers.12.mlp.experts.5.down_proj.weight",)
    assert match.names(1) == ("model.layers.12.mlp.experts.1.down_proj.weight",)
