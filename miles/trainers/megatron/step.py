"""Forward and backward passes through megatron's schedules, whatever the pipeline.

MicroBatch -> PolicyModel -> hidden [T, 1, H] -> (last stage) token scores [R] -> policy loss -> backward
                                                                          '-> scores alone (score)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from miles.algo import Metric, merge_metrics
from miles.algo.metrics import own_mean
from miles.trainers.losses import Loss
from miles.types import LossInputs, LossOutputs

from . import cpu
from .coarse import TopTokens, coarse_divergence
from .context import whole
from .logprobs import TokenScores, Vocabulary, is_first_choice, token_scores
from .model import PolicyModel
from .moe import set_step_tokens
from .packing import MicroBatch
from .parallel import Parallel
from .pipeline import StageLinks
from .teacher import Teacher
from .whole_step import WholeStep, baseline_of, coupled_outputs, slopes_of

T = TypeVar("T")


@dataclass(frozen=True)
class KnownLogProbs:
    """What was computed before the first step, [response tokens of the batch]; None where the step makes its own."""

    old: Tensor | None = None
    reference: Tensor | None = None
    advantages: Tensor | None = None
    """None: those of the rows."""
    policy_mask: Tensor | None = None
    """Tokens that the policy loss counts; None: all."""
    values: Tensor | None = None
    """Of the critic, where there is one."""
    returns: Tensor | None = None
    """What the critic learns."""


@dataclass(frozen=True)
class Mismatched:
    """Prompts with the responses of other prompts, of one optimizer step: KTO compares with them."""

    micro_batches: Sequence[MicroBatch]
    known: KnownLogProbs


class Passes:
    """Runs micro-batches through the model. Every rank calls the same method with equally many micro-batches."""

    def __init__(
        self,
        model: Sequence[DistributedDataParallel],
        parallel: Parallel,
        *,
        vocab_size: int,
        chunk_tokens: int,
        loss: Loss,
        teacher: Teacher | None = None,
        use_rollout_logprobs: bool,
    ):
        self._model, self._parallel = model, parallel
        self._policy: PolicyModel = model[-1].module
        self._chunk_tokens, self._loss, self._teacher = chunk_tokens, loss, teacher
        self._use_rollout_logprobs = use_rollout_logprobs
        self._vocab_size, self._vocabulary = vocab_size, self._my_vocabulary(vocab_size)
        self.seen: Tensor | None = None
        """[response tokens of the batch]: where it is set, optimizer steps put the log-probs there that they compute."""

    @torch.no_grad()
    def score(self, micro_batches: Sequence[MicroBatch], num_tokens: int) -> TokenScores:
        """Log-probs and entropies of all response tokens, in the batch's order: [num_tokens] each, on every rank of the replica.

        Zeros where no micro-batch has the token.
        """
        device = self._parallel.device
        found = TokenScores(*torch.zeros(2, num_tokens, device=device))

        def collect(batch: MicroBatch, hidden: Tensor, *, non_loss_data: bool) -> None:
            scores = self._scores(batch, hidden)
            found.log_probs[batch.slots] = scores.log_probs
            found.entropies[batch.slots] = scores.entropies

        self._run(micro_batches, collect, forward_only=True)
        return TokenScores(*self._parallel.tensor_from_last_stage(torch.stack(found)))

    def _before_step(
        self, micro_batches: Sequence[MicroBatch], known: KnownLogProbs, mismatched: Mismatched | None
    ) -> WholeStep:
        """What the loss needs to know of the whole optimizer step; `mismatched` where it has a baseline."""
        if self._loss.coupled is not None:
            pairs = self._of_inputs(micro_batches, known, self._loss.coupled.pairs)
            if not self._parallel.is_last_stage:
                return WholeStep()
            return slopes_of(self._loss.coupled, micro_batches, pairs, self._parallel)
        if self._loss.baseline_rows is not None:
            assert mismatched is not None, "the batch of a loss with a baseline has them"
            rows = self._of_inputs(mismatched.micro_batches, mismatched.known, self._loss.baseline_rows)
            if not self._parallel.is_last_stage:
                return WholeStep()
            return baseline_of(rows, self._parallel)
        return WholeStep()

    @torch.no_grad()
    def _of_inputs(
        self, micro_batches: Sequence[MicroBatch], known: KnownLogProbs, function: Callable[[LossInputs], T]
    ) -> list[T]:
        """`function` of each micro-batch's loss inputs, without a gradient."""

        def collect(batch: MicroBatch, hidden: Tensor, *, non_loss_data: bool) -> T:
            return function(self._loss_inputs(batch, hidden, known, keep=False))

        return self._run(micro_batches, collect, forward_only=True)

    def loss_and_gradients(
        self, micro_batches: Sequence[MicroBatch], known: KnownLogProbs, mismatched: Mismatched | None = None
    ) -> dict[str, Metric]:
        """Adds the gradients of one optimizer step into the model's buffers, summed over ranks; returns this rank's metrics.

        `loss` is among them, of kind `sum`: this rank's part of the step's loss. Empty on all but the last stage.
        """
        step = self._before_step(micro_batches, known, mismatched)

        def loss(batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Metric]]:
            outputs, value = self._outputs(batch, hidden, known, step)
            metrics = {**outputs.metrics, "loss": ("sum", value)}
            # Megatron would divide by this count; our denominators are in the weights already.
            return outputs.loss, torch.zeros((), dtype=torch.int), metrics

        return functools.reduce(merge_metrics, self._run(micro_batches, loss, forward_only=False), {})

    @torch.no_grad()
    def evaluate(
        self, micro_batches: Sequence[MicroBatch], known: KnownLogProbs, mismatched: Mismatched | None = None
    ) -> dict[str, Metric]:
        """What `loss_and_gradients` returns, and `token_accuracy`: the share of trained tokens that the model would choose.

        Not of preferences, half of whose tokens it should not choose.
        """
        step = self._before_step(micro_batches, known, mismatched)

        def loss(batch: MicroBatch, hidden: Tensor, *, non_loss_data: bool) -> dict[str, Metric]:
            outputs, value = self._outputs(batch, hidden, known, step)
            metrics: dict[str, Metric] = {**outputs.metrics, "loss": ("sum", value)}
            if batch.preferences is not None:
                return metrics
            right = self._is_first_choice(batch, hidden)
            mask, weights = batch.loss_mask, batch.token_weights
            return {
                **metrics,
                **own_mean("token_accuracy", right.float(), mask, weights),
            }

        return functools.reduce(merge_metrics, self._run(micro_batches, loss, forward_only=True), {})

    def _run(self, micro_batches: Sequence[MicroBatch], finish: Callable[..., Any], *, forward_only: bool) -> list[Any]:
        return run_micro_batches(self._model, self._parallel, micro_batches, finish, forward_only=forward_only)

    def _outputs(
        self, batch: MicroBatch, hidden: Tensor, known: KnownLogProbs, step: WholeStep
    ) -> tuple[LossOutputs, Tensor]:
        """Of one micro-batch: the loss to go back from, with its metrics, and its value, detached."""
        inputs = self._loss_inputs(batch, hidden, known)
        if self._loss.coupled is not None:
            return coupled_outputs(self._loss.coupled, inputs, batch, step)
        if step.kl_baseline is not None:
            inputs = dataclasses.replace(inputs, kl_baseline=step.kl_baseline)
        outputs = self._loss.function(inputs)
        return outputs, outputs.loss.detach()

    def _scores(self, batch: MicroBatch, hidden: Tensor) -> TokenScores:
        """hidden [T, 1, H] (or this rank's piece of T, with sequence parallelism) -> scores [R]."""
        scores = token_scores(
            self._predicting(batch, hidden),
            self._policy.head_weight,
            batch.own_of(batch.targets),
            batch.own_of(batch.temperatures),
            self._vocabulary,
            self._chunk_tokens,
        )
        return TokenScores(*(self._whole(batch, each) for each in scores))

    def _whole(self, batch: MicroBatch, own: Tensor) -> Tensor:
        """[R] from those of the tokens that this rank predicts."""
        return whole(own, batch.own, len(batch.targets), self._parallel.groups.cp)

    def _divergence(self, batch: MicroBatch, hidden: Tensor) -> Tensor | None:
        """[R] of the teacher's distributions and ours, with gradient; None where the loss does not want it."""
        wanted = self._loss.divergence
        if wanted is None:
            return None
        student = self._predicting(batch, hidden)
        if batch.teacher_top is not None:
            found = coarse_divergence(
                student,
                self._policy.head_weight,
                TopTokens(batch.own_of(batch.teacher_top.ids), batch.own_of(batch.teacher_top.log_probs)),
                self._vocabulary,
                vocab_size=self._vocab_size,
                beta=wanted.beta,
                chunk_tokens=self._chunk_tokens,
            )
            return self._whole(batch, found)
        assert self._teacher is not None, "checked at launch"
        return self._teacher.divergence(
            batch, student, self._policy.head_weight, beta=wanted.beta, temperature=wanted.temperature
        )

    def _is_first_choice(self, batch: MicroBatch, hidden: Tensor) -> Tensor:
        """[R] bool: no token has a higher probability than the target. No gradient."""
        right = is_first_choice(
            self._predicting(batch, hidden),
            self._policy.head_weight,
            batch.own_of(batch.targets),
            self._vocabulary,
            self._chunk_tokens,
        )
        return self._whole(batch, right.float()) > 0

    def _predicting(self, batch: MicroBatch, hidden: Tensor) -> Tensor:
        """[R, H], or of `batch.own`: the hidden states whose logits predict the response tokens."""
        tp = self._parallel.groups.tp
        if self._parallel.sizes.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=tp)
        elif tp.size() > 1:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=tp)
        return hidden.squeeze(1).index_select(0, batch.predictors)

    def _loss_inputs(self, batch: MicroBatch, hidden: Tensor, known: KnownLogProbs, *, keep: bool = True) -> LossInputs:
        """keep: puts the log-probs into `seen`, where that is set."""
        scores = self._scores(batch, hidden)
        now = scores.log_probs.detach()
        if keep and self.seen is not None:
            self.seen[batch.slots] = now.to(self.seen.dtype)
        if self._use_rollout_logprobs:
            assert batch.rollout_log_probs is not None, "checked when the batch arrived"
            old, train = batch.rollout_log_probs, now
        else:
            # With one update per rollout the old policy is this one, so the ratio is exactly 1.
            old, train = now if known.old is None else known.old[batch.slots], None
        preferences = batch.preferences
        return LossInputs(
            log_probs=scores.log_probs,
            old_log_probs=old,
            advantages=batch.advantages if known.advantages is None else known.advantages[batch.slots],
            loss_mask=batch.loss_mask,
            token_weight=batch.token_weights,
            row=batch.row,
            num_rows=batch.num_rows,
            total_lengths=batch.total_lengths,
            ref_log_probs=None if known.reference is None else known.reference[batch.slots],
            rollout_log_probs=batch.rollout_log_probs,
            train_log_probs=train,
            entropy=scores.entropies,
            policy_mask=None if known.policy_mask is None else known.policy_mask[batch.slots],
            row_weight=batch.row_weights,
            desirable=None if preferences is None else preferences.desirable,
            chosen_rows=None if preferences is None else preferences.chosen_rows,
            rejected_rows=None if preferences is None else preferences.rejected_rows,
            margin=None if preferences is None else preferences.margin,
            divergence=self._divergence(batch, hidden),
            own_answer=batch.own_answer,
            channel=batch.channel,
            channels=batch.channels,
        )

    def _my_vocabulary(self, vocab_size: int) -> Vocabulary:
        tp = self._parallel.groups.tp
        if not self._policy.post_process:
            return Vocabulary()
        shard = self._policy.head_weight.shape[0]
        start = tp.rank() * shard
        return Vocabulary(start=start, rows=min(max(vocab_size - start, 0), shard), group=tp)


def run_micro_batches(
    model: Sequence[DistributedDataParallel],
    parallel: Parallel,
    micro_batches: Sequence[MicroBatch],
    finish: Callable[..., Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """Each micro-batch through `model` and then, with its hidden states, through `finish`, as megatron's schedules call it.

    Returns what `finish` has to say on the last pipeline stage, in order; nothing elsewhere.
    """

    def forward(batches: Iterator[MicroBatch], model: DistributedDataParallel) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches)
        hidden = model(batch.tokens, batch.sequences.positions[None], None, packed_seq_params=batch.sequences)
        return hidden, functools.partial(finish, batch)

    # An interleaved pipeline takes each micro-batch once through every piece of the model.
    iterators = [iter(micro_batches) for _ in model]
    links: dict[str, Any] = {}
    if parallel.sizes.pipeline > 1:
        communicator = StageLinks(parallel.groups.pp, model[0].config)
        links = {"p2p_communicator": communicator, "pg_collection": parallel.groups}
    with cpu.cuda_means_cpu():
        if not forward_only:
            set_step_tokens(model[0].module.config, (batch.tokens.shape[1] for batch in micro_batches))
        stored: list[Any] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=list(model) if len(model) > 1 else model[0],
            num_microbatches=len(micro_batches),
            seq_length=max(batch.tokens.shape[1] for batch in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            **links,
        )
    return stored
