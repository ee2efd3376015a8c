"""What a preference loss has to know of its optimizer step beyond the micro-batch that it is computed on.

    mismatched rows --scored, no gradient--> sums over ranks --> KTO's baseline
    pairs of all micro-batches and ranks --scored, no gradient--> loss of the step --> its slope at each pair

Found before the step's first backward pass, from passes without a gradient. All ranks take part, also those without rows, and
get what belongs to the whole step, so that neither the split into micro-batches nor that over ranks can change the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from miles.algo.kto import kto_baseline
from miles.algo.preference import along_slopes
from miles.algo.sequences import Pairs, Rows
from miles.trainers.losses import Coupled
from miles.types import LossInputs, LossOutputs

from .packing import MicroBatch
from .parallel import Parallel

_COLUMNS = tuple(column.name for column in dataclasses.fields(Pairs))


@dataclass(frozen=True)
class WholeStep:
    """Empty for a loss that needs nothing of the kind."""

    kl_baseline: Tensor | None = None
    """[], of the step."""
    loss: Tensor | None = None
    """[], of the step, of a coupled loss."""
    total_weight: Tensor | None = None
    """[], of its pairs."""
    slopes: Mapping[int, Pairs] = field(default_factory=dict)
    """`id` of a micro-batch -> slopes of the loss at its pairs."""


def baseline_of(rows: Sequence[Rows], parallel: Parallel) -> WholeStep:
    """KTO's, of this rank's mismatched rows of the step, with sums over all ranks."""
    weights = torch.cat([of_batch.weight for of_batch in rows])
    ratios = torch.cat([of_batch.log_probs - of_batch.ref_log_probs for of_batch in rows])
    return WholeStep(kl_baseline=kto_baseline(ratios, weights != 0, parallel.sum_over_data))


def slopes_of(
    coupled: Coupled, micro_batches: Sequence[MicroBatch], pairs: Sequence[Pairs], parallel: Parallel
) -> WholeStep:
    """The loss of a step and its slopes. `pairs[m]`: those of this rank's micro-batch `m`, without a gradient."""
    own = torch.stack([torch.cat([getattr(of_batch, name) for of_batch in pairs]) for name in _COLUMNS])
    counts = torch.zeros(parallel.data_size, dtype=torch.int64, device=own.device)
    counts[parallel.data_rank] = own.shape[1]
    counts = parallel.sum_over_data(counts)
    first = int(counts[: parallel.data_rank].sum())
    # Every rank fills its part of a table of zeros: the sum is the table of all ranks.
    table = own.new_zeros(len(_COLUMNS), int(counts.sum()))
    table[:, first : first + own.shape[1]] = own
    table = parallel.sum_over_data(table)
    outputs, slopes = coupled.slopes(Pairs(*table))
    mine = torch.stack([getattr(slopes, name) for name in _COLUMNS])[:, first : first + own.shape[1]]
    parts = mine.split([len(of_batch.weight) for of_batch in pairs], dim=1)
    return WholeStep(
        loss=outputs.loss,
        total_weight=table[_COLUMNS.index("weight")].sum(),
        slopes={id(batch): Pairs(*part) for batch, part in zip(micro_batches, parts, strict=True)},
    )


def coupled_outputs(
    coupled: Coupled, inputs: LossInputs, batch: MicroBatch, step: WholeStep
) -> tuple[LossOutputs, Tensor]:
    """Outputs whose loss has the gradient of this micro-batch's part, and that part of the step's loss by its weight."""
    assert step.loss is not None
    assert step.total_weight is not None
    pairs = coupled.pairs(inputs)
    with torch.no_grad():
        metrics = coupled.metrics(pairs).metrics
    share = pairs.weight.sum() / step.total_weight.clamp(min=torch.finfo(pairs.weight.dtype).tiny)
    return LossOutputs(along_slopes(pairs, step.slopes[id(batch)]), metrics), step.loss * share
