"""state.json and run.lock: how a run ended, and that one run at a time writes to a directory."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import orjson
import pytest

from miles.errors import ConfigError
from miles.observe import RunLock, StateFile, read_run_state, run_lock

_HOLDER = """
import sys, subprocess
from pathlib import Path
from miles.observe import RunLock, StateFile
lock = RunLock.take(Path(sys.argv[1]), Path(sys.argv[1]), flag="--run-dir", note=print)
StateFile(Path(sys.argv[1]) / "state.json", num_rollout=9).phase("train", 4)
if len(sys.argv) > 2:  # a guardian, which outlives its driver
    subprocess.Popen(["sleep", sys.argv[2]], pass_fds=[lock.fd])
print("held", flush=True)
sys.stdin.read()
"""


def holder(directory: Path, *guardian_s: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(directory), *guardian_s],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def take(directory: Path) -> tuple[RunLock, list[str]]:
    notes: list[str] = []
    return RunLock.take(directory, directory, flag="--run-dir", note=notes.append), notes


def test_a_directory_in_use_is_refused_by_the_process_and_a_killed_run_is_told_from_a_running_one(tmp_path):
    process = holder(tmp_path)
    try:
        state = read_run_state(tmp_path)
        assert (state.outcome, state.phase, state.step, state.num_rollout) == ("running", "train", 4, 9)
        with pytest.raises(
            ConfigError, match=rf"--run-dir, got {tmp_path}: process {process.pid} on .* since .*; wait"
        ):
            take(tmp_path)
    finally:
        process.kill()
        process.wait()
    assert read_run_state(tmp_path).outcome == "killed"
    lock, notes = take(tmp_path)
    assert not notes
    assert run_lock.owner(tmp_path).run_dir == str(tmp_path)
    lock.release()
    lock.release()
    assert not run_lock.is_held(tmp_path)


def test_a_directory_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"--run-dir, got .*/file/run: it cannot be written \(Not a directory\); name"
    ):
        take(tmp_path / "file" / "run")


def test_what_is_left_of_a_killed_run_is_waited_for(tmp_path):
    process = holder(tmp_path, "1.5")
    process.kill()
    process.wait()
    assert run_lock.is_held(tmp_path)
    lock, notes = take(tmp_path)
    assert notes == [f"waiting for the processes of the run that was killed in {tmp_path} to end"]
    lock.release()


@pytest.mark.parametrize(
    ("outcome", "error", "line"),
    [
        ("finished", None, ""),
        ("failed", ValueError("one\ntwo"), "one"),
        ("interrupted", KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_the_end_is_kept_with_its_reason(tmp_path, outcome, error, line):
    file = StateFile(tmp_path / "state.json", num_rollout=3, first_step=1)
    assert (file.state.phase, file.state.step) == ("start", 1)
    file.phase("save", 2)
    before = time.time()
    file.end(outcome, error)
    state = read_run_state(tmp_path)
    assert (state.outcome, state.error, state.first_step, state.step) == (outcome, line, 1, 2)
    assert state.started <= before <= state.updated


def test_a_phase_is_written_in_place_and_read_whole_at_any_moment(tmp_path):
    file = StateFile(tmp_path / "state.json", num_rollout=3)
    inode = file.path.stat().st_ino
    phases = ["save", "update_weights" * 10]
    done = threading.Event()

    def write() -> None:
        for number in range(4000):
            file.phase(phases[number % 2], number)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not done.is_set():
            state = read_run_state(tmp_path)
            assert (state.phase, state.step) == ("start", 0) or state.phase == phases[state.step % 2]
    finally:
        writer.join()
    assert read_run_state(tmp_path).step == 3999
    assert file.path.stat().st_ino == inode
    file.end("failed", ValueError("x" * 5000))
    assert read_run_state(tmp_path).error == "x" * 5000


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", orjson.dumps({"outcome": "running"})])
def test_a_state_file_that_says_nothing_is_none(tmp_path, content):
    assert read_run_state(tmp_path) is None
    (tmp_path / "state.json").write_bytes(content)
    assert read_run_state(tmp_path) is None
