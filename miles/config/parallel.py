"""How trainer ranks share the work: sizes of each dimension, and which rank has which rows. Arithmetic alone, no torch.

    world size = tensor x context x data x pipeline, in this order from the fastest-changing rank to the slowest

Ranks of one replica (tensor, context and pipeline) are handed the same rows; replicas are handed different ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from .groups import Config, ModelArgs, PerfArgs


@dataclass(frozen=True)
class ParallelSizes:
    """How many ranks share one model replica, by dimension. Data parallelism is what the world size leaves."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    """Ranks that share the experts; taken from those of `tensor`, `context` and data parallelism."""
    expert_tensor: int = 1
    """Ranks that share one expert."""
    virtual: int = 1
    """Pieces of the model on each pipeline rank: above 1 the schedule is interleaved."""
    sequence_parallel: bool = False

    @property
    def ranks_per_replica(self) -> int:
        return self.tensor * self.pipeline * self.context

    def data_size(self, world_size: int) -> int:
        """Replicas. Raises ValueError where the world does not divide into them."""
        if world_size % self.ranks_per_replica:
            raise ValueError(
                f"world size, got {world_size}: a replica of tensor {self.tensor} x pipeline {self.pipeline} x context "
                f"{self.context} takes {self.ranks_per_replica} ranks; give a multiple of that"
            )
        return world_size // self.ranks_per_replica

    def data_rank(self, rank: int, world_size: int) -> int:
        """The replica of a rank, hence the shard of the batch that it is handed."""
        return rank // (self.tensor * self.context) % self.data_size(world_size)

    @property
    def micro_batch_multiple(self) -> int:
        """The interleaved schedule goes round the pipeline in whole rounds of micro-batches."""
        return self.pipeline if self.virtual > 1 else 1

    @property
    def least_micro_batches(self) -> int:
        """With one round alone its first ranks have no backward pass among their forward ones, and would wait for each other."""
        return 2 * self.pipeline if self.virtual > 1 else 1


def parallel_sizes(config: Config) -> ParallelSizes:
    """As the flags say."""
    perf = config.perf
    return ParallelSizes(
        tensor=perf.tensor_model_parallel_size,
        pipeline=perf.pipeline_model_parallel_size,
        context=perf.context_parallel_size,
        expert=perf.expert_model_parallel_size,
        expert_tensor=perf.expert_tensor_parallel_size,
        virtual=virtual_stages(perf, config.model),
        # Sequences are shared by the ranks that share a layer: by one rank alone there is nothing to share.
        sequence_parallel=perf.sequence_parallel and perf.tensor_model_parallel_size > 1,
    )


def virtual_stages(perf: PerfArgs, model: ModelArgs) -> int:
    """Pieces of the model on each pipeline rank, from either flag that says so."""
    if perf.num_virtual_stages_per_pipeline_rank is not None:
        return perf.num_virtual_stages_per_pipeline_rank
    each = perf.num_layers_per_virtual_pipeline_stage
    if each is None or model.num_layers is None or perf.pipeline_model_parallel_size == 1:
        return 1
    return max(1, model.num_layers // perf.pipeline_model_parallel_size // each)
