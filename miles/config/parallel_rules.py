"""What parallel sizes demand of the model, of each other and of the ranks: each refusal with its arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

from .budget import trainer_world_size
from .parallel import ParallelSizes, parallel_sizes, virtual_stages
from .problem import Problem
from .rule import Facts, Range, Rule, needs

_TENSOR, _PIPELINE = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"

PARALLEL_RANGES: dict[str, Range] = dict.fromkeys(
    [
        *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
        *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
        *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
        *("expert_model_parallel_size", "expert_tensor_parallel_size", "recompute_num_layers"),
    ],
    Range(1),
)


def _sizes(facts: Facts) -> ParallelSizes | None:
    """None where a size is out of range: that is said already."""
    perf = facts.config.perf
    given = (perf.tensor_model_parallel_size, perf.pipeline_model_parallel_size, perf.context_parallel_size)
    virtual = (perf.num_layers_per_virtual_pipeline_stage, perf.num_virtual_stages_per_pipeline_rank)
    return None if min(given) < 1 or any(v is not None and v < 1 for v in virtual) else parallel_sizes(facts.config)


def ranks_divide_into_replicas(facts: Facts) -> Iterator[Problem]:
    sizes = _sizes(facts)
    if sizes is None:
        return
    world_size, each = trainer_world_size(facts.config), sizes.ranks_per_replica
    if world_size % each:
        got = f"{world_size} rank{'s' if world_size > 1 else ''} in all"
        why = f"one replica takes tensor {sizes.tensor} x pipeline {sizes.pipeline} x context {sizes.context} = {each} ranks"
        yield Problem("--actor-num-gpus-per-node", got, why, f"give a multiple of {each} ranks, or smaller sizes")


def tensor_ranks_divide_layers(facts: Facts) -> Iterator[Problem]:
    sizes, model = _sizes(facts), facts.config.model
    if sizes is None:
        return
    for what, number in (
        ("attention heads", model.num_attention_heads),
        ("key/value heads", model.num_query_groups),
        ("columns of the MLP (--ffn-hidden-size)", model.ffn_hidden_size),
    ):
        if number is not None and number % sizes.tensor:
            why = f"the model has {number} {what}, and {number} / {sizes.tensor} is no whole number"
            yield Problem(_TENSOR, sizes.tensor, why, f"give a divisor of {number}")
            return


def stages_divide_layers(facts: Facts) -> Iterator[Problem]:
    sizes, perf, layers = _sizes(facts), facts.config.perf, facts.config.model.num_layers
    if sizes is None or layers is None or sizes.pipeline == 1:
        return
    ends = [perf.decoder_first_pipeline_num_layers, perf.decoder_last_pipeline_num_layers]
    fixed = [n for n in ends if n is not None]
    middle, rest = sizes.pipeline - len(fixed), layers - sum(fixed)
    text = f"{layers} layers" + "".join(f" - {n}" for n in fixed)
    if rest < middle or (middle and rest % middle) or (not middle and rest):
        why = f"{text} = {rest} do not divide over {middle} pipeline ranks"
        if not fixed:
            why = f"{layers} layers do not divide over {sizes.pipeline} pipeline ranks"
        fix = f"give a divisor of {layers}" if not fixed else "give other numbers of layers at the ends"
        if not fixed:
            fix += ", or set --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers"
        yield Problem(_PIPELINE, sizes.pipeline, why, fix)
        return
    if perf.num_virtual_stages_per_pipeline_rank is None:
        return
    for each in {*fixed, rest // middle if middle else rest}:
        if each % sizes.virtual:
            why = f"a pipeline rank has {each} layers, and {each} / {sizes.virtual} pieces is no whole number"
            yield Problem("--num-virtual-stages-per-pipeline-rank", sizes.virtual, why, f"give a divisor of {each}")
            return


def expert_ranks_divide_experts(facts: Facts) -> Iterator[Problem]:
    sizes, model = _sizes(facts), facts.config.model
    if sizes is None or min(sizes.expert, sizes.expert_tensor) < 1:
        return
    if sizes.expert > 1 and (model.num_experts is None or model.num_experts % sizes.expert):
        why = "the model has no experts"
        if model.num_experts is not None:
            why = f"the model has {model.num_experts} experts, and {model.num_experts} / {sizes.expert} is no whole number"
        fix = f"give a divisor of {model.num_experts}" if model.num_experts is not None else "leave it out"
        yield Problem("--expert-model-parallel-size", sizes.expert, why, fix)
        return
    ranks = trainer_world_size(facts.config) // sizes.pipeline
    if (each := sizes.expert * sizes.expert_tensor) > 1 and ranks % each:
        why = f"{ranks} ranks hold the same layers, and expert tensor {sizes.expert_tensor} x expert {sizes.expert} = {each}"
        yield Problem("--expert-model-parallel-size", sizes.expert, why, f"give sizes whose product divides {ranks}")


def experts_of_tensor_ranks_need_sequences(facts: Facts) -> Iterator[Problem]:
    sizes = _sizes(facts)
    if (
        facts.config.model.num_experts is not None
        and sizes is not None
        and sizes.tensor > 1
        and not sizes.sequence_parallel
    ):
        why = "tensor-parallel ranks would send the same tokens to the experts"
        yield Problem(_TENSOR, sizes.tensor, why, "add --sequence-parallel")


def dispatcher_knows_sizes_that_differ(facts: Facts) -> Iterator[Problem]:
    model, sizes = facts.config.model, _sizes(facts)
    if model.num_experts is None or sizes is None or model.moe_token_dispatcher_type != "allgather":
        return
    reason = None
    if sizes.pipeline > 1:
        reason = "pipeline stages send micro-batches that differ in tokens"
    elif sizes.expert * sizes.expert_tensor > sizes.tensor * sizes.context:
        reason = "ranks that share the experts have other rows, hence other numbers of tokens"
    if reason is not None:
        why = f"{reason}, and it gathers equal ones alone"
        yield Problem("--moe-token-dispatcher-type", "allgather", why, "use alltoall")


def virtual_stages_are_said_once(facts: Facts) -> Iterator[Problem]:
    perf, model = facts.config.perf, facts.config.model
    each = perf.num_layers_per_virtual_pipeline_stage
    if each is None or _sizes(facts) is None:
        return
    if perf.num_virtual_stages_per_pipeline_rank is not None:
        why = f"--num-virtual-stages-per-pipeline-rank {perf.num_virtual_stages_per_pipeline_rank} says it too"
        yield Problem("--num-layers-per-virtual-pipeline-stage", each, why, "give one of the two")
    elif perf.decoder_first_pipeline_num_layers is not None or perf.decoder_last_pipeline_num_layers is not None:
        why = "with ends of their own size the pieces differ"
        fix = "use --num-virtual-stages-per-pipeline-rank"
        yield Problem("--num-layers-per-virtual-pipeline-stage", each, why, fix)
    elif model.num_layers is not None and perf.pipeline_model_parallel_size > 1:
        own = model.num_layers // perf.pipeline_model_parallel_size
        if virtual_stages(perf, model) * each != own:
            why = f"a pipeline rank has {model.num_layers} / {perf.pipeline_model_parallel_size} = {own} layers"
            yield Problem("--num-layers-per-virtual-pipeline-stage", each, why, f"give a divisor of {own}")


def pipeline_flags_need_pipeline(facts: Facts) -> Iterator[Problem]:
    yield from needs(
        facts,
        (
            *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
            *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
        ),
        unless=facts.config.perf.pipeline_model_parallel_size > 1,
        why="there is no pipeline",
        fix=f"add {_PIPELINE} N, or leave it out",
    )


def recomputation_is_asked_for(facts: Facts) -> Iterator[Problem]:
    yield from needs(
        facts,
        ("recompute_method", "recompute_num_layers"),
        unless=facts.config.perf.recompute_granularity is not None,
        why="nothing is computed again",
        fix="add --recompute-granularity full, or leave it out",
    )


def recomputed_layers_are_there(facts: Facts) -> Iterator[Problem]:
    perf, sizes, layers = facts.config.perf, _sizes(facts), facts.config.model.num_layers
    if perf.recompute_num_layers is None or perf.recompute_granularity is None or layers is None or sizes is None:
        return
    if perf.recompute_num_layers > (own := layers // sizes.pipeline):
        why = f"a pipeline rank has {layers} / {sizes.pipeline} = {own} layers"
        yield Problem("--recompute-num-layers", perf.recompute_num_layers, why, f"give at most {own}")


def overlap_needs_parts(facts: Facts) -> Iterator[Problem]:
    perf = facts.config.perf
    if perf.overlap_param_gather and not (perf.use_distributed_optimizer and perf.overlap_grad_reduce):
        why = "weights are gathered only where --use-distributed-optimizer shares them, and in step with --overlap-grad-reduce"
        yield Problem("--overlap-param-gather", None, why, "add both, or leave it out")


def distributed_optimizer_is_adam(facts: Facts) -> Iterator[Problem]:
    config = facts.config
    if config.perf.use_distributed_optimizer and config.optimizer.optimizer != "adam":
        why = f"megatron shares the state of Adam, not of {config.optimizer.optimizer}"
        yield Problem("--use-distributed-optimizer", None, why, "use --optimizer adam, or leave it out")


def teacher_is_whole(facts: Facts) -> Iterator[Problem]:
    sizes = _sizes(facts)
    if facts.config.ckpt.teacher_load is not None and sizes is not None and sizes.ranks_per_replica > 1:
        why = f"the teacher is whole on each rank, and a student shared by {sizes.ranks_per_replica} ranks has not its rows"
        fix = "leave tensor, pipeline and context parallelism out, or take --teacher-urls"
        yield Problem("--teacher-load", facts.config.ckpt.teacher_load, why, fix)


PARALLEL_RULES: tuple[Rule, ...] = (
    ranks_divide_into_replicas,
    tensor_ranks_divide_layers,
    stages_divide_layers,
    expert_ranks_divide_experts,
    experts_of_tensor_ranks_need_sequences,
    dispatcher_knows_sizes_that_differ,
    virtual_stages_are_said_once,
    pipeline_flags_need_pipeline,
    recomputation_is_asked_for,
    recomputed_layers_are_there,
    overlap_needs_parts,
    distributed_optimizer_is_adam,
    teacher_is_whole,
)
