"""The batch plan as the flags ask for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from miles.config import make_config
from miles.data.batch import plan_rows

#: Attention outweighs the products of matrices: a row of n tokens costs about n (n + 4).
_MODEL: dict[str, Any] = {
    **{"num_layers": 4, "hidden_size": 1, "ffn_hidden_size": 1, "num_attention_heads": 8, "num_query_groups": 8},
    **{"kv_channels": 64, "swiglu": True, "vocab_size": 8, "max_position_embeddings": 64},
}


def _plan(lengths: list[int], dp_size: int, **flags: Any) -> list[list[list[int]]]:
    config = make_config(**_MODEL, **flags)
    plan = plan_rows(np.array(lengths), np.zeros(len(lengths), np.int64), 1, dp_size, config)
    return [[micro.tolist() for micro in rank] for rank in plan.steps[0]]


def test_balance_by_tokens_or_by_flops() -> None:
    lengths = [40, 20, 20, 20, 20]
    by_tokens = _plan(lengths, 2, balance_data=True, micro_batch_size=8)
    by_flops = _plan(lengths, 2, balance_by_flops=True, micro_batch_size=8)
    assert sorted(len(rank[0]) for rank in by_tokens) == [2, 3]
    assert sorted(by_flops) == [[[0]], [[1, 2, 3, 4]]]


def test_the_token_budget_is_that_of_each_context_rank() -> None:
    flags = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 20, "actor_num_gpus_per_node": 2}
    assert _plan([20, 20, 20, 20], 1, **flags) == [[[0], [1], [2], [3]]]
    shared = _plan([20, 20, 20, 20], 1, **flags, context_parallel_size=2)
    assert sorted(map(len, shared[0])) == [2, 2]


def test_an_interleaved_pipeline_has_two_rounds_of_micro_batches_or_more() -> None:
    flags = {"actor_num_gpus_per_node": 2, "pipeline_model_parallel_size": 2, "micro_batch_size": 1}
    interleaved = {**flags, "num_virtual_stages_per_pipeline_rank": 2}
    assert [len(_plan([1] * rows, 1, **flags)[0]) for rows in (1, 2, 4, 5)] == [1, 2, 4, 5]
    assert [len(_plan([1] * rows, 1, **interleaved)[0]) for rows in (1, 2, 4, 5)] == [4, 4, 4, 6]
