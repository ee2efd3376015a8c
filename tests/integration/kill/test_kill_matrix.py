"""Some of the cases of `python -m tests.integration.kill.matrix`: each victim and each phase at least once."""

from __future__ import annotations

import pytest

from .matrix import run_case, untouched


@pytest.fixture(scope="module")
def reference(task, tmp_path_factory):
    return untouched(task, tmp_path_factory.mktemp("untouched") / "x")


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("victim", "phase"),
    [
        ("driver", "saving"),
        ("driver", "weight_sync"),
        ("trainer", "training"),
        ("rollout_manager", "reward"),
        ("engine", "generation"),
    ],
)
def test_killed_and_run_again_equals_never_touched(task, tmp_path, reference, victim, phase):
    result = run_case(task, tmp_path / "x", reference, victim, phase)
    assert not result.differences, result.last.output


@pytest.mark.timeout(400)
def test_the_driver_that_is_one_step_ahead(task, tmp_path):
    """The trainer dies while the next rollout is generated."""
    reference = untouched(task, tmp_path / "untouched", "train_async.py")
    result = run_case(task, tmp_path / "x", reference, "trainer", "training", "train_async.py")
    assert not result.differences, result.last.output
