"""How samples are drawn: the flags, as SGLang's `sampling_params`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles.config import Config, EvalDataset


@dataclass(frozen=True)
class Sampling:
    """Sampling of one training run or one evaluation data set."""

    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int | None
    """Most new tokens of one request; None leaves it to `max_context_tokens`."""
    max_context_tokens: int | None
    """Most tokens of prompt and response together; None leaves it to the engine."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = False

    @classmethod
    def for_training(cls, config: Config) -> Sampling:
        flags = config.rollout
        return cls(
            temperature=flags.rollout_temperature,
            top_p=flags.rollout_top_p,
            top_k=flags.rollout_top_k,
            max_response_tokens=flags.rollout_max_response_len,
            max_context_tokens=flags.rollout_max_context_len,
            stop=flags.rollout_stop or (),
            stop_token_ids=flags.rollout_stop_token_ids or (),
            skip_special_tokens=flags.rollout_skip_special_tokens,
        )

    @classmethod
    def for_evaluation(cls, config: Config, dataset: EvalDataset) -> Sampling:
        return cls(
            temperature=dataset.temperature,
            top_p=dataset.top_p,
            top_k=dataset.top_k,
            max_response_tokens=dataset.max_response_len,
            max_context_tokens=dataset.max_context_len,
            stop=tuple(dataset.stop or ()),
            stop_token_ids=tuple(dataset.stop_token_ids or ()),
            skip_special_tokens=config.rollout.rollout_skip_special_tokens,
        )

    def params(self, seed: int) -> dict[str, Any]:
        """SGLang's `sampling_params`, for a request that may still be cut to the context by `fit`."""
        out: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "skip_special_tokens": self.skip_special_tokens,
            "sampling_seed": seed,
        }
        if self.max_response_tokens is not None:
            out["max_new_tokens"] = self.max_response_tokens
        if self.stop:
            out["stop"] = list(self.stop)
        if self.stop_token_ids:
            out["stop_token_ids"] = list(self.stop_token_ids)
        return out

    def fit(self, params: dict[str, Any], context_tokens: int) -> dict[str, Any]:
        """`params` with max_new_tokens cut to what the context leaves after `context_tokens`; 0 where nothing is left."""
        if self.max_context_tokens is None:
            return params
        room = max(self.max_context_tokens - context_tokens, 0)
        return {**params, "max_new_tokens": min(params.get("max_new_tokens", room), room)}
