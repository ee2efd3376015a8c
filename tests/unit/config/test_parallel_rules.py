"""Sizes that cannot be: refused at launch, with the arithmetic; and the arithmetic of ranks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from miles.config import make_config
from miles.config.parallel import ParallelSizes, parallel_sizes
from miles.config.platform import Platform
from miles.config.resolution import _not_in_effect

from .refusal import refused

_MODEL: dict[str, Any] = {
    **{"num_layers": 12, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8, "num_query_groups": 4},
    **{"kv_channels": 8, "vocab_size": 100, "max_position_embeddings": 64},
}
_EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
_HEADS = "and 4 / 3 is no whole number; give a divisor of 4"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size, got 0: it must be at least 1"),
        (
            {"actor_num_gpus_per_node": 6, "tensor_model_parallel_size": 2, "context_parallel_size": 2},
            "--actor-num-gpus-per-node, got 6 ranks in all: one replica takes tensor 2 x pipeline 1 x context 2 = 4 ranks; "
            "give a multiple of 4 ranks",
        ),
        (
            {"actor_num_gpus_per_node": 3, "tensor_model_parallel_size": 3, "num_attention_heads": 9},
            f"--tensor-model-parallel-size, got 3: the model has 4 key/value heads, {_HEADS}",
        ),
        (
            {"actor_num_gpus_per_node": 5, "pipeline_model_parallel_size": 5},
            "--pipeline-model-parallel-size, got 5: 12 layers do not divide over 5 pipeline ranks; give a divisor of 12, or set "
            "--decoder-first-pipeline-num-layers",
        ),
        (
            {
                "actor_num_gpus_per_node": 4,
                "pipeline_model_parallel_size": 4,
                "decoder_first_pipeline_num_layers": 2,
            },
            "--pipeline-model-parallel-size, got 4: 12 layers - 2 = 10 do not divide over 3 pipeline ranks; give other numbers",
        ),
        (
            {
                "actor_num_gpus_per_node": 2,
                "pipeline_model_parallel_size": 2,
                "num_virtual_stages_per_pipeline_rank": 4,
            },
            "--num-virtual-stages-per-pipeline-rank, got 4: a pipeline rank has 6 layers, and 6 / 4 pieces is no whole number",
        ),
        (
            {
                "actor_num_gpus_per_node": 2,
                "pipeline_model_parallel_size": 2,
                "num_layers_per_virtual_pipeline_stage": 4,
            },
            "--num-layers-per-virtual-pipeline-stage, got 4: a pipeline rank has 12 / 2 = 6 layers; give a divisor of 6",
        ),
        (
            {
                "actor_num_gpus_per_node": 2,
                "pipeline_model_parallel_size": 2,
                "num_layers_per_virtual_pipeline_stage": 2,
                "num_virtual_stages_per_pipeline_rank": 3,
            },
            "--num-layers-per-virtual-pipeline-stage, got 2: --num-virtual-stages-per-pipeline-rank 3 says it too",
        ),
        (
            {
                "actor_num_gpus_per_node": 2,
                "pipeline_model_parallel_size": 2,
                "num_layers_per_virtual_pipeline_stage": 2,
                "decoder_last_pipeline_num_layers": 2,
            },
            "--num-layers-per-virtual-pipeline-stage, got 2: with ends of their own size the pieces differ; use",
        ),
        (
            {"num_virtual_stages_per_pipeline_rank": 2},
            "--num-virtual-stages-per-pipeline-rank, got 2: there is no pipeline; add --pipeline-model-parallel-size N",
        ),
        (
            {"overlap_param_gather": True, "use_distributed_optimizer": True},
            "--overlap-param-gather: weights are gathered only where --use-distributed-optimizer shares them, and in step with",
        ),
        (
            {"optimizer": "sgd", "use_distributed_optimizer": True},
            "--use-distributed-optimizer: megatron shares the state of Adam, not of sgd; use --optimizer adam",
        ),
        (
            {"recompute_num_layers": 2},
            "--recompute-num-layers, got 2: nothing is computed again; add --recompute-granularity full, or leave it out",
        ),
        (
            {"recompute_granularity": "full", "recompute_num_layers": 13},
            "--recompute-num-layers, got 13: a pipeline rank has 12 / 1 = 12 layers; give at most 12",
        ),
        (
            {"expert_model_parallel_size": 2, "actor_num_gpus_per_node": 2},
            "--expert-model-parallel-size, got 2: the model has no experts; leave it out",
        ),
        (
            {**_EXPERTS, "expert_model_parallel_size": 3, "actor_num_gpus_per_node": 3},
            "--expert-model-parallel-size, got 3: the model has 4 experts, and 4 / 3 is no whole number; give a divisor of 4",
        ),
        (
            {**_EXPERTS, "expert_model_parallel_size": 2, "actor_num_gpus_per_node": 3},
            "--expert-model-parallel-size, got 2: 3 ranks hold the same layers, and expert tensor 1 x expert 2 = 2; give sizes",
        ),
        (
            {**_EXPERTS, "tensor_model_parallel_size": 2, "actor_num_gpus_per_node": 2},
            "--tensor-model-parallel-size, got 2: tensor-parallel ranks would send the same tokens to the experts; add "
            "--sequence-parallel",
        ),
        (
            {
                **_EXPERTS,
                "expert_model_parallel_size": 2,
                "actor_num_gpus_per_node": 2,
                "moe_token_dispatcher_type": "allgather",
            },
            "--moe-token-dispatcher-type, got allgather: ranks that share the experts have other rows",
        ),
        (
            {
                **_EXPERTS,
                "pipeline_model_parallel_size": 2,
                "actor_num_gpus_per_node": 2,
                "moe_token_dispatcher_type": "allgather",
            },
            "--moe-token-dispatcher-type, got allgather: pipeline stages send micro-batches that differ in tokens",
        ),
    ],
)
def test_refused(flags: dict[str, Any], line: str) -> None:
    refused({**_MODEL, **flags}, line)


def test_layers_per_piece_and_pieces_say_the_same() -> None:
    common = {**_MODEL, "actor_num_gpus_per_node": 2, "pipeline_model_parallel_size": 2}
    by_layers = make_config(**common, num_layers_per_virtual_pipeline_stage=2)
    by_pieces = make_config(**common, num_virtual_stages_per_pipeline_rank=3)
    assert parallel_sizes(by_layers) == parallel_sizes(by_pieces)
    assert parallel_sizes(by_layers).virtual == 3


def test_sequence_parallelism_of_one_rank_is_not_in_effect() -> None:
    config = make_config(sequence_parallel=True)
    assert not parallel_sizes(config).sequence_parallel
    assert [item.flag for item in _not_in_effect(config, Platform())] == ["--sequence-parallel"]


def test_ranks_of_one_replica_have_one_shard_and_every_shard_has_its_ranks() -> None:
    for tensor, pipeline, context, replicas in itertools.product((1, 2, 3), (1, 2), (1, 2), (1, 2, 3)):
        sizes = ParallelSizes(tensor=tensor, pipeline=pipeline, context=context)
        world_size = sizes.ranks_per_replica * replicas
        assert sizes.data_size(world_size) == replicas
        shards = [sizes.data_rank(rank, world_size) for rank in range(world_size)]
        assert all(shards.count(number) == sizes.ranks_per_replica for number in range(replicas))
        # Neighbours share a layer and a sequence: they are on one node.
        assert shards[: tensor * context] == [0] * (tensor * context)
