"""Metrics of a loss: made per micro-batch, reduced over micro-batches and ranks, then finished into what is logged.

    policy_loss -> {name: (kind, tensor)} --trainer: sum | max over micro-batches and ranks--> finish_metrics -> {name: float}

Kinds: `mean` is a sum weighted by `token_weight`, divided at the end by the total weight of the tokens that were scored,
so it is a mean also where rows were skipped or the aggregation's weights do not sum to 1. `sum` is a plain total: counts,
and terms of the loss (for which skipped rows are exact zeros). `max` is the largest over all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

from .reductions import masked_max, masked_sum

Metric: TypeAlias = tuple[str, torch.Tensor]

#: Total token_weight of the scored tokens; the denominator of every `mean`.
TOTAL_WEIGHT = "total_weight"
#: Number of scored tokens: the population that every `mean` and `max` speaks of.
SCORED_TOKENS = "scored_tokens"
#: `<name>#weight` is the denominator of the mean `<name>` alone, where that is not TOTAL_WEIGHT.
OWN_WEIGHT = "#weight"
#: Sum of w and of w^2 over scored tokens, w = exp(trainer - engine log-prob); they become `ess`.
ESS_W = "ess_w"
ESS_W2 = "ess_w2"


def mean(values: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor) -> Metric:
    """`mean` of values [R] over mask [R], weighted by weight [R]. Detached."""
    return "mean", masked_sum(values.detach(), mask, weight)


def own_mean(name: str, values: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor) -> dict[str, Metric]:
    """`mean` with a denominator of its own, whatever the loss divides by."""
    return {name: mean(values, mask, weight), f"{name}{OWN_WEIGHT}": total(weight, mask)}


def total(values: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor | None = None) -> Metric:
    """`sum` of weight * values [R] over mask [R]. Detached."""
    return "sum", masked_sum(values.detach(), mask, weight)


def largest(values: torch.Tensor, mask: torch.Tensor) -> Metric:
    """`max` of values [R] >= 0 over mask [R]. Detached."""
    return "max", masked_max(values.detach(), mask)


def merge_metrics(left: Mapping[str, Metric], right: Mapping[str, Metric]) -> dict[str, Metric]:
    """Two micro-batches' metrics as one: `max` takes the larger, the others add. A name may be in one of them only."""
    merged = dict(left)
    for name, (kind, value) in right.items():
        if name in merged:
            other = merged[name][1]
            value = torch.maximum(other, value) if kind == "max" else other + value
        merged[name] = (kind, value)
    return merged


def finish_metrics(reduced: Mapping[str, tuple[str, torch.Tensor | float]]) -> dict[str, float]:
    """Metrics of one optimizer step, after reduction over all its micro-batches and ranks, as they are logged.

    Divides each `mean` by its own weight where it has one, else by the total weight, and replaces the pieces of the
    effective sample size by `ess = (sum w)^2 / (n * sum w^2)`, the share in (0, 1] of the tokens that importance weighting
    leaves. A step that scored nothing has no means: they are left out, since a 0 would be read as a value.
    """
    values = {name: float(value) for name, (_, value) in reduced.items()}
    finished = {}
    for name, (kind, _) in reduced.items():
        if name in (TOTAL_WEIGHT, ESS_W, ESS_W2) or name.endswith(OWN_WEIGHT):
            continue
        if kind != "mean":
            finished[name] = values[name]
        elif weight := values.get(name + OWN_WEIGHT, values.get(TOTAL_WEIGHT, 0.0)):
            finished[name] = values[name] / weight
    if ESS_W2 in values:
        denominator = values[ESS_W2] * values[SCORED_TOKENS]
        finished["ess"] = values[ESS_W] ** 2 / denominator if denominator else 1.0
    return finished
