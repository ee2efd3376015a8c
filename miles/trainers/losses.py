"""What each --loss-type minimises, and what it must be given: the trainers' side of `miles.config.jobs`.

    --loss-type NAME --LOSSES[NAME](config)--> Loss: LossInputs of a micro-batch --> its term of the step's loss, metrics

A new loss is a function of `miles.algo` and one builder here, which fills in its flags.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from miles.algo import PolicyLossSpec, policy_loss
from miles.algo.distillation import gkd_loss
from miles.algo.kto import kto, kto_rows
from miles.algo.preference import COUPLED, cpo, dpo, dpo_of_pairs, orpo, pair_slopes, reward_model, simpo
from miles.algo.preference_spec import PreferenceSpec
from miles.algo.sequences import Pairs, Rows, pairs_of
from miles.algo.supervised import sft_loss
from miles.types import LossInputs, LossOutputs

from .hooks import custom_loss, with_custom_correction

if TYPE_CHECKING:
    from miles.config.groups import Config


@dataclass(frozen=True)
class Divergence:
    """Which one, see `generalized_jsd`."""

    beta: float
    temperature: float


@dataclass(frozen=True)
class Loss:
    """One --loss-type with its flags filled in."""

    function: Callable[[LossInputs], LossOutputs]
    """Of one micro-batch; also of one without rows, where it gives 0 with a gradient of 0."""
    needs_rollout_log_probs: bool = False
    """The engine's, in the batch."""
    needs_old_log_probs: bool = False
    """Those before the first optimizer step, where a rollout has several."""
    needs_reference: bool = False
    """Log-probs of the frozen reference."""
    of_scores: bool = False
    """Looks at the scores that a head of one number gives whole rows, in place of tokens' log-probs."""
    coupled: Coupled | None = None
    """Given where the loss of a pair depends on the other pairs of its optimizer step."""
    baseline_rows: Callable[[LossInputs], Rows] | None = None
    """Given where the loss compares with `kl_baseline`, which is made of these rows of mismatched prompts and responses."""
    divergence: Divergence | None = None
    """From the teacher's distributions, at every token."""


@dataclass(frozen=True)
class Coupled:
    """A loss of pairs in two passes, see `miles.algo.preference`."""

    pairs: Callable[[LossInputs], Pairs]
    """Of one micro-batch."""
    slopes: Callable[[Pairs], tuple[LossOutputs, Pairs]]
    """Of a whole optimizer step: its loss, and the slope at each pair."""
    metrics: Callable[[Pairs], LossOutputs]
    """Of one micro-batch; its loss means nothing."""


def build_loss(config: Config) -> Loss:
    """The loss of --loss-type."""
    return LOSSES[config.grpo.loss_type](config)


def policy_loss_spec(config: Config) -> PolicyLossSpec:
    """The GRPO flags, as the policy loss takes them."""
    names = {field.name for field in dataclasses.fields(PolicyLossSpec)}
    grpo = {k: v for k, v in dataclasses.asdict(config.grpo).items() if k in names and v is not None}
    return with_custom_correction(PolicyLossSpec(**grpo), config)


def _policy(config: Config) -> Loss:
    spec, grpo = policy_loss_spec(config), config.grpo
    return Loss(
        functools.partial(policy_loss, spec=spec),
        needs_rollout_log_probs=spec.needs_rollout_log_probs or grpo.use_rollout_logprobs,
        needs_old_log_probs=not grpo.use_rollout_logprobs,
        needs_reference=grpo.use_kl_loss or grpo.kl_coef != 0,
    )


def _sft(config: Config) -> Loss:
    return Loss(functools.partial(sft_loss, kind=config.sft.sft_token_loss))


def preference_spec(config: Config) -> PreferenceSpec:
    """The PREFERENCE flags, as the losses take them."""
    names = {field.name for field in dataclasses.fields(PreferenceSpec)}
    return PreferenceSpec(**{k: v for k, v in dataclasses.asdict(config.preference).items() if k in names})


def _dpo(config: Config) -> Loss:
    spec = preference_spec(config)
    with_reference = not spec.reference_free
    coupled = None
    if not COUPLED.isdisjoint(spec.dpo_loss_type):
        coupled = Coupled(
            functools.partial(pairs_of, spec=spec, with_reference=with_reference),
            functools.partial(pair_slopes, spec=spec),
            functools.partial(dpo_of_pairs, spec=spec),
        )
    return Loss(functools.partial(dpo, spec=spec), needs_reference=with_reference, coupled=coupled)


def _kto(config: Config) -> Loss:
    spec = preference_spec(config)
    return Loss(
        functools.partial(kto, spec=spec),
        needs_reference=not spec.reference_free,
        baseline_rows=functools.partial(kto_rows, spec=spec),
    )


def _rm(config: Config) -> Loss:
    return Loss(functools.partial(reward_model, spec=preference_spec(config)), of_scores=True)


def _of_pairs(function: Callable[[LossInputs, PreferenceSpec], LossOutputs]) -> Callable[[Config], Loss]:
    """A loss of pairs without a reference."""

    def build(config: Config) -> Loss:
        spec = preference_spec(config)
        return Loss(lambda inputs: function(inputs, spec))

    return build


def _gkd(config: Config) -> Loss:
    gkd = config.gkd
    return Loss(
        functools.partial(gkd_loss, sft_alpha=gkd.sft_alpha), divergence=Divergence(gkd.gkd_beta, gkd.gkd_temperature)
    )


def _custom(config: Config) -> Loss:
    """What the policy loss is given, and a user's function of it."""
    path = config.grpo.custom_loss_function_path
    assert path is not None, "checked at launch"
    return dataclasses.replace(_policy(config), function=custom_loss(path, config))


LOSSES: Mapping[str, Callable[[Config], Loss]] = {
    "policy_loss": _policy,
    "sft_loss": _sft,
    "dpo": _dpo,
    "kto": _kto,
    "orpo": _of_pairs(orpo),
    "simpo": _of_pairs(simpo),
    "cpo": _of_pairs(cpo),
    "rm": _rm,
    "gkd": _gkd,
    "custom_loss": _custom,
}
