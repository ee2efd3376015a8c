"""Columns of many samples against `check_sample`, one by one, whichever way they are read."""

from dataclasses import fields, replace

import numpy as np
import pytest

from miles.data import check_sample
from miles.data.rows import TrainRows, check_samples
from miles.errors import DataError
from miles.types import Sample, Status


def random_samples(seed: int, count: int = 12, *, log_probs: bool = True) -> list[Sample]:
    """As engines make them: lists of plain numbers. Some responses are empty."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        prompt, response = int(rng.integers(1, 6)), int(rng.integers(0, 5))
        samples.append(
            Sample(
                group_index=index // 4,
                index=index,
                trajectory_id=None if rng.integers(2) else int(rng.integers(100, 104)),
                tokens=rng.integers(0, 2**40, prompt + response).tolist(),
                response_length=response,
                loss_mask=None if rng.integers(2) else rng.integers(0, 2, response).tolist(),
                rollout_log_probs=rng.normal(size=response).tolist() if log_probs else None,
                temperature=float(rng.choice([0.0, 0.5, 1.0])),
                status=Status.TRUNCATED if rng.integers(2) else Status.COMPLETED,
            )
        )
    return samples


def expected(samples: list[Sample]) -> dict[str, list]:
    rows = [check_sample(sample) for sample in samples]
    return {
        "tokens": [token for row in rows for token in row.tokens.tolist()],
        "loss_mask": [entry for row in rows for entry in row.loss_mask.tolist()],
        "rollout_log_probs": [
            value
            for row in rows
            for value in (np.zeros(len(row.loss_mask)) if row.rollout_log_probs is None else row.rollout_log_probs)
        ],
        "loss_scale": None
        if all(row.loss_scale is None for row in rows)
        else [v for row in rows for v in (np.ones(len(row.loss_mask)) if row.loss_scale is None else row.loss_scale)],
        "has_log_probs": [row.rollout_log_probs is not None for row in rows],
        "total_lengths": [len(row.tokens) for row in rows],
        "response_lengths": [len(row.loss_mask) for row in rows],
        "trained_tokens": [row.trained_tokens for row in rows],
        "temperature": [row.temperature for row in rows],
        "index": [row.index for row in rows],
        "trajectory_id": [row.trajectory_id for row in rows],
        "group_index": [row.group_index for row in rows],
    }


def columns(rows: TrainRows) -> dict[str, list]:
    values = {f.name: getattr(rows, f.name) for f in fields(rows)}
    return {name: None if value is None else value.tolist() for name, value in values.items()}


#: What one sample may be, which keeps the batch from being read as plain lists, or nearly does.
UNLIKE = {
    "plain": {},
    "arrays": {"tokens": np.arange(6), "response_length": 2, "loss_mask": np.array([1, 0]), "rollout_log_probs": None},
    "tuples": {"tokens": (1, 2, 3), "response_length": 1, "loss_mask": (True,), "rollout_log_probs": (-1,)},
    "whole numbers": {"tokens": [1, 2], "response_length": 1, "loss_mask": [1.0], "rollout_log_probs": [-1]},
    "no log-probs": {"tokens": [1, 2], "response_length": 1, "loss_mask": None, "rollout_log_probs": []},
    "a masked infinity": {
        "tokens": [1, 2, 3],
        "response_length": 2,
        "loss_mask": [0, 1],
        "rollout_log_probs": [-np.inf, -1.0],
    },
    "temperature 1": {"temperature": 1},
    "scaled": {
        "tokens": [1, 2, 3],
        "response_length": 2,
        "loss_mask": [1, 1],
        "rollout_log_probs": [-1.0, -2.0],
        "loss_scale": [0.5, 2.0],
    },
}


@pytest.mark.parametrize("log_probs", [True, False])
@pytest.mark.parametrize("unlike", UNLIKE)
@pytest.mark.parametrize("seed", range(5))
def test_rows_are_those_of_each_sample(seed, unlike, log_probs):
    samples = random_samples(seed, log_probs=log_probs)
    samples[3] = replace(samples[3], **UNLIKE[unlike])
    rows = check_samples(samples)
    assert columns(rows) == expected(samples)
    made = {f.name: getattr(rows, f.name) for f in fields(rows)}
    assert {name: "f4" if column is None else column.dtype.str[1:] for name, column in made.items()} == {
        **dict.fromkeys(expected(samples), "i8"),
        "loss_scale": "f4",
        "loss_mask": "u1",
        "has_log_probs": "b1",
        "rollout_log_probs": "f4",
        "temperature": "f4",
    }


def test_no_samples_are_no_rows():
    assert columns(check_samples([])) == expected([])
    assert len(check_samples([])) == 0


@pytest.mark.parametrize("order", [[], [0], [5, 2, 2, 11], list(range(11, -1, -1))])
def test_taken_rows_are_those_of_their_samples(order):
    samples = random_samples(1)
    rows = check_samples(samples).take(np.array(order, dtype=np.int64))
    assert columns(rows) == expected([samples[i] for i in order])


@pytest.mark.parametrize(
    "change",
    [
        {"status": Status.FAILED},
        {"tokens": [1, -1, 2], "response_length": 0},
        {"tokens": [2**64, 1], "response_length": 0},
        {"tokens": [True, False], "response_length": 0},
        {"response_length": 99},
        {"response_length": True},
        {"loss_mask": [2] * 50},
        {"loss_mask": [-1]},
        {"loss_mask": [256]},
        {"rollout_log_probs": [float("nan")]},
        {"rollout_log_probs": ["-1.0"]},
        {"temperature": float("inf")},
        {"temperature": -0.5},
        {"temperature": None},
        {"index": "3"},
        {"index": 2**62},
        {"group_index": None},
        {"trajectory_id": 1.5},
        {"loss_scale": [-1.0]},
        {"loss_scale": [1.0, 1.0]},
        {"loss_scale": [float("inf")]},
    ],
)
def test_a_broken_sample_among_others_is_named(change):
    samples = random_samples(2)
    sample = replace(samples[3], tokens=[1, 2], response_length=1, loss_mask=[1], rollout_log_probs=[-1.0])
    change = {"loss_mask": None, "rollout_log_probs": []} | change if change.get("response_length") == 0 else change
    samples[3] = replace(sample, **change)
    with pytest.raises(DataError) as alone:
        check_sample(samples[3])
    with pytest.raises(DataError) as among:
        check_samples(samples)
    assert str(among.value) == str(alone.value)
