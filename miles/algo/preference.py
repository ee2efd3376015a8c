"""Losses of pairs: DPO in all its forms, ORPO, SimPO, CPO, and reward models.

    Pairs [P] --scores: f(policy / reference)--> chosen, rejected [P] --pair loss, by name--> [P] --weights--> loss

A pair loss is a function under `@pair_losses.register(name)` of `(pairs, spec)`. All are sums over pairs but those in
`COUPLED`, whose value for a pair depends on the others: they must be given the whole step at once. `pair_slopes` and
`along_slopes` make that possible without holding more than one micro-batch's graph:

    pass 1, no gradient: Pairs of the whole step --pair_slopes--> d loss / d each log-prob
    pass 2, a micro-batch at a time: along_slopes(Pairs, slopes).backward()
Legend: `P` pairs, `s` log-prob of a response, `ref` its reference's, `d = (s_c - ref_c) - (s_r - ref_r)`, `e` label smoothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.nn.functional import logsigmoid, softplus

from miles.errors import ConfigError
from miles.types import LossInputs, LossOutputs

from .kl import LOG_RATIO_LIMIT
from .metrics import Metric
from .preference_spec import PreferenceSpec
from .reductions import masked
from .registry import Registry
from .sequences import Pairs, mean_metric, pairs_of, weight_metric, weighted_sum
from .terms import required

#: [P] log(policy / reference) -> [P] the score whose difference the losses look at.
FDivergence: TypeAlias = Callable[[torch.Tensor, PreferenceSpec], torch.Tensor]
f_divergences: Registry[FDivergence] = Registry("f-divergence")


@f_divergences.register("reverse_kl")
def reverse_kl(ratio: torch.Tensor, spec: PreferenceSpec) -> torch.Tensor:
    """`log u`: plain DPO. Of all: `f'(u)` up to a constant, `u = policy / reference`; arXiv 2309.16240."""
    return ratio


@f_divergences.register("forward_kl")
def forward_kl(ratio: torch.Tensor, spec: PreferenceSpec) -> torch.Tensor:
    """`-1 / u`."""
    return -_exp(-ratio)


@f_divergences.register("js_divergence", "js")
def js_divergence(ratio: torch.Tensor, spec: PreferenceSpec) -> torch.Tensor:
    """`log(2 u / (1 + u))`, without the `log 2`, which cancels."""
    return ratio - softplus(ratio)


@f_divergences.register("alpha_divergence", "alpha")
def alpha_divergence(ratio: torch.Tensor, spec: PreferenceSpec) -> torch.Tensor:
    """`(1 - u^-alpha) / alpha`, without the constant; alpha 1 is `forward_kl`, alpha to 0 `reverse_kl`."""
    alpha = spec.f_alpha_divergence_coef
    if alpha == 0:
        return ratio
    return -_exp(-alpha * ratio) / alpha


@dataclass(frozen=True)
class Scored:
    """Pairs as the losses of DPO's family see them. All [P]."""

    pairs: Pairs
    chosen: torch.Tensor
    """Score of the chosen response: its log-ratio to the reference, or `f'` of it."""
    rejected: torch.Tensor

    @property
    def margin(self) -> torch.Tensor:
        """`d`."""
        return self.chosen - self.rejected


PairLoss: TypeAlias = Callable[[Scored, PreferenceSpec], torch.Tensor]
"""[P] loss of each pair."""
pair_losses: Registry[PairLoss] = Registry("DPO loss")

#: Their value for one pair depends on the other pairs of the optimizer step.
COUPLED = frozenset({"aot", "aot_unpaired", "aot_pair", "bco_pair"})


@pair_losses.register("sigmoid")
def sigmoid(scored: Scored, spec: PreferenceSpec) -> torch.Tensor:
    """`-(1 - e) logsig(beta d) - e logsig(-beta d)`. arXiv 2305.18290; smoothing (cDPO) as in its authors' note."""
    return _logistic(spec.beta * scored.margin, spec.label_smoothing)


@pair_losses.register("sigmoid_norm")
def sigmoid_norm(scored: Scored, spec: PreferenceSpec) -> torch.Tensor:
    """`sigmoid` of scores divided by the number of their tokens (length-normalised DPO, arXiv 2411.15124)."""
    pairs = scored.pairs
    margin = scored.chosen / pairs.chosen_tokens - scored.rejected / pairs.rejected_tokens
    return _logistic(spec.beta * margin, spec.label_smoothing)


@pair_losses.register("hinge")
def hinge(scored: Scored, spec: PreferenceSpec) -> torch.Tensor:
    """`max(0, 1 - beta d)`. arXiv 2305.10425 (SLiC)."""
    return torch.relu(1 - spec.beta * scored.margin)


@pair_losses.register("ipo")
def ipo(scored: Scored, spec: PreferenceSpec) -> torch.Tensor:
    """`(d - 1 / (2 beta))^2`, `d` of log-probs averaged over tokens. arXiv 2310.12036."""
    pairs = scored.pairs
    chosen, rejected = scored.chosen, scored.rejected
    if not spec.average_log_prob:  # else they are averages already
        chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
    return (chosen - rejected - 1 / (2 * spec.beta)).square()


@pair_losses.register("robust")
def robust(scored: Scored, spec: PreferenceSpec) -> torch.Tensor:
    """`(-(1 - e) logsig(beta d) + e logsig(-beta d)) / (1 - 2 e)`: unbiased when a share e is mislabelled. 2403.00409."""
    e, h = spec.label_smoothing, spec.beta * scored.margin
    return (e * logsigmoid(-h) - (1 - e) * logsigmoid(h)) / (1 - 2 * e)


@pair_losses.register("exo_pair")
def exo_pair(scored: Scored, spec: PreferenceSpec) -> torch.Tensor:
    """`KL((sig(h), sig(-h)) || (1 - e, e))`, `h = beta d`. arXiv 2402.00856, eq. 16. Needs `e > 0`."""
    e, h = spec.label_smoothing, spec.beta * scored.margin
    if e <= 0:
        raise ConfigError(
            f"--label-smoothing, got {e}: exo_pair compares with the distribution (1 - e, e), which must not be certain; "
            "give a small one, such as 1e-3"
        )
    return h.sigmoid() * (logsigmoid(h) - math.log1p(-e)) + (-h).sigmoid() * (logsigmoid(-h) - math.log(e))


@pair_losses.register("nca_pair")
def nca_pair(scored: Scored, spec: PreferenceSpec) -> torch.Tensor:
    """`-logsig(c) - (logsig(-c) + logsig(-r)) / 2`, `c, r` the scores times beta. arXiv 2402.05369."""
    c, r = spec.beta * scored.chosen, spec.beta * scored.rejected
    return -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-r)


@pair_losses.register("bco_pair")
def bco_pair(scored: Scored, spec: PreferenceSpec) -> torch.Tensor:
    """`-logsig(c - delta) - logsig(-(r - delta))`, delta the mean of all c and r of the step, a constant. arXiv 2404.04656.

    `c, r` are the scores times beta. The paper moves delta as an average over steps; ours is the step's own.
    """
    c, r = spec.beta * scored.chosen, spec.beta * scored.rejected
    counted = scored.pairs.weight != 0
    if counted.any():
        delta = (c[counted].mean() + r[counted].mean()).detach() / 2
    else:
        delta = c.new_zeros(())
    return -logsigmoid(c - delta) - logsigmoid(delta - r)


@pair_losses.register("sppo_hard")
def sppo_hard(scored: Scored, spec: PreferenceSpec) -> torch.Tensor:
    """`(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2`, `c, r` the scores. arXiv 2405.00675, win probabilities of 1 and 0."""
    half = 0.5 / spec.beta
    return (scored.chosen - half).square() + (scored.rejected + half).square()


@pair_losses.register("aot")
def aot(scored: Scored, spec: PreferenceSpec) -> torch.Tensor:
    """`sigmoid`'s form of the step's sorted margins of the policy less those of the reference, also sorted. 2406.05882.

    The i-th smallest `s_c - s_r` is compared with the i-th smallest `ref_c - ref_r`: one distribution over the other.
    """
    pairs = scored.pairs
    return _sorted(pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected, pairs.weight, spec)


@pair_losses.register("aot_unpaired", "aot_pair")
def aot_unpaired(scored: Scored, spec: PreferenceSpec) -> torch.Tensor:
    """The same of the sorted chosen scores less the sorted rejected ones. arXiv 2406.05882."""
    return _sorted(scored.chosen, scored.rejected, scored.pairs.weight, spec)


@pair_losses.register("apo_zero")
def apo_zero(scored: Scored, spec: PreferenceSpec) -> torch.Tensor:
    """`1 - sig(c) + sig(r)`: chosen up, rejected down; `c, r` times beta. arXiv 2408.06266, eq. 7."""
    return 1 - (spec.beta * scored.chosen).sigmoid() + (spec.beta * scored.rejected).sigmoid()


@pair_losses.register("apo_down")
def apo_down(scored: Scored, spec: PreferenceSpec) -> torch.Tensor:
    """`sig(c) + 1 - sig(c - r)`: both down, rejected further; `c, r` times beta. arXiv 2408.06266, eq. 8."""
    return (spec.beta * scored.chosen).sigmoid() + 1 - (spec.beta * scored.margin).sigmoid()


@pair_losses.register("discopop")
def discopop(scored: Scored, spec: PreferenceSpec) -> torch.Tensor:
    """`(1 - m) * -logsig(h) + m * exp(-h)`, `m = sig(h / tau)`, `h = beta d`. arXiv 2406.08414 (log-ratio modulated)."""
    h = spec.beta * scored.margin
    blend = (h / spec.discopop_tau).sigmoid()
    return -logsigmoid(h) * (1 - blend) + _exp(-h) * blend


@pair_losses.register("sft")
def sft(scored: Scored, spec: PreferenceSpec) -> torch.Tensor:
    """NLL of the chosen response, the mean over its tokens: for a sum of several losses (MPO, arXiv 2411.10442)."""
    return -scored.pairs.chosen_average


# ---------------------------------------------------------------------------------------------------- losses by --loss-type


def dpo(inputs: LossInputs, spec: PreferenceSpec) -> LossOutputs:
    """`sum_p w_p (sum_k weight_k * pair_loss_k + rpo_alpha * NLL_chosen)`. arXiv 2305.18290; RPO's term 2404.19733.

    `w_p` is the pair's weight, so the plain sum over micro-batches and ranks is the step's loss. Metrics: `reward_chosen`,
    `reward_rejected` (beta times the score), `reward_margin`, `reward_accuracy`, `logp_chosen`, `logp_rejected`, `nll_chosen`.
    """
    pairs = pairs_of(inputs, spec, with_reference=not spec.reference_free)
    return dpo_of_pairs(pairs, spec)


def dpo_of_pairs(pairs: Pairs, spec: PreferenceSpec) -> LossOutputs:
    """`dpo` of pairs that are given: those of a micro-batch, or of a whole step for a loss in `COUPLED`."""
    compared = pairs.averaged() if spec.average_log_prob else pairs
    divergence = f_divergences.get(spec.f_divergence)
    scored = Scored(compared, divergence(compared.chosen_ratio, spec), divergence(compared.rejected_ratio, spec))
    values = torch.zeros_like(pairs.weight)
    for name, weight in spec.dpo_losses:
        values = values + weight * pair_losses.get(name)(scored, spec)
    if spec.rpo_alpha:
        values = values - spec.rpo_alpha * pairs.chosen_average
    return _outputs(pairs, values, spec.beta * scored.chosen, spec.beta * scored.rejected)


def orpo(inputs: LossInputs, spec: PreferenceSpec) -> LossOutputs:
    """`NLL_chosen - beta * logsig(log odds(chosen) - log odds(rejected))`, odds of mean log-probs. arXiv 2403.07691.

    `odds(p) = p / (1 - p)`, `p` the geometric mean of the tokens' probabilities. No reference.
    """
    pairs = pairs_of(inputs, spec, with_reference=False)
    average = pairs.averaged()
    odds_ratio = _log_odds(average.chosen) - _log_odds(average.rejected)
    values = -pairs.chosen_average - spec.beta * logsigmoid(odds_ratio)
    outputs = _outputs(pairs, values, spec.beta * average.chosen, spec.beta * average.rejected)
    outputs.metrics["log_odds_ratio"] = mean_metric(odds_ratio, pairs.weight)
    return outputs


def simpo(inputs: LossInputs, spec: PreferenceSpec) -> LossOutputs:
    """`-logsig(beta (avg_c - avg_r) - gamma)`, smoothed by `e`. arXiv 2405.14734.

    `avg` is the mean log-prob of a response's tokens. No reference.
    """
    pairs = pairs_of(inputs, spec, with_reference=False)
    average = pairs.averaged()
    h = spec.beta * (average.chosen - average.rejected) - spec.simpo_gamma
    values = _logistic(h, spec.label_smoothing)
    return _outputs(pairs, values, spec.beta * average.chosen, spec.beta * average.rejected)


def cpo(inputs: LossInputs, spec: PreferenceSpec) -> LossOutputs:
    """`-logsig(beta (s_c - s_r)) + cpo_alpha * NLL_chosen`, smoothed by `e`. arXiv 2401.08417. No reference."""
    pairs = pairs_of(inputs, spec, with_reference=False)
    compared = pairs.averaged() if spec.average_log_prob else pairs
    values = _logistic(spec.beta * (compared.chosen - compared.rejected), spec.label_smoothing)
    values = values - spec.cpo_alpha * pairs.chosen_average
    return _outputs(pairs, values, spec.beta * compared.chosen, spec.beta * compared.rejected)


def reward_model(inputs: LossInputs, spec: PreferenceSpec) -> LossOutputs:
    """`-logsig(r_c - r_r - margin) + center_rewards_coefficient (r_c + r_r)^2`, `r` the rows' scores.

    Bradley-Terry, arXiv 2204.05862; margin 2307.09288; centring 2312.09244. Needs `scores` [B]; `margin` [P] is optional.
    """
    scores = required(inputs.scores, "scores", "a reward model")
    chosen_rows = required(inputs.chosen_rows, "chosen_rows", "a reward model")
    rejected_rows = required(inputs.rejected_rows, "rejected_rows", "a reward model")
    row_weight = required(inputs.row_weight, "row_weight", "a reward model").detach()
    scores = masked(scores, row_weight != 0)
    weight, chosen, rejected = row_weight[chosen_rows], scores[chosen_rows], scores[rejected_rows]
    margin = chosen - rejected if inputs.margin is None else chosen - rejected - inputs.margin
    values = -logsigmoid(margin)
    if spec.center_rewards_coefficient:
        values = values + spec.center_rewards_coefficient * (chosen + rejected).square()
    return LossOutputs(
        weighted_sum(values, weight), {**_reward_metrics(chosen, rejected, weight), **weight_metric(weight)}
    )


# ---------------------------------------------------------------------------------------------- losses that couple pairs


def pair_slopes(pairs: Pairs, spec: PreferenceSpec) -> tuple[LossOutputs, Pairs]:
    """`dpo` of a whole step's pairs, and its slopes: a `Pairs` whose columns hold d loss / d that column. All detached.

    The columns of `pairs` need no gradient.
    """
    with torch.enable_grad():
        leaves = {name: getattr(pairs, name).detach().requires_grad_() for name in _POLICY_COLUMNS}
        outputs = dpo_of_pairs(dataclasses.replace(pairs, **leaves), spec)
        found = torch.autograd.grad(outputs.loss, list(leaves.values()), allow_unused=True)
    slopes = {
        name: torch.zeros_like(leaf) if slope is None else slope
        for (name, leaf), slope in zip(leaves.items(), found, strict=True)
    }
    return LossOutputs(outputs.loss.detach(), outputs.metrics), dataclasses.replace(pairs, **slopes)


def along_slopes(pairs: Pairs, slopes: Pairs) -> torch.Tensor:
    """A scalar whose gradient is that of the loss that `slopes` were taken of; its value means nothing."""
    parts = [
        weighted_sum(getattr(pairs, name) * getattr(slopes, name), (pairs.weight != 0).to(pairs.weight.dtype))
        for name in _POLICY_COLUMNS
    ]
    return torch.stack(parts).sum()


# ------------------------------------------------------------------------------------------------------------------- parts

_POLICY_COLUMNS = ("chosen", "rejected", "chosen_average")


def _outputs(pairs: Pairs, values: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> LossOutputs:
    weight = pairs.weight
    return LossOutputs(
        weighted_sum(values, weight),
        {
            **_reward_metrics(chosen, rejected, weight),
            "logp_chosen": mean_metric(pairs.chosen, weight),
            "logp_rejected": mean_metric(pairs.rejected, weight),
            "nll_chosen": mean_metric(-pairs.chosen_average, weight),
            **weight_metric(weight),
        },
    )


def _reward_metrics(chosen: torch.Tensor, rejected: torch.Tensor, weight: torch.Tensor) -> dict[str, Metric]:
    """A tie is half right: a model that scores all alike has accuracy 0.5."""
    right = (chosen > rejected).to(chosen.dtype) + 0.5 * (chosen == rejected).to(chosen.dtype)
    return {
        "reward_chosen": mean_metric(chosen, weight),
        "reward_rejected": mean_metric(rejected, weight),
        "reward_margin": mean_metric(chosen - rejected, weight),
        "reward_accuracy": mean_metric(right, weight),
    }


def _logistic(h: torch.Tensor, smoothing: float) -> torch.Tensor:
    """`-(1 - e) logsig(h) - e logsig(-h)`."""
    values = -(1 - smoothing) * logsigmoid(h)
    return values - smoothing * logsigmoid(-h) if smoothing else values


def _sorted(higher: torch.Tensor, lower: torch.Tensor, weight: torch.Tensor, spec: PreferenceSpec) -> torch.Tensor:
    """The logistic loss of quantiles against quantiles, at the pairs that the higher ones belong to. [P]

    Pairs without weight are left out of both distributions.
    """
    counted = torch.nonzero(weight).squeeze(1)
    values = torch.zeros_like(higher)
    if not len(counted):
        return values + 0 * (higher + lower)
    ordered, order = higher[counted].sort()
    losses = _logistic(spec.beta * (ordered - lower[counted].sort().values), spec.label_smoothing)
    return values.index_put((counted[order],), losses)


def _log_odds(log_probs: torch.Tensor) -> torch.Tensor:
    """`log(p / (1 - p))` of log p <= 0; log-probs of exactly 0 are moved just below it."""
    below = log_probs.clamp(max=-torch.finfo(log_probs.dtype).eps)
    return below - torch.log(-torch.expm1(below))


def _exp(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
