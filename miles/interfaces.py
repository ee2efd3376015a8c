"""The seams of the system: what each part may expect of the next. Implementations need not inherit.

Anything a user may replace by dotted path is here, with the field's names and signatures.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .types import RolloutOutput, Sample, SampleGroup, TrainBatch, WeightVersion

if TYPE_CHECKING:
    import numpy as np
    import torch


class Args(Protocol):
    """The flat, read-only view of the configuration that user hooks receive: every flag under its own name."""

    def __getattr__(self, name: str) -> Any: ...


# ---------------------------------------------------------------------------------------------------------------- hooks


class RewardFn(Protocol):
    """`async f(args, sample) -> float | dict`. Runs in a worker process that is killed at its time limit."""

    def __call__(self, args: Args, sample: Sample, **kwargs: Any) -> Awaitable[float | dict[str, Any]]: ...


class GroupRewardFn(Protocol):
    """`async f(args, samples) -> list`, one entry per sample in order (--group-rm)."""

    def __call__(
        self, args: Args, samples: list[Sample], **kwargs: Any
    ) -> Awaitable[list[float] | list[dict[str, Any]]]: ...


class GenerateFn(Protocol):
    """`async f(args, sample, sampling_params) -> Sample | list[Sample]`.

    Called once per trajectory, many at a time, in the rollout manager's event loop: it must not block. What it returns
    has tokens, response_length, loss_mask and status filled in; several rows share the trajectory.
    """

    def __call__(
        self, args: Args, sample: Sample, sampling_params: dict[str, Any]
    ) -> Awaitable[Sample | list[Sample]]: ...


@dataclass(frozen=True)
class DynamicFilterOutput:
    """What a dynamic sampling filter decides about a scored group."""

    keep: bool
    reason: str | None = None
    """Counted under `rollout/dropped/<reason>`."""


class FilterFn(Protocol):
    """`f(args, samples) -> bool | DynamicFilterOutput` on a scored group."""

    def __call__(self, args: Args, samples: list[Sample], **kwargs: Any) -> bool | DynamicFilterOutput: ...


class RolloutFn(Protocol):
    """Makes one training rollout: fetches groups from the source, generates, scores and filters."""

    def __call__(self, rollout_id: int) -> Awaitable[RolloutOutput]: ...


# ----------------------------------------------------------------------------------------------------------------- data


@runtime_checkable
class DataSource(Protocol):
    """An endless, resumable stream of prompt groups with a buffer for groups that come back.

    The state after `load_state_dict(state)` continues exactly where `state_dict()` was taken: same groups, same order.
    """

    def get_samples(self, num_groups: int) -> list[SampleGroup]:
        """Next groups, buffered ones first; each has n_samples_per_prompt PENDING samples with prompt and tokens."""
        ...

    def add_samples(self, groups: list[SampleGroup]) -> None:
        """Gives groups back; they are fetched again before new ones."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


# -------------------------------------------------------------------------------------------------------------- engines


class Engine(Protocol):
    """Control side of one rollout engine. Every call is bounded in time and raises `EngineError` with the engine's name.

    `pause` ... `resume` brackets a weight update. An engine whose update failed stays paused and answers no generation.
    """

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str:
        """Of the process that serves: another one after a restart."""
        ...

    async def health(self) -> None:
        """Returns when the engine serves; raises otherwise. Safe and cheap to call on a running engine."""
        ...

    async def pause(self, mode: str = "abort") -> None: ...
    async def resume(self) -> None: ...
    async def update_weights(self, payload: dict[str, Any]) -> dict[str, Any]:
        """POST /update_weights_from_tensor; returns the engine's reply, raises `WeightUpdateError`."""
        ...

    async def serve(self, version: WeightVersion) -> None:
        """Completes a weight update and goes on, under this version. Raises where the weights are not whole."""
        ...

    async def version(self) -> WeightVersion: ...
    async def checksums(self) -> dict[str, str]:
        """HF name -> checksum of the tensor as the engine holds it now."""
        ...


@dataclass(frozen=True)
class BucketReceipt:
    """What one `WeightTransport.send` did."""

    names: tuple[str, ...]
    """HF names of its tensors, in order."""
    checksums: dict[str, str]
    """HF name -> checksum of the tensor as it was sent. All of them with `check_equal`; else those that engines were
    compared by, which may be none."""
    nbytes: int
    wire_s: float
    """Seconds to put the bytes where the engines can read them."""
    load_s: float
    """Seconds from then until the slowest engine had loaded them."""
    serving: bool = False
    """The engines have gone on already, under the version that `send` was given."""


class WeightTransport(Protocol):
    """Carries HF-named tensors from the trainer to all engines, one bucket at a time.

    One instance serves one publication at a time and is reused: `begin`, `send` for each bucket, and `commit` where all
    went well. `close` releases whatever the transport holds and may be called twice.
    """

    @property
    def depth(self) -> int:
        """How many calls of `send` may overlap: 1, or 2 where a bucket can be filled while the last one loads."""
        ...

    def begin(self, *, check_equal: bool = False) -> None:
        """A publication begins; one that was not committed has failed. With `check_equal` receipts have all checksums."""
        ...

    def commit(self, engines: Sequence[Engine]) -> None:
        """These engines serve what was sent since `begin`, and use nothing that was sent before."""
        ...

    async def send(
        self,
        tensors: Sequence[tuple[str, torch.Tensor]],
        engines: Sequence[Engine],
        ready: Awaitable[object] | None = None,
        serve: WeightVersion | None = None,
    ) -> BucketReceipt:
        """Returns once every engine has loaded the bucket and `tensors` may be written again.

        With `serve` the bucket is the last, and engines may complete the update and go on at once, where the transport has no
        more to compare and one cannot go on without the other. The receipt says whether they did.

        Engines are given the bucket once `ready` is done; work that needs no engine goes on until then. The tensors are
        ready to be read: work on their device that makes them has ended. Engines load overlapping buckets in the order of
        the calls. Raises `WeightUpdateError` naming engine and tensor, after every engine has answered.
        """
        ...

    def close(self) -> None: ...


# ------------------------------------------------------------------------------------------------------------- trainers


class Trainer(Protocol):
    """One rank of a trainer group. All ranks call each method together, in the same order."""

    traced: dict[int, np.ndarray]
    """Of the last batch's samples that `metadata["traced"]` lists by their `position`: this rank's log-probs of the response
    tokens, before the first update."""

    def train(self, batch: TrainBatch) -> dict[str, float]:
        """All optimizer steps of one rollout. Returns metrics, equal on all ranks.

        Raises `NonFiniteError` with the batch saved, before the weights are touched.
        """
        ...

    def reference_log_probs(self, batch: TrainBatch) -> np.ndarray:
        """The reference's log-probs of the response tokens, in the batch's order; float32."""
        ...

    def drop_reference(self) -> None:
        """Frees the reference's weights: batches bring its log-probs from now on."""
        ...

    def evaluate(self, batch: TrainBatch) -> dict[str, float]:
        """The loss of a batch, its metrics and `token_accuracy`, without a gradient; equal on all ranks."""
        ...

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """HF-named full tensors, streamed in a fixed order; every rank iterates, the main rank gets the tensors."""
        ...

    def load_initial(self, resume_from: Path | None) -> int:
        """Gives the actor (and the reference, where one is used) its weights. Returns the rollout to begin with: that of
        the checkpoint `resume_from`, or 0."""
        ...

    def save(self, directory: str, iteration: int, extra: dict[str, Any]) -> None:
        """Writes this rank's part under a temporary name. `iteration` counts finished training rollouts."""
        ...

    def finish_save(self, directory: str, iteration: int) -> None:
        """Makes what all ranks saved the current checkpoint. The main rank alone calls it."""
        ...

    def load(self, found: Path) -> int:
        """Continues from a whole checkpoint. Returns the rollout to begin with."""
        ...

    def save_hf(self, path: str) -> None:
        """Writes an HF directory that transformers loads."""
        ...


# -------------------------------------------------------------------------------------------------------------- observe


class MetricSink(Protocol):
    """An experiment tracker. Lives in a process of its own, so it may take its time, fail or hang; see observe.trackers."""

    @property
    def run_id(self) -> str | None:
        """What continues this run in another process; None where a directory is all that is needed."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Values of `step`, which never goes back; a step may come in several parts. NaN is "was not a number"."""
        ...

    def close(self, outcome: str) -> None:
        """`ok`, `failed` (the run ended with an error) or `killed` (its driver did). Returns once all is delivered."""
        ...


#: Sums a tensor over whatever ranks hold the rest of it; the identity on one rank. Pure functions take it as an argument.
Reduce = Callable[["torch.Tensor"], "torch.Tensor"]

__all__ = [
    "Args",
    "BucketReceipt",
    "DataSource",
    "DynamicFilterOutput",
    "Engine",
    "FilterFn",
    "GenerateFn",
    "GroupRewardFn",
    "Iterable",
    "MetricSink",
    "Reduce",
    "RewardFn",
    "RolloutFn",
    "Trainer",
    "WeightTransport",
]
