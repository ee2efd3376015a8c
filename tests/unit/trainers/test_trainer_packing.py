"""Packing a TrainBatch: what predicts what, and where scores go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.errors import DataError
from miles.trainers.megatron.attention import PackedSequences
from miles.trainers.megatron.packing import pack, split_rows
from miles.types import StepTotals, TrainBatch

_CPU = torch.device("cpu")


def _batch(lengths: list[tuple[int, int]], steps: tuple[tuple[np.ndarray, ...], ...]) -> TrainBatch:
    total, response = np.array([t for t, _ in lengths], np.int64), np.array([r for _, r in lengths], np.int64)
    rows = len(lengths)
    # A token is 100 * row + position, so that every packed value says where it came from.
    tokens = np.concatenate([100 * row + np.arange(n) for row, n in enumerate(total)])
    return TrainBatch(
        rollout_id=0,
        rows={
            "total_lengths": total,
            "response_lengths": response,
            "rewards": np.arange(rows, dtype=np.float32) + 0.5,
            "temperature": np.arange(rows, dtype=np.float32) + 1,
            "loss_weight": np.arange(rows, dtype=np.float32) + 0.25,
            "sample_index": np.arange(rows) + 50,
        },
        ragged={
            "tokens": tokens.astype(np.int64),
            "loss_mask": (np.arange(response.sum()) % 3 > 0).astype(np.uint8),
            "rollout_log_probs": -np.arange(response.sum(), dtype=np.float32),
        },
        steps=steps,
        totals=(StepTotals(rows, int(response.sum()), rows),),
    )


_ROWS = st.lists(
    st.integers(2, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))), min_size=1, max_size=8
)


@settings(max_examples=60, deadline=None)
@given(lengths=_ROWS, seed=st.integers(0, 99), share=st.booleans())
def test_every_response_token_is_predicted_by_the_one_before_it(
    lengths: list[tuple[int, int]], seed: int, share: bool
) -> None:
    order = np.random.default_rng(seed).permutation(len(lengths))
    batch = _batch(lengths, (tuple(np.array_split(order, 2)),))
    seen = []
    for micro_batch in pack(batch, _CPU, share_prompts=share)[0]:
        tokens = micro_batch.tokens[0]
        assert torch.equal(tokens[micro_batch.predictors] + 1, micro_batch.targets)
        source = micro_batch.targets // 100
        assert torch.equal(micro_batch.temperatures, source + 1.0)
        assert torch.equal(micro_batch.advantages, source + 0.5)
        assert torch.equal(micro_batch.token_weights, (source + 0.25) * micro_batch.loss_mask)
        assert torch.equal(micro_batch.loss_mask, micro_batch.slots % 3 > 0)
        assert micro_batch.rollout_log_probs is not None
        assert torch.equal(micro_batch.rollout_log_probs, -micro_batch.slots.float())
        assert (micro_batch.row.diff() >= 0).all()
        assert len(tokens) == max(1, sum(lengths[r][0] - 1 for r in {int(t) // 100 for t in tokens})) or not len(source)
        seen += micro_batch.slots.tolist()
    assert sorted(seen) == list(range(sum(r for _, r in lengths)))


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    share=st.booleans(),
)
def test_pairs_are_found_again_however_rows_are_packed(
    pairs: list[tuple[int, int, int]], seed: int, share: bool
) -> None:
    lengths = [(prompt + n, n) for prompt, chosen, rejected in pairs for n in (chosen, rejected)]
    order = np.random.default_rng(seed).permutation(len(lengths))
    number = np.arange(len(lengths)) // 2
    batch = _batch([lengths[i] for i in order], ((np.arange(len(lengths)), np.array([], np.int64)),))
    batch.rows.update(
        pair=70 - number[order], preferred=(1 - order % 2).astype(np.uint8), margin=number[order].astype(np.float32)
    )
    full, empty = pack(batch, _CPU, share_prompts=share)[0]
    found = full.preferences
    assert found is not None
    assert found.chosen_rows is not None
    assert found.rejected_rows is not None
    assert found.margin is not None
    totals = torch.tensor([lengths[i][0] for i in range(len(lengths))])
    at = found.margin.long()
    assert sorted(at.tolist()) == list(range(len(pairs)))
    assert torch.equal(full.total_lengths[found.chosen_rows], totals[2 * at])
    assert torch.equal(full.total_lengths[found.rejected_rows], totals[2 * at + 1])
    assert found.desirable.nonzero().squeeze(1).tolist() == sorted(found.chosen_rows.tolist())
    weights = torch.from_numpy(batch.rows["loss_weight"])[[order.tolist().index(i) for i in range(len(order))]]
    assert torch.equal(full.row_weights[found.chosen_rows], weights[2 * at])
    assert empty.preferences is not None
    assert empty.preferences.chosen_rows is not None
    assert not len(empty.preferences.chosen_rows)


def test_half_a_pair_is_refused() -> None:
    batch = _batch([(4, 2), (5, 2)], ((np.array([0]), np.array([1])),))
    batch.rows.update(pair=np.zeros(2, np.int64), preferred=np.array([1, 0], np.uint8))
    with pytest.raises(DataError, match="1 chosen and 0 rejected"):
        pack(batch, _CPU, share_prompts=True)


def test_an_empty_micro_batch_is_one_token_that_predicts_nothing() -> None:
    ((full, empty),) = pack(_batch([(4, 2)], ((np.array([0]), np.array([], np.int64)),)), _CPU, share_prompts=True)
    assert full.num_rows == 1
    assert empty.num_rows == 0
    assert empty.tokens.shape == (1, 1)
    assert len(empty.targets) == len(empty.slots) == 0
    assert empty.rollout_log_probs is not None


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_every_row_reads_itself_from_a_packing_with_shared_prompts(rows: list[tuple[int, int, int]], seed: int) -> None:
    """A prompt is (length, kind): tokens are 100 * kind + position, those of the response are 1000 * row + position."""
    prompts = [100 * kind + np.arange(length) for length, kind, _ in rows]
    responses = [1000 * (number + 1) + np.arange(response) for number, (_, _, response) in enumerate(rows)]
    batch = _batch(
        [(length + response, response) for length, _, response in rows],
        ((np.random.default_rng(seed).permutation(len(rows)),),),
    )
    whole = [np.concatenate(parts) for parts in zip(prompts, responses, strict=True)]
    batch.ragged["tokens"][:] = np.concatenate(whole)
    ((packed,),) = pack(batch, _CPU, share_prompts=True)

    tokens, seen = packed.tokens[0], _visible(packed.sequences)
    read = [tokens[seen[p]].tolist() for p in packed.predictors.tolist()]
    owner = np.repeat(np.arange(len(rows)), [len(r) for r in responses])[packed.slots.numpy()]
    position = np.concatenate([np.arange(len(r)) for r in responses])[packed.slots.numpy()]
    for context, target, row, at in zip(read, packed.targets.tolist(), owner, position, strict=True):
        assert context == whole[row][: len(prompts[row]) + at].tolist()
        assert target == whole[row][len(prompts[row]) + at]
    for token, context in enumerate(seen):
        assert packed.sequences.positions[token] == len(context) - 1
    assert len(packed.slots) == len(owner) == sum(map(len, responses))
    kinds = {(length, kind) for length, kind, _ in rows}
    if all(r <= 6 and length * 10 >= length + r for length, _, r in rows):
        # Every prompt once; a row alone leaves its last token out, and keeps at least one.
        alone = {k for k in kinds if sum((length, kind) == k for length, kind, _ in rows) == 1}
        own = sum(max(r - 1, 0) for length, kind, r in rows if (length, kind) not in alone)
        own += sum(max(length + r - 1, 1) for length, kind, r in rows if (length, kind) in alone)
        assert len(tokens) == own + sum(length for length, _ in kinds - alone)


def _visible(sequences: PackedSequences) -> list[torch.Tensor]:
    """The tokens that each token sees, itself last, read off the blocks."""
    seen = []
    for block in sequences.blocks:
        slots = torch.arange(block.stop - block.start) if block.slots is None else block.slots
        for token, slot in zip(range(block.start, block.stop), slots.tolist(), strict=True):
            row, at = divmod(slot, block.length)
            before = torch.arange(0)
            if block.prefixes is not None:
                first = block.prefixes.start + int(block.prefixes.of_row[row]) * block.prefixes.length
                before = torch.arange(first, first + block.prefixes.length)
            seen.append(torch.cat([before, torch.arange(token - at, token + 1)]))
    return seen


def test_long_responses_do_not_share_their_prompt() -> None:
    lengths = [(3 + 60, 60), (3 + 60, 60)]
    batch = _batch(lengths, ((np.arange(2),),))
    batch.ragged["tokens"][63:66] = batch.ragged["tokens"][:3]
    ((packed,),) = pack(batch, _CPU, share_prompts=True)
    assert packed.tokens.shape == (1, 2 * 62)


def test_a_response_without_a_prompt_is_named() -> None:
    with pytest.raises(DataError, match="sample 51, got 3 tokens of which 3"):
        pack(_batch([(4, 2), (3, 3)], ((np.array([0, 1]),),)), _CPU, share_prompts=True)


def test_scores_go_back_row_by_row() -> None:
    batch = _batch([(4, 2), (3, 0), (5, 3)], ())
    assert [part.tolist() for part in split_rows(np.arange(5), batch)] == [[0, 1], [], [2, 3, 4]]
