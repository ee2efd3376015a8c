"""Groups into pairs and judged rows: who is compared with whom, what weighs how much, and that a split changes nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.config import make_config
from miles.data import build_preference_batches
from miles.errors import DataError
from miles.types import MARGIN, Sample, Status


def config(loss_type="dpo", **flags):
    return make_config(loss_type=loss_type, **{"rollout_batch_size": 4, **flags})


def sample(group, index, reward, *, prompt=(1, 2), response=(3, 4, 5), **fields):
    return Sample(
        group_index=group,
        index=index,
        tokens=[*(t + 10 * group for t in prompt), *response],
        response_length=len(response),
        loss_mask=[1] * len(response),
        reward=reward,
        **{"status": Status.COMPLETED, **fields},
    )


def groups_of(*rewards):
    """A group for each list; a response is as long as its sample's index plus one."""
    numbered = iter(range(100))
    return [
        [sample(g, i := next(numbered), r, response=tuple(range(100, 101 + i))) for r in group]
        for g, group in enumerate(rewards)
    ]


def build(groups, loss_type="dpo", dp_size=1, as_one_step=False, **flags):
    return build_preference_batches(
        groups, config=config(loss_type, **flags), rollout_id=3, dp_size=dp_size, as_one_step=as_one_step
    )


def test_best_and_worst_of_a_group_are_a_pair():
    built = build(groups_of([0.2, 0.9, 0.5], [1.0, 0.0], [0.5, 0.5], [3.0, -1.0, 3.0]))
    (batch,) = built.batches
    found = {}
    for pair, preferred, index in zip(
        *(batch.rows[k].tolist() for k in ("pair", "preferred", "sample_index")), strict=True
    ):
        found.setdefault(pair, {})[preferred] = index
    assert list(found.values()) == [{1: 1, 0: 0}, {1: 3, 0: 4}, {1: 7, 0: 8}]
    np.testing.assert_allclose(batch.rows["loss_weight"], 1 / 3)
    assert built.metrics["rollout/pairs"] == 3
    assert built.advantages == [-1.0, 1.0, None, 1.0, -1.0, None, None, 1.0, -1.0, None]


def test_samples_that_cannot_be_trained_on_are_not_chosen():
    groups = groups_of([1.0, 0.5, 0.0, 0.2], [1.0, 0.0])
    groups[0][0].status, groups[0][0].reward = Status.FAILED, None
    groups[0][2].loss_mask = [0] * groups[0][2].response_length
    groups[1][0].remove_sample = True
    (batch,) = build(groups, rollout_batch_size=2).batches
    assert sorted(batch.rows["sample_index"].tolist()) == [1, 3]


def test_margins_of_the_rows():
    groups = groups_of([1.0, 0.0], [1.0, 0.0])
    for s in groups[1]:
        s.metadata[MARGIN] = 0.75
    (batch,) = build(groups, rollout_batch_size=2).batches
    assert batch.rows["margin"].tolist() == [0, 0, 0.75, 0.75]


def test_steps_are_made_of_groups_in_order():
    built = build(groups_of(*[[1.0, 0.0]] * 3, [1.0, 1.0]), num_steps_per_rollout=2)
    (batch,) = built.batches
    rows = [np.concatenate(step) for step in batch.steps]
    assert [batch.rows["sample_index"][mine].tolist() for mine in rows] == [[0, 1, 2, 3], [4, 5]]
    assert [batch.rows["loss_weight"][mine].tolist() for mine in rows] == [[0.5] * 4, [1.0] * 2]
    assert [(t.num_trajectories, t.num_rows) for t in batch.totals] == [(2, 4), (1, 2)]
    with pytest.raises(DataError, match="got 3 groups: they do not fill --num-steps-per-rollout 2"):
        build(groups_of(*[[1.0, 0.0]] * 3), num_steps_per_rollout=2)
    assert len(build(groups_of(*[[1.0, 0.0]] * 3), num_steps_per_rollout=2, as_one_step=True).batches[0].steps) == 1


@given(
    rewards=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=4), min_size=1, max_size=9),
    dp_size=st.integers(1, 3),
    balance=st.booleans(),
    max_tokens=st.none() | st.integers(1, 60),
)
def test_pairs_are_whole_and_weigh_one_together(rewards, dp_size, balance, max_tokens):
    flags = {} if max_tokens is None else {"use_dynamic_batch_size": True, "max_tokens_per_gpu": max_tokens}
    batches = build(
        groups_of(*rewards), dp_size=dp_size, rollout_batch_size=len(rewards), balance_data=balance, **flags
    ).batches
    pairs = sum(len(set(group)) > 1 for group in rewards)
    seen = []
    for batch in batches:
        for micro in (rows for step in batch.steps for rows in step):
            pair, preferred = batch.rows["pair"][micro], batch.rows["preferred"][micro]
            assert sorted(pair[preferred == 1]) == sorted(pair[preferred == 0])
            seen += pair[preferred == 1].tolist()
    assert len(seen) == len(set(seen)) == pairs
    weights = np.concatenate([batch.rows["loss_weight"][batch.rows["preferred"] == 1] for batch in batches])
    assert weights.sum() == pytest.approx(1.0 if pairs else 0.0)


def test_judged_answers_are_rows_and_meet_other_prompts():
    built = build(groups_of([1.0], [0.0], [1.0], [0.0, 1.0]), "kto", num_steps_per_rollout=2)
    (batch,) = built.batches
    assert batch.rows["preferred"].tolist() == [1, 0, 1, 0, 1]
    assert "pair" not in batch.rows
    assert batch.rows["loss_weight"].tolist() == pytest.approx([1 / 2] * 2 + [1 / 3] * 3)
    assert built.metrics["rollout/desirable_ratio"] == 0.6
    others = batch.mismatched
    ends = np.cumsum(others.rows["total_lengths"])
    tokens = [part.tolist() for part in np.split(others.ragged["tokens"], ends[:-1])]
    # A prompt of group g is 10 g + 1, 10 g + 2; a response counts from 100 to its sample's number.
    assert [row[:2] for row in tokens] == [[1, 2], [11, 12], [21, 22], [31, 32], [31, 32]]
    assert [row[-1] - 100 for row in tokens] == [1, 0, 4, 2, 4]
    assert others.rows["loss_weight"].tolist() == [1, 1, 1, 1, 0]
    assert [len(step) for step in others.steps] == [len(step) for step in batch.steps]


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=8), dp_size=st.integers(1, 3))
def test_a_mismatched_response_is_never_of_the_same_prompt(sizes, dp_size):
    groups = groups_of(*[[1.0] * size for size in sizes])
    batches = build(groups, "kto", dp_size=dp_size, rollout_batch_size=max(len(sizes), 2)).batches
    group_of = {s.index: g for g, group in enumerate(groups) for s in group}
    for batch in batches:
        others = batch.mismatched
        parts = np.split(others.ragged["tokens"], np.cumsum(others.rows["total_lengths"])[:-1])
        for tokens, weight in zip(parts[: len(others.rows["loss_weight"])], others.rows["loss_weight"], strict=True):
            assert (group_of[int(tokens[-1]) - 100] != int(tokens[0]) // 10) == bool(weight)
    if len(sizes) > 1 and max(sizes) * 2 <= sum(sizes):
        assert all((batch.mismatched.rows["loss_weight"] == 1).all() for batch in batches)


def test_a_mismatched_response_is_cut_to_the_longest_row():
    """Prompts of 2 and 6 tokens, responses of 4 and 2, at most 7 tokens: 2 + 2 fits, of 6 + 4 one token does."""
    short = sample(0, 0, 1.0, response=(3, 4, 5, 6))
    long = sample(1, 1, 0.0, prompt=range(6), response=(7, 8))

    def crossed(seq_length):
        (batch,) = build([[short], [long]], "kto", rollout_batch_size=2, seq_length=seq_length).batches
        rows = batch.mismatched.rows
        return rows["total_lengths"].tolist(), rows["response_lengths"].tolist(), rows["loss_weight"].tolist()

    assert crossed(8) == ([4, 8], [2, 2], [1, 1])
    assert crossed(7) == ([4, 7], [2, 1], [1, 1])
    # Nothing is left: the row is not compared.
    assert crossed(6)[2] == [1, 0]
    short.loss_mask = [0, 1, 1, 1]
    assert crossed(7)[2] == [1, 0]


def test_a_group_without_answers_or_difference_leaves_an_empty_step():
    (batch,) = build(groups_of([0.5, 0.5]), rollout_batch_size=1).batches
    assert batch.num_rows == 0
    assert [len(rows) for step in batch.steps for rows in step] == [0]
