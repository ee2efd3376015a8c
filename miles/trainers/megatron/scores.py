"""Passes of a model with a head of one number: values of tokens for a critic, scores of rows for a reward model.

MicroBatch -> ScalarModel -> hidden [T, 1, H] -> values [R] before each response token     (ValuePasses)
                                             '-> scores [B] at each row's last token -> loss -> backward     (ScorePasses)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from miles.algo import Metric, critic_loss, merge_metrics
from miles.trainers.losses import Loss
from miles.types import LossInputs, LossOutputs

from .context import whole
from .logprobs import TokenScores
from .model import ScalarModel
from .packing import MicroBatch
from .parallel import Parallel
from .step import run_micro_batches


class ValuePasses:
    """Runs micro-batches through a critic. Every rank calls the same method with equally many micro-batches."""

    def __init__(self, model: Sequence[DistributedDataParallel], parallel: Parallel):
        self._model, self._parallel = model, parallel

    @torch.no_grad()
    def score(self, micro_batches: Sequence[MicroBatch], num_tokens: int) -> Tensor:
        """Values of all response tokens, in the batch's order: [num_tokens]. Zeros where no micro-batch has the token."""
        found = torch.zeros(num_tokens, device=self._parallel.device)

        def collect(batch: MicroBatch, hidden: Tensor, *, non_loss_data: bool) -> None:
            found[batch.slots] = self._values(batch, hidden)

        run_micro_batches(self._model, self._parallel, micro_batches, collect, forward_only=True)
        return self._parallel.tensor_from_last_stage(found)

    def _values(self, batch: MicroBatch, hidden: Tensor) -> Tensor:
        """[R]"""
        own = head_values(self._model[-1].module, self._parallel, hidden, batch.predictors)
        return whole(own, batch.own, len(batch.targets), self._parallel.groups.cp)

    def loss_and_gradients(
        self, micro_batches: Sequence[MicroBatch], old_values: Tensor, returns: Tensor, *, clip: float | None
    ) -> dict[str, Metric]:
        """Adds the gradients of one optimizer step into the model's buffers; returns this rank's metrics, see `critic_loss`.

        old_values, returns: [response tokens of the batch].
        """

        def loss(batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Metric]]:
            outputs = critic_loss(
                self._values(batch, hidden),
                old_values[batch.slots],
                returns[batch.slots],
                batch.loss_mask,
                batch.token_weights,
                clip=clip,
            )
            # Megatron would divide by this count; our denominators are in the weights already.
            return outputs.loss, torch.zeros((), dtype=torch.int), outputs.metrics

        return functools.reduce(
            merge_metrics, run_micro_batches(self._model, self._parallel, micro_batches, loss, forward_only=False), {}
        )


class ScorePasses:
    """Runs micro-batches through a reward model, as `Passes` runs them through a policy. Their rows have `with_last_inputs`."""

    def __init__(self, model: Sequence[DistributedDataParallel], parallel: Parallel, loss: Loss):
        self._model, self._parallel, self._loss = model, parallel, loss
        self.seen: Tensor | None = None
        """Set by the trainer and never filled: there are no log-probs."""

    def score(self, micro_batches: Sequence[MicroBatch], num_tokens: int) -> TokenScores:
        raise TypeError("a reward model has no log-probs")

    def loss_and_gradients(self, micro_batches: Sequence[MicroBatch], *_: Any) -> dict[str, Metric]:
        """Adds the gradients of one optimizer step into the model's buffers; returns this rank's metrics, `loss` among them."""

        def loss(batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Metric]]:
            outputs = self._outputs(batch, hidden)
            # Megatron would divide by this count; our denominators are in the weights already.
            return outputs.loss, torch.zeros((), dtype=torch.int), outputs.metrics

        return functools.reduce(
            merge_metrics, run_micro_batches(self._model, self._parallel, micro_batches, loss, forward_only=False), {}
        )

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch], *_: Any) -> dict[str, Metric]:
        """The same metrics, without a gradient."""

        def loss(batch: MicroBatch, hidden: Tensor, *, non_loss_data: bool) -> dict[str, Metric]:
            return self._outputs(batch, hidden).metrics

        return functools.reduce(
            merge_metrics, run_micro_batches(self._model, self._parallel, micro_batches, loss, forward_only=True), {}
        )

    def _outputs(self, batch: MicroBatch, hidden: Tensor) -> LossOutputs:
        preferences = batch.preferences
        assert preferences is not None, "a reward model is trained on pairs"
        ends = torch.bincount(batch.row, minlength=batch.num_rows).cumsum(0) - 1
        none = torch.zeros_like(batch.token_weights)
        values = head_values(self._model[-1].module, self._parallel, hidden, batch.predictors)
        inputs = LossInputs(
            log_probs=none,
            old_log_probs=none,
            advantages=none,
            loss_mask=batch.loss_mask,
            token_weight=batch.token_weights,
            row=batch.row,
            num_rows=batch.num_rows,
            scores=whole(values, batch.own, len(batch.targets), self._parallel.groups.cp).index_select(0, ends),
            row_weight=batch.row_weights,
            chosen_rows=preferences.chosen_rows,
            rejected_rows=preferences.rejected_rows,
            margin=preferences.margin,
        )
        outputs = self._loss.function(inputs)
        return LossOutputs(outputs.loss, {**outputs.metrics, "loss": ("sum", outputs.loss.detach())})


def head_values(model: ScalarModel, parallel: Parallel, hidden: Tensor, at: Tensor) -> Tensor:
    """hidden [T, 1, H] (or this rank's piece of T, with sequence parallelism) -> the head at the inputs `at`: [len(at)].

    The head is whole on every tensor-parallel rank, so what flows back is the same on all of them: nothing is summed.
    """
    if parallel.sizes.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=parallel.groups.tp
        )
    return model.values(hidden.squeeze(1).index_select(0, at))
