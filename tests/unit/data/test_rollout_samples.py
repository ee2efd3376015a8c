"""Rollout samples on disk: nothing lost, nothing half written, broken files named by line."""

import dataclasses

import numpy as np
import pytest

from miles.data import load_rollout_samples, save_rollout_samples
from miles.errors import DataError
from miles.types import Sample, Status


def make_groups():
    def sample(group: int, index: int) -> Sample:
        return Sample(
            group_index=group,
            index=index,
            prompt=[{"role": "user", "content": "é\n"}],
            tokens=[1, 2, 3],
            response="x\u2028y",
            response_length=1,
            label=2**70,
            reward={"acc": 1.0, "nested": [1, None]},
            loss_mask=[1],
            rollout_log_probs=[-0.1234567890123],
            temperature=0.7,
            weight_versions=["0", "1"],
            status=Status.TRUNCATED,
            metadata={"k": {"deep": [1, 2]}},
        )

    return [[sample(0, 0), sample(0, 1)], [sample(4, 8), dataclasses.replace(sample(4, 9), label="é", reward=0.5)]]


def test_round_trip(tmp_path):
    groups = make_groups()
    path = tmp_path / "deep" / "rollout_0.jsonl"
    save_rollout_samples(path, groups)
    assert load_rollout_samples(path) == groups
    assert [p.name for p in path.parent.iterdir()] == ["rollout_0.jsonl"]


def test_arrays_become_lists(tmp_path):
    group = [dataclasses.replace(make_groups()[1][1], tokens=np.arange(3), metadata={"score": np.float32(0.5)})]
    save_rollout_samples(tmp_path / "r.jsonl", [group])
    ((loaded,),) = load_rollout_samples(tmp_path / "r.jsonl")
    assert (loaded.tokens, loaded.metadata) == ([0, 1, 2], {"score": 0.5})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.jsonl"
    groups = make_groups()
    save_rollout_samples(path, groups)

    def breaks_off():
        yield groups[0]
        raise RuntimeError("full")

    with pytest.raises(RuntimeError):
        save_rollout_samples(path, breaks_off())
    assert load_rollout_samples(path) == groups
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("line", ['{"status": "unknown"}', "[1]", "{", "5"])
def test_broken_line_is_named(tmp_path, line):
    path = tmp_path / "r.jsonl"
    save_rollout_samples(path, make_groups())
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"r\.jsonl:5, got a line that is no sample"):
        load_rollout_samples(path)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_rollout_samples(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty"):
        load_rollout_samples(tmp_path / "empty.jsonl")
