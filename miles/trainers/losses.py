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
from miles.algo.supervised import sft_loss
from miles.types import LossInputs, LossOutputs

from .hooks import with_custom_correction

if TYPE_CHECKING:
    from miles.config.groups import Config


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


LOSSES: Mapping[str, Callable[[Config], Loss]] = {"policy_loss": _policy, "sft_loss": _sft}
