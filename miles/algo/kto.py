"""KTO: responses that are good or bad by themselves, without pairs. arXiv 2402.01306.

    rows [B] --log(policy / reference)--> compared with the step's baseline --> loss of each row

Legend: `B` rows, `L` log(policy / reference) of a response, `z` the baseline.
"""

from __future__ import annotations

import dataclasses

import torch

from miles.interfaces import Reduce
from miles.types import LossInputs, LossOutputs

from .metrics import OWN_WEIGHT
from .preference_spec import PreferenceSpec
from .reductions import identity, masked, masked_mean
from .sequences import Rows, mean_metric, rows_of, weight_metric, weighted_sum
from .terms import required


def kto_baseline(log_ratios: torch.Tensor, counted: torch.Tensor, reduce: Reduce = identity) -> torch.Tensor:
    """`z = max(0, mean of L over mismatched rows)`: an estimate of KL(policy || reference), a constant in the loss. Scalar.

    log_ratios [B]: of prompts with the response of another prompt. counted [B] bool. `reduce` sums over the ranks that hold
    the other rows of the optimizer step; every rank calls it, so that the split cannot change the loss.
    """
    return masked_mean(log_ratios.detach(), counted, reduce).clamp(min=0)


def kto_rows(inputs: LossInputs, spec: PreferenceSpec) -> Rows:
    """What the loss and its baseline compare of each row: sums over its tokens, or means with `average_log_prob`."""
    return _compared(rows_of(inputs, with_reference=not spec.reference_free), spec)


def _compared(rows: Rows, spec: PreferenceSpec) -> Rows:
    if not spec.average_log_prob:
        return rows
    return dataclasses.replace(
        rows, log_probs=rows.log_probs / rows.tokens, ref_log_probs=rows.ref_log_probs / rows.tokens
    )


def kto(inputs: LossInputs, spec: PreferenceSpec) -> LossOutputs:
    """`sum_b w_b * lambda * (1 - sig(beta (L - z)))` where desirable, `(1 - sig(beta (z - L)))` where not.

    `lambda` is `desirable_weight` or `undesirable_weight`. Metrics: `reward_chosen`, `reward_rejected` (beta L of either
    kind, each over its own rows), `logp_chosen`, `logp_rejected`, `kto_baseline`.
    """
    desirable = required(inputs.desirable, "desirable", "kto")
    baseline = required(inputs.kl_baseline, "kl_baseline", "kto").detach()
    rows = rows_of(inputs, with_reference=not spec.reference_free)
    compared = _compared(rows, spec)
    ratio = compared.log_probs - compared.ref_log_probs
    gain = torch.where(desirable, ratio - baseline, baseline - ratio)
    scale = torch.where(desirable, spec.desirable_weight, spec.undesirable_weight)
    values = scale * (1 - (spec.beta * gain).sigmoid())

    weight = rows.weight
    metrics = {"kto_baseline": mean_metric(baseline.expand_as(weight), weight), **weight_metric(weight)}
    for name, mine in (("chosen", desirable), ("rejected", ~desirable)):
        # Each kind is a mean over its own rows: the share of labels must not move it.
        own = masked(weight, mine)
        metrics |= {
            f"reward_{name}": mean_metric(spec.beta * ratio, own),
            f"logp_{name}": mean_metric(rows.log_probs, own),
            f"reward_{name}{OWN_WEIGHT}": ("sum", own.sum()),
            f"logp_{name}{OWN_WEIGHT}": ("sum", own.sum()),
        }
    return LossOutputs(weighted_sum(values, weight), metrics)
