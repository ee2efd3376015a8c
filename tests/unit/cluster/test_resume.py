"""What a start says about what it found, and where it goes on."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from miles.cluster.resume import find_run_before, look, run_before, tidy
from miles.config import make_config
from miles.errors import CheckpointError, UserError
from miles.observe import RunLock, RunState, StateFile
from miles.trainers import checkpoints
from tests.unit.trainers.test_checkpoints import name, write

AT = time.mktime((2026, 11, 21, 12, 3, 11, 0, 0, -1))


def state(outcome: str = "killed", phase: str = "train", step: int = 5, error: str = "") -> RunState:
    return RunState(outcome, phase, step, 0, 60, AT, AT, 1, error)  # type: ignore[arg-type]


def config(root: Path, **flags: Any) -> Any:
    return make_config(**{"load": str(root), "save": str(root), "ref_load": "model", **flags})


def notes(root: Path, before: RunState | None) -> list[str]:
    found = None if before is None else (Path("runs/x"), before)
    return list(look(config(root), num_rollout=60, has_prompts=True, before=found).notes)


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (None, []),
        (
            state(),
            ["found a run in runs/x, which was killed while training rollout 4, begun at 2026-11-21 12:03:11"],
        ),
        (
            state("failed", "save", 5, "EngineError: no; see x.log, which ends in:"),
            ["found a run in runs/x, which failed at 2026-11-21 12:03:11 while saving checkpoint 5: EngineError: no"],
        ),
        (
            state("interrupted", "start", 0),
            ["found a run in runs/x, which was interrupted at 2026-11-21 12:03:11 while starting"],
        ),
        (
            state("finished", "save", 3),
            ["found a run in runs/x, which finished at 2026-11-21 12:03:11, after step 3 of 60"],
        ),
    ],
)
def test_how_the_run_before_ended_and_what_is_done_again(
    tmp_path: Path, before: RunState | None, said: list[str]
) -> None:
    write(tmp_path, 2, 3)
    again = "; rollouts 3 to 4 are done again" if before is not None and before.step == 5 else ""
    assert notes(tmp_path, before) == [
        *said,
        f"continuing with rollout 3 (step 4 of 60) from {tmp_path / name(3)}{again}",
    ]
    if again:
        write(tmp_path, 4)
        assert notes(tmp_path, before)[-1].endswith("; rollout 4 is done again")
        write(tmp_path, 5)
        assert notes(tmp_path, before)[-1].endswith(name(5))


def test_what_another_kind_of_run_cannot_continue_is_refused_before_any_process(tmp_path: Path) -> None:
    write(tmp_path, 2)
    with pytest.raises(CheckpointError, match=f"{name(2)}, got no critic: a run without one wrote it"):
        look(config(tmp_path, advantage_estimator="ppo"), num_rollout=60, has_prompts=True, before=None)
    saved = tmp_path / name(2) / checkpoints.STATE
    given = {**json.loads(saved.read_text()), "optimizer": "adam"}
    shutil.rmtree(tmp_path / name(2))
    checkpoints.partial_directory(tmp_path, 2).mkdir()
    (checkpoints.partial_directory(tmp_path, 2) / checkpoints.STATE).write_text(json.dumps(given))
    checkpoints.finish(tmp_path, 2)
    look(config(tmp_path), num_rollout=60, has_prompts=True, before=None)
    with pytest.raises(
        CheckpointError, match=r"--optimizer, got sgd: .* holds the state of adam; take --optimizer adam"
    ):
        look(config(tmp_path, optimizer="sgd"), num_rollout=60, has_prompts=True, before=None)


def test_a_torn_checkpoint_is_said_put_aside_and_written_again(tmp_path: Path) -> None:
    write(tmp_path, 2, 3)
    (tmp_path / name(3) / "empty").unlink()
    (tmp_path / "iter_0000004.tmp").mkdir()
    resume = look(config(tmp_path), num_rollout=60, has_prompts=True, before=None)
    assert resume.notes[0] == f"warning: not used: checkpoint {tmp_path / name(3)}, got no empty: the manifest lists it"
    assert (resume.start, resume.data_state, resume.checkpoint) == (2, {"n": 2}, tmp_path / name(2))
    elsewhere = tmp_path / "elsewhere"
    assert list(tidy(config(tmp_path, save=str(elsewhere)), resume)) == []
    assert (tmp_path / name(3)).is_dir(), "a --load that is only read stays as it is"
    assert list(tidy(config(tmp_path), resume)) == [
        f"put aside: {tmp_path / name(3)}.torn",
        f"removed from {tmp_path}, never finished: iter_0000004.tmp",
    ]
    assert checkpoints.latest_iteration(tmp_path) == 2


def test_a_first_start_says_nothing_and_one_without_a_checkpoint_that_it_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "iter_0000001.tmp").mkdir()
    lines = notes(tmp_path, state(step=1))
    assert lines[1:] == [f"no checkpoint in {tmp_path}: beginning with rollout 0 from {Path('model').resolve()}"]
    fresh = look(config(tmp_path, load=None), num_rollout=1, has_prompts=True, before=None)
    assert (fresh.start, fresh.checkpoint, fresh.notes) == (0, None, ())


def test_nothing_left_to_train_and_a_checkpoint_that_cannot_be_continued(tmp_path: Path) -> None:
    write(tmp_path, 3)
    with pytest.raises(
        UserError, match=r"--num-rollout, got 3: .* has 3 rollouts already, so there is nothing to train"
    ):
        look(config(tmp_path), num_rollout=3, has_prompts=True, before=None)
    partial = checkpoints.partial_directory(tmp_path, 4)
    partial.mkdir()
    (partial / "trainer.json").write_text('{"iteration": 4, "extra": {"rollout": {}}}')
    checkpoints.finish(tmp_path, 4)
    with pytest.raises(CheckpointError, match="4 rollouts without a data state"):
        look(config(tmp_path), num_rollout=9, has_prompts=True, before=None)
    assert look(config(tmp_path), num_rollout=9, has_prompts=False, before=None).start == 4


@pytest.mark.parametrize("load", [None, "elsewhere"])
def test_checkpoints_of_another_run_are_never_mixed_with_ones_own(tmp_path: Path, load: str | None) -> None:
    save = write(tmp_path / "save", 3, 8)
    load = str(write(tmp_path / load, 5)) if load else None
    begins = f"--load is {load}" if load else "there is no --load"
    with pytest.raises(CheckpointError) as refused:
        look(config(save, load=load), num_rollout=9, has_prompts=True, before=None)
    assert str(refused.value) == (
        f"--save, got {save}: it holds checkpoints up to iteration 8, which this run does not continue ({begins}) and would "
        f"mix with its own; add --load {save} to continue them, or name another directory"
    )
    # Going back within the series is no mixing, nor is a directory that holds nothing yet.
    assert look(config(save, load=str(save / name(3))), num_rollout=9, has_prompts=True, before=None).start == 3
    empty = str(tmp_path / "empty")
    assert look(config(save, load=load, save=empty), num_rollout=9, has_prompts=True, before=None).start in (0, 5)


def test_the_run_before_is_found_through_its_directory_or_its_checkpoints(tmp_path: Path) -> None:
    assert run_before([tmp_path], locked=[tmp_path]) is None
    (tmp_path / "old").mkdir()
    StateFile(tmp_path / "old" / "state.json", num_rollout=9)
    directory, found = run_before([tmp_path, tmp_path / "old"]) or (None, None)
    assert (directory, found.outcome) == (tmp_path / "old", "killed")
    other = RunLock.take(tmp_path / "old", tmp_path / "old", flag="--run-dir", note=print)
    found = (run_before([tmp_path / "old"], locked=[tmp_path]) or (None, None))[1]
    assert found.outcome == "running", "another run has its directory"
    assert (run_before([tmp_path / "old"], locked=[tmp_path / "old"]) or (None, None))[1].outcome == "killed"
    other.release()
    assert find_run_before(config(tmp_path, run_dir=str(tmp_path / "old")))[0] == tmp_path / "old"
    assert find_run_before(config(tmp_path)) is None
