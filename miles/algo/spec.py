"""What a policy loss is made of, as plain values: the trainer fills it from the configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PolicyLossSpec:
    """The loss of one optimizer step: `surrogate * corrections + kl_loss_coef * KL - entropy_coef * entropy`."""

    policy_loss: str = "ppo_clip"
    """Name of the surrogate, see `losses.surrogates`."""
    eps_clip: float = 0.2
    """Lower clip width of the ratio."""
    eps_clip_high: float | None = None
    """Upper clip width; None is `eps_clip`."""
    use_kl_loss: bool = False
    """Compute and log KL to the reference; it joins the loss where `kl_loss_coef` is not 0."""
    kl_loss_coef: float = 0.0
    kl_loss_type: str = "k1"
    """Name of the estimator, see `kl.kl_estimators`."""
    entropy_coef: float = 0.0
    use_tis: bool = False
    """Truncated importance sampling from the engine's policy to the trainer's."""
    tis_clip: float = 2.0
    """Upper bound of that weight."""
    tis_clip_low: float = 0.0
    """Lower bound of that weight."""

    @property
    def clip_high(self) -> float:
        return self.eps_clip if self.eps_clip_high is None else self.eps_clip_high

    @property
    def corrections(self) -> tuple[str, ...]:
        """Names of the corrections that multiply the surrogate, in order, see `corrections.corrections`."""
        return ("tis",) if self.use_tis else ()

    @property
    def needs_rollout_log_probs(self) -> bool:
        return self.use_tis
