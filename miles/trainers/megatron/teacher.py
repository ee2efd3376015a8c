"""The teacher of distillation: a second model on the trainers' ranks, of any shape, that is never trained.

    micro-batch -> hidden states [R, H'] -> log-probs [R] (on-policy distillation)
                                         -> with the student's [R, H]: divergence [R] of whole distributions (GKD)

It is no second set of weights in the student's model, since teachers are larger as a rule; what it costs is the memory of its
parameters on each rank. Tables of a whole vocabulary exist for a chunk of tokens at a time, also in the backward pass.
Legend: `R` response tokens, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miles.algo.distillation import generalized_jsd
from miles.config.groups import Config, ModelArgs
from miles.config.hf import model_values
from miles.errors import CheckpointError

from . import cpu
from .hf_files import read_config
from .logprobs import Vocabulary, token_scores
from .model import build_model
from .model_weights import ModelWeights, name_map
from .packing import MicroBatch
from .parallel import Parallel


def teacher_config(config: Config, path: str) -> Config:
    """The run's configuration with the model of the HF directory `path`. Raises CheckpointError where vocabularies differ."""
    hf = read_config(path)
    values = {**model_values(hf, where=path), "make_vocab_size_divisible_by": config.model.make_vocab_size_divisible_by}
    if values["vocab_size"] != config.model.vocab_size:
        raise CheckpointError(
            f"--teacher-load, got {path} with {values['vocab_size']} tokens: the student has {config.model.vocab_size}, and their "
            "distributions are compared token by token; take a teacher with the same tokenizer"
        )
    ckpt = dataclasses.replace(config.ckpt, hf_checkpoint=path, model_name=None)
    return dataclasses.replace(config, model=ModelArgs(**values), ckpt=ckpt)


class Teacher:
    """Every rank has the whole of it, and calls each method for its own micro-batches: nothing here is a collective."""

    def __init__(self, config: Config, parallel: Parallel):
        path = config.ckpt.teacher_load
        assert path is not None, "checked at launch"
        own = teacher_config(config, path)
        with cpu.cuda_means_cpu():
            model = build_model(own, parallel)
        tied = not own.model.untie_embeddings_and_output_weights
        ModelWeights(model, name_map(own, parallel), parallel, tied=tied).load(path)
        [self._model] = model  # launch refuses pipelines
        self._model.requires_grad_(False)
        self._vocabulary = Vocabulary(rows=own.model.vocab_size)
        self._chunk_tokens, self._parallel = config.perf.log_probs_chunk_size, parallel

    @torch.no_grad()
    def _hidden(self, batch: MicroBatch) -> Tensor:
        """[R, H'] hidden states that predict the response tokens."""
        with cpu.cuda_means_cpu():
            hidden: Tensor = self._model(
                batch.tokens, batch.sequences.positions[None], None, packed_seq_params=batch.sequences
            )
        return hidden.squeeze(1).index_select(0, batch.predictors)

    @torch.no_grad()
    def log_probs(self, micro_batches: Sequence[MicroBatch], num_tokens: int) -> Tensor:
        """[num_tokens] log-probs of the response tokens at each row's temperature, in the batch's order."""
        found = torch.zeros(num_tokens, device=self._parallel.device)
        for batch in micro_batches:
            scores = token_scores(
                self._hidden(batch),
                self._model.head_weight,
                batch.targets,
                batch.temperatures,
                self._vocabulary,
                self._chunk_tokens,
            )
            found[batch.slots] = scores.log_probs
        return found

    def divergence(
        self, batch: MicroBatch, hidden: Tensor, weight: Tensor, *, beta: float, temperature: float
    ) -> Tensor:
        """[R] `generalized_jsd` of the student's distributions and ours, with the student's gradient.

        hidden: [R, H], weight: [padded V, H], of the student. temperature divides the logits of both.
        """
        return divergences(
            hidden,
            weight[: self._vocabulary.rows],
            self._hidden(batch),
            self._model.head_weight[: self._vocabulary.rows],
            beta=beta,
            temperature=temperature,
            chunk_tokens=self._chunk_tokens,
        )


def divergences(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float,
    temperature: float,
    chunk_tokens: int = -1,
) -> Tensor:
    """[R]. hidden [R, H], weight [V, H], teacher_hidden [R, H'], teacher_weight [V, H']. The last two have no gradient.

    `chunk_tokens`: tokens whose tables are live at once, -1 takes all; the backward pass makes them again.
    """

    def of_chunk(student: Tensor, student_weight: Tensor, teacher: Tensor) -> Tensor:
        ours = torch.log_softmax((student @ student_weight.t()).float() / temperature, dim=-1)
        theirs = torch.log_softmax((teacher @ teacher_weight.t()).float() / temperature, dim=-1)
        return generalized_jsd(ours, theirs, beta)

    chunk = max(len(hidden), 1) if chunk_tokens == -1 else chunk_tokens
    found = [
        checkpoint(of_chunk, student, weight, teacher, use_reentrant=False)
        for student, teacher in zip(hidden.split(chunk), teacher_hidden.split(chunk), strict=True)
    ]
    # Without a token there is still a graph: megatron goes back through every micro-batch.
    return torch.cat(found) if len(hidden) else (hidden.sum() + weight.sum() * 0).expand(0)
