"""A `TrainBatch` cut into micro-batches of packed tensors, and scores put back into the batch's order.

    TrainBatch (numpy, rows) --steps[s][m]--> MicroBatch (device tensors, tokens side by side)

Rows are packed longest first. The last token of a row is never an input: its logits would predict nothing. Where rows of a
micro-batch have the same prompt, as those of a group do, its tokens are packed once and each row adds its response: the
hidden states of a prompt are the same in all of them.

Legend: `T` input tokens of the micro-batch, `R` response tokens, `B` rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miles.errors import DataError
from miles.types import TrainBatch

from .attention import PackedSequences
from .coarse import TopTokens
from .context import TokenSplit

#: All tokens of a micro-batch on one rank.
WHOLE = TokenSplit()

#: Rows with a common prompt share it up to this length in tokens, since attention then needs a mask of that size squared,
_SHARED_LENGTH = 2048
#: and up to this multiple of the prompt: where responses are much longer, there is little to save.
_SHARED_PART = 10


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass. Without rows it holds one token that predicts nothing, and R is 0."""

    tokens: Tensor
    """[1, T] int64; where context-parallel ranks share the sequences, this rank's."""
    sequences: PackedSequences
    predictors: Tensor
    """[R] the input token whose logits predict each response token, or, of `own` ones, [len(own)]. A shared prompt's last
    one predicts several."""
    targets: Tensor
    """[R] int64 response tokens."""
    temperatures: Tensor
    """[R] fp32"""
    advantages: Tensor
    """[R] fp32"""
    loss_mask: Tensor
    """[R] bool"""
    token_weights: Tensor
    """[R] fp32: weight of the row times scale of the token, 0 where the mask is."""
    row: Tensor
    """[R] int64, ascending."""
    num_rows: int
    total_lengths: Tensor
    """[B] int64, prompt and response."""
    row_weights: Tensor
    """[B] fp32, of whole rows in the step's loss."""
    rollout_log_probs: Tensor | None
    """[R] fp32, the engine's."""
    slots: Tensor
    """[R] where each response token is in the batch's response columns."""
    preferences: Preferences | None
    """What the rows say of each other, in a preference job."""
    teacher_top: TopTokens | None = None
    """Of a teacher on engines."""
    own_answer: Tensor | None = None
    """[B] bool, of rows that the policy answered itself."""
    own: Tensor | None = None
    """Which response tokens are predicted by inputs of this rank; None: all."""
    channel: Tensor | None = None
    """[B] int64"""
    channels: tuple[str, ...] = ()
    """Names of channels, by number."""

    def own_of(self, values: Tensor) -> Tensor:
        """Of `values` [R] those of the response tokens that this rank predicts."""
        return values if self.own is None else values.index_select(0, self.own)


@dataclass(frozen=True)
class Preferences:
    """Pairs of rows, or rows that are desirable or not by themselves. Rows are numbers into the micro-batch."""

    desirable: Tensor
    """[B] bool; of a pair, the chosen row."""
    chosen_rows: Tensor | None = None
    """[P] int64; None where rows count by themselves."""
    rejected_rows: Tensor | None = None
    margin: Tensor | None = None
    """[P] fp32, of a reward model."""


def pack(
    batch: TrainBatch, device: torch.device, *, share_prompts: bool, split: TokenSplit = WHOLE
) -> list[list[MicroBatch]]:
    """Micro-batches of each optimizer step. Raises DataError where a response has no token before it.

    share_prompts: pack a prompt of several rows once; attention has to understand it (see `attention`). split: the part of
    the tokens that is this rank's; prompts are not shared where sequences are.
    """
    totals, responses = batch.rows["total_lengths"], batch.rows["response_lengths"]
    bad = np.flatnonzero((responses >= totals) | (totals < 1))
    if bad.size:
        row = int(bad[0])
        raise DataError(
            f"sample {int(batch.rows['sample_index'][row])}, got {totals[row]} tokens of which {responses[row]} are the "
            "response: its first token has nothing to be predicted from; give every prompt at least one token"
        )
    share_prompts = share_prompts and split.size == 1
    return [[_pack_rows(batch, rows, device, share_prompts, split) for rows in step] for step in batch.steps]


def with_last_inputs(batch: TrainBatch) -> TrainBatch:
    """The batch with one token more in each response, that is not trained on: so a row's own last token becomes an input, and
    the row has a prediction after it. Only for what reads no targets."""
    ends = {"tokens": np.cumsum(batch.rows["total_lengths"])}
    of_responses = np.cumsum(batch.rows["response_lengths"])
    lengths = {name: batch.rows[name] + 1 for name in ("total_lengths", "response_lengths")}
    ragged = {name: np.insert(column, ends.get(name, of_responses), 0) for name, column in batch.ragged.items()}
    return dataclasses.replace(batch, rows=batch.rows | lengths, ragged=ragged)


def _pack_rows(
    batch: TrainBatch, rows: np.ndarray, device: torch.device, share_prompts: bool, split: TokenSplit
) -> MicroBatch:
    columns, ragged = batch.rows, batch.ragged
    layout = _layout(batch, rows, share_prompts)
    rows = layout.rows
    totals, responses = columns["total_lengths"][rows], columns["response_lengths"][rows]

    token_starts = _starts(columns["total_lengths"])[rows]
    slots = _ranges(_starts(columns["response_lengths"])[rows], responses)
    predictors = _ranges(layout.response_starts - 1, responses)
    predictors[_starts(responses)[responses > 0]] = layout.prompt_ends[responses > 0]
    loss_mask = ragged["loss_mask"][slots] != 0
    row = np.repeat(np.arange(len(rows)), responses)

    def put(values: np.ndarray, dtype: type = np.float32) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype)).to(device, non_blocking=True)

    def per_token(column: str) -> np.ndarray:
        return columns[column][rows].astype(np.float32)[row]

    def scaled(weights: np.ndarray) -> np.ndarray:
        return weights if "loss_scale" not in ragged else weights * ragged["loss_scale"][slots]

    tokens = ragged["tokens"][layout.inputs] if len(rows) else np.zeros(1)
    whole = layout.whole if len(rows) else np.ones(1, dtype=np.int64)
    own = None
    if split.size == 1:
        padding = split.missing(len(tokens))
        tokens = np.append(tokens, np.zeros(padding))
        sequences = PackedSequences.of(
            whole,
            device,
            prefixes=layout.prefixes,
            branches=layout.branches,
            prefix_of=layout.prefix_of,
            padding=padding,
        )
    else:
        part = _part_of(split, whole, tokens, predictors)
        tokens, predictors = part.tokens, part.predictors
        own = torch.from_numpy(part.own).to(device)
        sequences = PackedSequences.split(part.lengths, device, split.rank, split.size)
    rollout = ragged.get("rollout_log_probs")
    return MicroBatch(
        tokens=put(tokens, np.int64)[None],
        sequences=sequences,
        predictors=put(predictors, np.int64),
        targets=put(ragged["tokens"][_ranges(token_starts + totals - responses, responses)], np.int64),
        temperatures=put(per_token("temperature")),
        advantages=put(per_token("rewards")),
        loss_mask=put(loss_mask, np.bool_),
        token_weights=put(scaled(per_token("loss_weight") * loss_mask)),
        row=put(row, np.int64),
        num_rows=len(rows),
        total_lengths=put(totals, np.int64),
        row_weights=put(columns["loss_weight"][rows]),
        rollout_log_probs=None if rollout is None else put(rollout[slots]),
        slots=put(slots, np.int64),
        preferences=_preferences(columns, rows, device),
        teacher_top=_teacher_top(ragged, slots, device),
        own_answer=None if "own_answer" not in columns else put(columns["own_answer"][rows], np.bool_),
        own=own,
        channel=None if "channel" not in columns else put(columns["channel"][rows], np.int64),
        channels=batch.metadata.get("channels", ()),
    )


@dataclass(frozen=True)
class _Part:
    """What one of several ranks has of packed sequences."""

    tokens: np.ndarray
    """[T] of this rank."""
    lengths: np.ndarray
    """[S] of the sequences, padded."""
    own: np.ndarray
    """The response tokens whose predictors are here,"""
    predictors: np.ndarray
    """and those, as numbers into `tokens`."""


def _part_of(split: TokenSplit, lengths: np.ndarray, tokens: np.ndarray, predictors: np.ndarray) -> _Part:
    padded = split.padded(lengths)
    if missing := split.missing(int(padded.sum()) // split.size):
        # A sequence of nothing: the multiple is one of tokens on each rank.
        padded, lengths = np.append(padded, missing * split.size), np.append(lengths, 0)
    place = _ranges(_starts(padded), lengths)
    axis = np.zeros(int(padded.sum()), dtype=np.int64)
    axis[place] = tokens
    mine = split.own(padded)
    local = np.full(len(axis), -1)
    local[mine] = np.arange(len(mine))
    found = local[place[predictors]]
    own = np.flatnonzero(found >= 0)
    return _Part(axis[mine], padded, own, found[own])


def _teacher_top(ragged: dict[str, np.ndarray], slots: np.ndarray, device: torch.device) -> TopTokens | None:
    if "teacher_top_ids" not in ragged:
        return None
    ids = torch.from_numpy(ragged["teacher_top_ids"][slots].astype(np.int64))
    log_probs = torch.from_numpy(ragged["teacher_top_log_probs"][slots].astype(np.float32))
    return TopTokens(ids.to(device, non_blocking=True), log_probs.to(device, non_blocking=True))


def _preferences(columns: dict[str, np.ndarray], rows: np.ndarray, device: torch.device) -> Preferences | None:
    """Of these rows of the batch, in this order. Raises DataError for half a pair."""
    if "preferred" not in columns:
        return None
    preferred = columns["preferred"][rows] != 0
    desirable = torch.from_numpy(preferred).to(device)
    if "pair" not in columns:
        return Preferences(desirable)
    pair = columns["pair"][rows]
    chosen, rejected = (np.flatnonzero(kind)[np.argsort(pair[kind])] for kind in (preferred, ~preferred))
    if not np.array_equal(pair[chosen], pair[rejected]) or len(np.unique(pair)) != len(chosen):
        raise DataError(
            f"micro-batch, got {len(chosen)} chosen and {len(rejected)} rejected rows that are no pairs: a pair is one of each; "
            "keep its rows in one micro-batch"
        )
    margin = columns.get("margin")
    return Preferences(
        desirable,
        chosen_rows=torch.from_numpy(chosen).to(device),
        rejected_rows=torch.from_numpy(rejected).to(device),
        margin=None if margin is None else torch.from_numpy(margin[rows][chosen].astype(np.float32)).to(device),
    )


@dataclass(frozen=True)
class _Layout:
    """The input tokens of a micro-batch: rows that stand alone, shared prompts, and what follows those in each row."""

    rows: np.ndarray
    """[B] rows of the batch in the order in which they are packed."""
    inputs: np.ndarray
    """[T] where each input token is in the batch's token column."""
    whole: np.ndarray
    prefixes: np.ndarray
    branches: np.ndarray
    prefix_of: np.ndarray
    """As `PackedSequences.of` takes them."""
    prompt_ends: np.ndarray
    """[B] the input that predicts the row's first response token."""
    response_starts: np.ndarray
    """[B] the input that is the row's first response token, or would be."""


def _layout(batch: TrainBatch, rows: np.ndarray, share_prompts: bool) -> _Layout:
    starts, totals, responses = (
        column[rows]
        for column in (
            _starts(batch.rows["total_lengths"]),
            batch.rows["total_lengths"],
            batch.rows["response_lengths"],
        )
    )
    prompts = totals - responses
    prompt_of = np.full(len(rows), -1)
    if share_prompts:
        prompt_of = _shared_prompts(batch.ragged["tokens"], starts, prompts, totals)
    alone = prompt_of < 0
    own = np.where(alone, np.maximum(totals - 1, 1), np.maximum(responses - 1, 0))
    order = np.lexsort((-own, np.where(alone, 0, -prompts), ~alone))
    rows, starts, prompts, prompt_of, alone, own = (
        column[order] for column in (rows, starts, prompts, prompt_of, alone, own)
    )
    whole, branches, prefix_of = own[alone], own[~alone], prompt_of[~alone]
    firsts = len(whole) + np.unique(prefix_of, return_index=True)[1]
    prefixes = prompts[firsts]

    at = _starts(np.concatenate([whole, prefixes, branches]))
    prefix_at, own_at = at[len(whole) :][: len(prefixes)], np.delete(at, len(whole) + np.arange(len(prefixes)))
    prompt_at = np.concatenate([own_at[alone], prefix_at[prefix_of]])
    inputs = [
        _ranges(starts[alone], whole),
        _ranges(starts[firsts], prefixes),
        _ranges((starts + prompts)[~alone], branches),
    ]
    return _Layout(
        rows=rows,
        inputs=np.concatenate(inputs),
        whole=whole,
        prefixes=prefixes,
        branches=branches[branches > 0],
        prefix_of=prefix_of[branches > 0],
        prompt_ends=prompt_at + prompts - 1,
        response_starts=own_at + np.where(alone, prompts, 0),
    )


def _shared_prompts(tokens: np.ndarray, starts: np.ndarray, prompts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """[B] the number of each row's prompt among those worth sharing, longest first; -1 for a row that stands alone."""
    rows_of: dict[bytes, list[int]] = {}
    for row, (start, length) in enumerate(zip(starts.tolist(), prompts.tolist(), strict=True)):
        rows_of.setdefault(tokens[start : start + length].tobytes(), []).append(row)
    shared = []
    for mine in rows_of.values():
        longest = int(totals[mine].max())
        if len(mine) > 1 and longest <= min(_SHARED_LENGTH, prompts[mine[0]] * _SHARED_PART):
            shared.append(mine)
    shared.sort(key=lambda mine: -int(prompts[mine[0]]))
    prompt_of = np.full(len(starts), -1)
    for number, mine in enumerate(shared):
        prompt_of[mine] = number
    return prompt_of


def split_rows(values: np.ndarray, batch: TrainBatch) -> Iterator[np.ndarray]:
    """One array per row of the batch, from a response column."""
    ends = np.cumsum(batch.rows["response_lengths"])
    yield from np.split(values, ends[:-1]) if len(ends) else ()


def traced_log_probs(log_probs: Tensor, batch: TrainBatch) -> dict[int, np.ndarray]:
    """position -> values [response tokens], of the rows whose position is in `batch.metadata["traced"]`.

    log_probs: [response tokens of the batch], NaN where nothing was computed; such rows are left out. Only what is asked
    for leaves the device.
    """
    rows = np.flatnonzero(np.isin(batch.rows["position"], batch.metadata["traced"]))
    lengths = batch.rows["response_lengths"]
    slots = _ranges(_starts(lengths)[rows], lengths[rows])
    values = log_probs[torch.from_numpy(slots).to(log_probs.device)].float().cpu().numpy()
    parts = np.split(values, np.cumsum(lengths[rows])[:-1]) if len(rows) else []
    found = zip(batch.rows["position"][rows].tolist(), parts, strict=True)
    return {position: part for position, part in found if not np.isnan(part).any()}


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`starts[i], starts[i] + 1, ...`, `lengths[i]` of each, side by side."""
    total = int(lengths.sum())
    return np.arange(total) + np.repeat(starts - _starts(lengths), lengths)
