"""The data source: every prompt once an epoch, and stopped anywhere it continues as if it had never stopped."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.data import Prompt, PromptData, RolloutDataSource
from miles.data.source import epoch_order
from miles.errors import CheckpointError, DataError
from miles.interfaces import DataSource
from miles.types import Status


def make_prompts(count: int, fingerprint: str = "f") -> PromptData:
    prompts = tuple(Prompt(f"p{i}", [i, i + 1], str(i), {"k": [i]}, i + 1) for i in range(count))
    return PromptData("p.jsonl", prompts, skipped=0, fingerprint=fingerprint)


def make_source(count=5, n=2, shuffle=True, seed=1, **changes) -> RolloutDataSource:
    return RolloutDataSource(make_prompts(count, **changes), n_samples_per_prompt=n, shuffle=shuffle, seed=seed)


def texts(groups) -> list[str]:
    return [group[0].prompt for group in groups]


def test_it_is_a_data_source():
    assert isinstance(make_source(), DataSource)


def test_groups():
    groups = make_source(count=3, n=2, shuffle=False).get_samples(4)
    assert texts(groups) == ["p0", "p1", "p2", "p0"]
    assert [[s.group_index for s in g] for g in groups] == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert [[s.index for s in g] for g in groups] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    sample = groups[1][0]
    assert (sample.tokens, sample.label, sample.metadata, sample.status) == ([1, 2], "1", {"k": [1]}, Status.PENDING)


def test_samples_do_not_share_what_hooks_change():
    source = make_source(count=1, n=2)
    (one, other), (again, _) = source.get_samples(2)
    one.tokens.append(9)
    one.metadata["k"].append(9)
    for sample in (other, again, source.get_samples(1)[0][0]):
        assert (sample.tokens, sample.metadata) == ([0, 1], {"k": [0]})


@given(st.integers(1, 40), st.integers(0, 2**70), st.integers(0, 50), st.booleans())
def test_every_prompt_exactly_once_an_epoch(count, seed, epochs, shuffle):
    source = make_source(count=count, n=1, seed=seed, shuffle=shuffle)
    for epoch in range(min(epochs, 3)):
        assert source.epoch == epoch
        assert sorted(texts(source.get_samples(count))) == sorted(f"p{i}" for i in range(count))


def test_epochs_and_seeds_differ():
    orders = [tuple(epoch_order(50, seed=s, epoch=e)) for s in (0, 1) for e in (0, 1)]
    assert len(set(orders)) == 4
    assert tuple(epoch_order(50, seed=0, epoch=0)) == orders[0]


def test_order_is_fixed_for_all_time():
    """The words of Philox are specified; a checkpoint of years ago continues in the same order."""
    assert epoch_order(8, seed=42, epoch=3).tolist() == FIXED_ORDER


FIXED_ORDER = [1, 6, 3, 4, 5, 2, 0, 7]


def test_shuffle_is_uniform():
    first = np.bincount([epoch_order(4, seed=7, epoch=e)[0] for e in range(2000)], minlength=4)
    assert (abs(first - 500) < 100).all()


def test_buffered_groups_come_first_in_order():
    source = make_source(shuffle=False)
    a, _, c = source.get_samples(3)
    source.add_samples([c, a])
    assert source.num_buffered == 2
    got = source.get_samples(3)
    assert got[0] is c
    assert got[1] is a
    assert got[2][0].group_index == 3


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("get"), st.integers(0, 7)),
        st.tuples(st.just("give back"), st.integers(1, 3)),
        st.tuples(st.just("change"), st.integers(0, 3)),
    ),
    max_size=12,
)


def play(source, operations, held):
    """Applies operations; returns what was fetched. `held` are fetched groups that may be given back."""
    seen = []
    for kind, count in operations:
        if kind == "get":
            groups = source.get_samples(count)
            held += groups
            seen += [[s.to_dict() | {"metadata": dict(s.metadata)} for s in g] for g in groups]
        elif kind == "give back":
            back, held[:] = held[:count], held[count:]
            source.add_samples(back)
        elif held:
            sample = held[count % len(held)][0]
            sample.status, sample.reward = Status.ABORTED, 0.25
            sample.metadata = {**sample.metadata, "attempt": 1}
    return json.loads(json.dumps(seen))


@given(st.integers(1, 6), st.booleans(), OPERATIONS, OPERATIONS)
def test_stop_anywhere_reload_continue(count, shuffle, before, after):
    straight = make_source(count=count, shuffle=shuffle)
    held: list = []
    play(straight, before, held)
    state = json.dumps(straight.state_dict())

    resumed = make_source(count=count, shuffle=shuffle)
    resumed.get_samples(3)  # whatever it did before does not matter
    resumed.load_state_dict(json.loads(state))
    # Groups that are held outside at the stop are their holder's to restore; both runs go on without them.
    assert play(straight, after, []) == play(resumed, after, [])
    assert straight.state_dict() == resumed.state_dict()


@given(OPERATIONS)
def test_indices_are_unique_over_the_run(operations):
    source = make_source(n=3)
    new: dict[int, int] = {}
    for _ in range(2):
        play(source, operations, [])
        restarted = make_source(n=3)
        restarted.load_state_dict(json.loads(json.dumps(source.state_dict())))
        source = restarted
    fetched = source.get_samples(source.num_buffered + 4)
    for group in fetched:
        for sample in group:
            assert new.setdefault(sample.index, sample.group_index) == sample.group_index
            assert sample.index // 3 == sample.group_index
    assert len(new) == sum(map(len, fetched))


def test_state_is_a_snapshot():
    source = make_source()
    groups = source.get_samples(2)
    source.add_samples(groups)
    state = source.state_dict()
    groups[0][0].tokens.append(99)
    groups[0][0].metadata["later"] = True
    assert 99 not in state["buffer"][0][0]["tokens"]
    other = make_source()
    other.load_state_dict(state)
    other.get_samples(1)[0][0].tokens.append(77)
    assert 77 not in state["buffer"][0][0]["tokens"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fingerprint": "other"}, "the prompts of p.jsonl, got other where the checkpoint has f"),
        ({"count": 6}, "the prompts of p.jsonl, got 6 where the checkpoint has 5"),
        ({"n": 4}, "n_samples_per_prompt, got 4 where the checkpoint has 2"),
        ({"seed": 2}, "seed, got 2"),
        ({"shuffle": False}, "shuffle, got False"),
    ],
)
def test_a_state_of_another_stream_is_refused(change, named):
    source = make_source()
    source.get_samples(3)
    other = make_source(**change)
    with pytest.raises(CheckpointError, match=named):
        other.load_state_dict(source.state_dict())
    assert other.get_samples(1)[0][0].group_index == 0


def test_nothing_to_sample_from():
    with pytest.raises(DataError, match=r"p\.jsonl, got no prompts \(3 were too long\)"):
        RolloutDataSource(
            dataclasses.replace(make_prompts(0), skipped=3), n_samples_per_prompt=1, shuffle=False, seed=0
        )
    with pytest.raises(DataError, match="n_samples_per_prompt, got 0"):
        make_source(n=0)
