"""Loss weights: the three aggregations worked by hand, and that no split or masked row changes the step's loss."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.algo import loss_weights
from miles.errors import ConfigError

MODES = ("seq_mean", "token_mean", "constant")


def weights(tokens, trajectory=None, mode="seq_mean", constant_length=None):
    trajectory = np.arange(len(tokens)) if trajectory is None else np.array(trajectory)
    return loss_weights(np.array(tokens, dtype=np.int64), trajectory, mode=mode, constant_length=constant_length)


def test_seq_mean():
    # trajectory 0: 1 + 3 tokens over two rows, trajectory 1: 2 tokens; two trajectories
    np.testing.assert_allclose(weights([1, 2, 3], [0, 1, 0]), [1 / 8, 1 / 4, 1 / 8])


def test_token_mean():
    np.testing.assert_allclose(weights([1, 2, 3], [0, 1, 0], "token_mean"), [1 / 6] * 3)


def test_constant():
    np.testing.assert_allclose(weights([1, 2, 3], [0, 1, 0], "constant", 10), [1 / 20] * 3)


@pytest.mark.parametrize("mode", MODES)
def test_fully_masked_rows_are_out_of_every_denominator(mode):
    with_masked = weights([0, 4, 0, 2, 0], [9, 1, 1, 2, 8], mode, 16)
    np.testing.assert_array_equal(with_masked[[0, 2, 4]], 0)
    np.testing.assert_array_equal(with_masked[[1, 3]], weights([4, 2], [1, 2], mode, 16))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_train_on_weighs_nothing(mode):
    np.testing.assert_array_equal(weights([0, 0], mode=mode, constant_length=4), [0, 0])
    assert weights([], mode=mode, constant_length=4).shape == (0,)


@given(st.data())
def test_seq_mean_is_the_mean_of_trajectory_means(data):
    trajectories = data.draw(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=6))
    tokens = np.concatenate(trajectories)
    owner = np.repeat(np.arange(len(trajectories)), [len(t) for t in trajectories])
    losses = [np.random.default_rng(int(i)).normal(size=n) for i, n in enumerate(tokens)]
    got = sum(w * loss.sum() for w, loss in zip(weights(tokens, owner), losses, strict=True))
    of_trajectory = [np.concatenate([losses[i] for i in np.flatnonzero(owner == t)]) for t in range(len(trajectories))]
    means = [x.mean() for x in of_trajectory if len(x)]
    assert got == pytest.approx(np.mean(means) if means else 0.0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=12), st.sampled_from(MODES), st.randoms())
def test_order_of_rows_does_not_matter(rows, mode, random):
    tokens, owner = [t for t, _ in rows], [o for _, o in rows]
    order = list(range(len(rows)))
    random.shuffle(order)
    got = weights([tokens[i] for i in order], [owner[i] for i in order], mode, 7)
    np.testing.assert_array_equal(got, weights(tokens, owner, mode, 7)[order])


def test_splitting_a_trajectory_into_rows_changes_no_token_weight():
    whole = weights([6, 3], [0, 1])
    split = weights([2, 4, 3], [0, 0, 1])
    np.testing.assert_array_equal(split, whole[[0, 0, 1]])


def test_unknown_mode_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'seq_mean'"):
        weights([1], mode="seqmean")


@pytest.mark.parametrize("length", [None, 0])
def test_constant_needs_a_length(length):
    with pytest.raises(ValueError, match="at least 1 token"):
        weights([1], mode="constant", constant_length=length)


def test_shapes_and_counts_are_checked():
    with pytest.raises(ValueError, match="both must be"):
        weights([1, 2], [0])
    with pytest.raises(ValueError, match="negative"):
        weights([1, -2])
