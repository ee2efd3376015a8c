"""What crosses rooms and processes: one dataclass per hop, numpy and plain Python only.

    prompts --Sample--> engines --Sample--> rewards --SampleGroup--> TrainBatch (one per DP rank) --> trainers

Legend: `B` rows (sequences), `R` response tokens of all rows, `T` tokens of all rows.
A *trajectory* is one conversation with the model. It is one row as a rule; multi-turn hooks may return several rows of
one trajectory, which then share `trajectory_id` and count once in batch sizes, group statistics and sequence denominators.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

    from .interfaces import Args

#: Weight version: the number of training rollouts that made these weights, as the decimal string engines report.
#: "0" is what the run started from; training rollout `i` makes version `str(i + 1)`.
WeightVersion: TypeAlias = str


#: Key of `Sample.metadata`: the reward of a greedy answer to the same prompt, where the advantage takes it as baseline.
GREEDY_REWARD = "greedy_reward"
#: Likewise, made of the columns of a data set alone: the name of the row's channel, by which the loss is reported ...
CHANNEL = "_channel"
#: ... and by how much a reward model should tell a pair apart.
MARGIN = "_margin"
#: Likewise, of distillation: which of `Author` the answer is of.
ANSWERED_BY = "_answered_by"


class Author(enum.StrEnum):
    """Who answers a row of distillation."""

    DATA = "data"
    STUDENT = "student"
    TEACHER = "teacher"


class Status(enum.Enum):
    """Where a sample is in its life. Values are the strings that files and hooks use."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass(frozen=True)
class TeacherScores:
    """What a teacher on engines says of a response, at temperature 1. `R` response tokens, `K` top tokens."""

    log_probs: np.ndarray
    """[R] f32, of the response's own tokens."""
    top_ids: np.ndarray
    """[R, K] i32, the likeliest tokens; K is 0 where nobody wants them."""
    top_log_probs: np.ndarray
    """[R, K] f32"""


@dataclass
class Sample:
    """One row: a prompt, what the model answered, and what became of it. Mutable: hooks fill it in.

    `tokens` is prompt followed by response, as the engine saw and made them; text is never tokenized a second time.
    `loss_mask` and `rollout_log_probs` cover the response alone (`response_length` entries each).
    """

    group_index: int | None = None
    """Which prompt group; unique over the run."""
    index: int | None = None
    """Which sample; unique over the run: group_index * n_samples_per_prompt + position in the group."""
    trajectory_id: int | None = None
    """Rows of one trajectory share it; None means the row is a trajectory of its own (its `index`)."""
    prompt: str | list[dict[str, Any]] = ""
    """Text after the chat template, or the messages themselves when no template is applied."""
    tokens: list[int] = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    label: Any = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    """1 where a response token is trained on; None means all of them."""
    loss_scale: list[float] | None = None
    """How much each response token counts in the loss, beside its mask; None means 1. Denominators count tokens, not scales."""
    rollout_log_probs: list[float] | None = None
    """The engine's log-prob of each response token, at the sampling temperature."""
    temperature: float = 1.0
    """Sampling temperature; trainers divide logits by it in every log-prob pass. 0 (greedy) counts as 1."""
    weight_versions: list[WeightVersion] = field(default_factory=list)
    """Versions that made the response, oldest first; more than one when an update fell into it."""
    status: Status = Status.PENDING
    remove_sample: bool = False
    """True keeps the sample in its group's statistics and out of the loss."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The prompt file's metadata column, and whatever hooks add. `metadata["rm_type"]` overrides --rm-type."""
    train_metadata: dict[str, Any] | None = None
    multimodal_inputs: dict[str, Any] | None = None
    rollout_routed_experts: Any = None
    """[prompt + response - 1, layers, top_k] int32 where the engine returns routing."""
    teacher: TeacherScores | None = None
    """What the teacher of --teacher-urls says of the response. In no file: it is large, and can be asked again."""
    error: str | None = None
    """Why `status` is FAILED: the exception's text."""

    Status = Status  # users write `Sample.Status.COMPLETED`

    @property
    def prompt_length(self) -> int:
        return len(self.tokens) - self.response_length

    @property
    def effective_response_length(self) -> int:
        """Response tokens that are trained on."""
        return sum(self.loss_mask) if self.loss_mask is not None else self.response_length

    def get_reward_value(self, args: Args) -> float:
        """The scalar reward: `reward` itself, or of a dict its `--reward-key` entry or the sum of `--reward-weights`."""
        key, weights = getattr(args, "reward_key", None), getattr(args, "reward_weights", None)
        parts = reward_parts(self.reward, key, weights or {})
        if isinstance(parts, str):
            raise ValueError(f"reward of sample {self.index}, {parts}")
        return sum(weight * value for weight, value in parts.values())

    def wrong_field(self) -> str | None:
        """What cannot be read of a sample that was made elsewhere: "<field>, got <type>: it must be <kind>"; None if all can."""
        for name, (fits, kind) in _FIELD_KINDS.items():
            value = getattr(self, name)
            if not fits(value):
                return f"{name}, got {type(value).__name__}: it must be {kind}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, lossless as far as `metadata`, `label` and `reward` are JSON themselves; without `teacher`."""
        out = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "teacher"}
        out["status"] = self.status.value
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sample:
        """Inverse of `to_dict`. Unknown keys are kept in `metadata` rather than lost."""
        names = {f.name for f in dataclasses.fields(cls)}
        known = {k: v for k, v in data.items() if k in names}
        known["status"] = Status(known.get("status", Status.PENDING.value))
        sample = cls(**known)
        if (wrong := sample.wrong_field()) is not None:
            raise ValueError(wrong)
        sample.metadata = {**sample.metadata, **{k: v for k, v in data.items() if k not in names}}
        return sample


def _is_column(value: Any) -> bool:
    """A list, a tuple, an array or a tensor."""
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes, dict, set))


#: Fields whose kind everything relies on.
_FIELD_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (lambda v: isinstance(v, (str, list)), "a text or a list of messages"),
    "tokens": (_is_column, "a list of token ids"),
    "response": (lambda v: isinstance(v, str), "a text"),
    "response_length": (lambda v: type(v) is int, "a whole number"),
    "loss_mask": (lambda v: v is None or _is_column(v), "a list of 0 and 1, or None"),
    "loss_scale": (lambda v: v is None or _is_column(v), "a list of numbers, or None"),
    "rollout_log_probs": (lambda v: v is None or _is_column(v), "a list of numbers, or None"),
    "weight_versions": (lambda v: isinstance(v, list), "a list of texts"),
    "status": (lambda v: isinstance(v, Status), "a Sample.Status"),
    "metadata": (lambda v: isinstance(v, dict), "a dict"),
}


def reward_parts(
    reward: float | dict[str, Any] | None, key: str | None, weights: Mapping[str, float]
) -> dict[str, tuple[float, float]] | str:
    """Entry -> (weight, value) of what counts in a reward: itself, the entry `key`, or else the entries of `weights`.

    Values need not be finite. Where something is missing or no number, the rest of an error that begins with the sample.
    """
    if reward is None:
        return "got None: the sample was not scored; score it first"
    if not isinstance(reward, dict):
        return {"": (1.0, float(reward))}
    chosen = {key: 1.0} if key is not None else dict(weights)
    known = sorted(map(str, reward))
    if not chosen:
        return f"got a dict with keys {known}: --reward-key is None; name one of these keys, or several with --reward-weights"
    parts = {}
    for name, weight in chosen.items():
        if name not in reward:
            flag = f"--reward-key is {key!r}" if key is not None else f"--reward-weights names {name!r}"
            return f"got a dict with keys {known}: {flag}; name one of these keys"
        if reward[name] is None:
            return f"got None in {name!r}: it must be a finite number; mend the reward"
        parts[name] = (float(weight), float(reward[name]))
    return parts


#: The samples of one prompt, in sample order; more rows than trajectories where a hook returned several.
SampleGroup: TypeAlias = list[Sample]


@dataclass
class RolloutOutput:
    """What a `RolloutFn` returns for one training rollout: exactly `rollout_batch_size` kept groups, scored."""

    groups: list[SampleGroup]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepTotals:
    """Population of one optimizer step over all ranks, counted before the split: what denominators are made of."""

    num_trajectories: int
    """Trajectories with at least one trained token."""
    num_tokens: int
    """Trained (unmasked) response tokens."""
    num_rows: int
    """Rows before any were skipped."""
    num_skipped_rows: int = 0
    """Rows of zero advantage that are not sent to the trainers."""


@dataclass(frozen=True)
class TrainBatch:
    """One DP rank's share of one training rollout: named arrays plus offsets, picklable without surprises by Ray.

    Row columns `[B]` (in `rows`): `total_lengths` i64, `response_lengths` i64, `rewards` f32 (after group
    normalisation), `raw_rewards` f32, `temperature` f32, `loss_weight` f32, `sample_index` i64, `trajectory_id` i64,
    `group_index` i64, `position` i64 (of the sample in the rollout, samples that are not sent included); `channel` i64,
    which of `metadata["channels"]` the row belongs to, where there are channels; `own_answer` u8, whether the policy's engines
    answered it, where distillation mixes such rows with others. Ragged columns (in `ragged`): `tokens` i64
    `[T]`, split by `total_lengths`; `loss_mask` u8, `rollout_log_probs` f32 and `loss_scale` f32 `[R]`, split by
    `response_lengths`. The response is the last `response_lengths` tokens of a row. `rollout_log_probs` is absent when a row
    lacks it, `loss_scale` when all of it is 1. With a teacher on engines: `teacher_log_probs` f32 `[R]`, `teacher_top_ids` i32 and
    `teacher_top_log_probs` f32 `[R, K]`, see `TeacherScores`.

    Preference jobs add row columns: `preferred` u8 (1 for the chosen row of a pair, or one that is desirable by itself), `pair`
    i64 (shared by the two rows of a pair, which lie in one micro-batch; absent where rows count by themselves) and, for reward
    models, `margin` f32, the same on both rows of a pair. Both rows have the pair's `loss_weight`. The ragged column
    `ref_log_probs` f32 `[R]` holds the reference's log-probs where they were computed before.

    `loss_weight` is the whole of loss aggregation: the loss of a step is the plain sum over ranks, micro-batches, rows
    and tokens of `loss_weight[row] * loss_mask[token] * loss_scale[token] * token_loss[token]`, so the split cannot change it.
    """

    rollout_id: int
    rows: dict[str, np.ndarray]
    ragged: dict[str, np.ndarray]
    steps: tuple[tuple[np.ndarray, ...], ...]
    """`steps[s][m]`: the rows (numbers into this batch) of micro-batch `m` of optimizer step `s`. Every rank has the
    same number of micro-batches in a step; an empty array still takes part in the collectives."""
    totals: tuple[StepTotals, ...]
    """One entry per optimizer step, the same on every rank."""
    metadata: dict[str, Any] = field(default_factory=dict)
    mismatched: TrainBatch | None = None
    """KTO: rows of prompts with the responses of other prompts, in the same steps; scored before each, never trained on."""

    @property
    def num_rows(self) -> int:
        return len(self.rows["total_lengths"])


@dataclass(frozen=True)
class LossInputs:
    """Packed tensors of one micro-batch, response tokens of its rows side by side. `R` tokens, `B` rows.

    `token_weight = loss_weight[row] * loss_mask[token]` is 0 exactly where a token is not trained on; such tokens may
    hold any value in the other columns, infinities included.
    """

    log_probs: torch.Tensor
    """[R] with gradient, at the sampling temperature."""
    old_log_probs: torch.Tensor
    """[R] the policy before this rollout's first update (or the engine's, --use-rollout-logprobs)."""
    advantages: torch.Tensor
    """[R]"""
    loss_mask: torch.Tensor
    """[R] bool"""
    token_weight: torch.Tensor
    """[R] float"""
    row: torch.Tensor
    """[R] which row a token belongs to, int64, ascending."""
    num_rows: int
    ref_log_probs: torch.Tensor | None = None
    """[R]"""
    rollout_log_probs: torch.Tensor | None = None
    """[R] the engine's"""
    train_log_probs: torch.Tensor | None = None
    """[R] the trainer's own log-probs before the update, when `old_log_probs` holds the engine's."""
    entropy: torch.Tensor | None = None
    """[R] with gradient where the entropy bonus is on."""
    total_lengths: torch.Tensor | None = None
    """[B] int64 tokens of prompt and response, where a hook may want them."""
    policy_mask: torch.Tensor | None = None
    """[R] bool: tokens that the surrogate counts; no denominator knows of it. None is all."""
    row_weight: torch.Tensor | None = None
    """[B] weight of a whole row in the step's loss, for losses of whole responses; both rows of a pair have the pair's. A row of
    weight 0 is left out and may hold anything."""
    chosen_rows: torch.Tensor | None = None
    """[P] int64, the preferred row of each pair."""
    rejected_rows: torch.Tensor | None = None
    """[P] int64, the other one."""
    margin: torch.Tensor | None = None
    """[P] by how much a reward model should tell them apart."""
    desirable: torch.Tensor | None = None
    """[B] bool, KTO's label of each row."""
    kl_baseline: torch.Tensor | None = None
    """[] KTO's reference point, see `kto_baseline`."""
    scores: torch.Tensor | None = None
    """[B] with gradient, of a scalar head."""
    divergence: torch.Tensor | None = None
    """[R] with gradient, of the teacher's next-token distributions and the policy's."""
    own_answer: torch.Tensor | None = None
    """[B] bool: the policy answered the row itself. None is no row."""
    channel: torch.Tensor | None = None
    """[B] int64, number of the row's channel, by which supervised losses are reported."""
    channels: tuple[str, ...] = ()
    """Their names, by number: those of the whole data, whichever are in this micro-batch."""


@dataclass(frozen=True)
class LossOutputs:
    """`loss` is this micro-batch's term of the step's sum. Metrics are (kind, value) ready to be reduced over ranks.

    kind `mean`: `value` is already weighted by `token_weight`; summed over ranks and micro-batches, `finish_metrics` of
    miles.algo divides it by the total weight of the rows that were scored (1 unless rows were skipped or the aggregation is
    `constant`). kind `sum`: a plain total, of a count or of a term of the loss. kind `max`: the largest over all, >= 0.
    """

    loss: torch.Tensor
    metrics: dict[str, tuple[str, torch.Tensor]]
