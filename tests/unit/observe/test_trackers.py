"""Each tracker in its offline form, with what it was given read back; and trackers that fail, hang, lag or are continued."""

from __future__ import annotations

import math
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from miles.config import make_config, public_dict
from miles.observe import MetricsFile, RunDir, Trackers
from miles.observe.trackers import check, enabled
from miles.observe.trackers.__main__ import Ending, deliver
from miles.observe.trackers.backends import Target
from miles.observe.trackers.state import TrackerState

LINES = [{"rollout/raw_reward": step / 4, "eval/a/pass@2": 0.5, "train/odd": math.inf} for step in range(4)]


def run_directory(path: Path, **tracking: Any) -> RunDir:
    run_dir = RunDir(path).create()
    config = make_config(rollout_batch_size=3, n_samples_per_prompt=2, num_steps_per_rollout=3, lr=2e-5, **tracking)
    run_dir.write_config({"config": public_dict(config)})
    return run_dir


@pytest.fixture(scope="module")
def empty_mlflow(tmp_path_factory) -> Path:
    """A database with MLflow's tables: making them takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def mlflow_directory(path: Path, empty_mlflow: Path, **tracking: Any) -> RunDir:
    run_dir = run_directory(path, use_mlflow=True, **tracking)
    shutil.copy(empty_mlflow, run_dir.path)
    return run_dir


def trackers(
    run_dir: RunDir, name: str, *, first_step: int = 0, limit_s: float = 30, code: str = "", **env: str
) -> Trackers:
    """The trackers of one driver; `code` runs in the worker before anything else."""
    hooks = run_dir.path / "site"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{hooks}:{os.environ.get('PYTHONPATH', '')}", **env}
    return Trackers([name], run_dir, first_step=first_step, close_timeout_s=limit_s, environment=environment)


def write(run_dir: RunDir, first: int, stop: int, *, scale: float = 1.0) -> None:
    file = MetricsFile(run_dir.metrics, first_step=first)
    for step in range(first, stop):
        file.log(step, {key: value * scale for key, value in LINES[step].items()})
    file.close()


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def interrupted_and_continued(run_dir: RunDir, name: str) -> None:
    """Steps 0..2, then from a checkpoint of step 1 on: 2 again, with other values, and 3, with a second part."""
    for first, stop, scale in ((0, 3, 1.0), (2, 4, 2.0)):
        write(run_dir, first, stop, scale=scale)
        run = trackers(run_dir, name, first_step=first)
        if stop == 4:
            MetricsFile(run_dir.metrics, first_step=9).log(3, {"perf/save_time": 1.5})
        assert run.close("ok") == []
    assert TrackerState.read(run_dir.path, name).delivered == 3


# ------------------------------------------------------------------------------------------------------------ read back


def wandb_history(directory: Path) -> tuple[list[dict[str, Any]], dict[str, Any], Any]:
    """History rows, configuration and the record of the files of one run, read as W&B's sync reads them."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, config, run = [], {}, None
    for file in sorted(directory.glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime):
        for data in leveldb_log(file.read_bytes()[7:], start=7):
            record = Record.FromString(data)
            if record.HasField("history"):
                items = record.history.item
                rows.append({(i.key or "/".join(i.nested_key)): orjson_or_nan(i.value_json) for i in items})
            if record.HasField("run"):
                config |= {u.key: orjson.loads(u.value_json) for u in record.run.config.update}
                run = record.run
    return rows, config, run


def orjson_or_nan(text: str) -> Any:
    return math.nan if text == "NaN" or text == '"NaN"' else orjson.loads(text)


def leveldb_log(data: bytes, *, start: int) -> list[bytes]:
    """Records of LevelDB's log format: 32 KiB blocks of (checksum, length, whole / first / middle / last) + data."""
    records, part, at = [], b"", start
    data = b"\0" * start + data
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(part)
            part = b""
    return records


def test_wandb_offline_holds_every_step_once_on_our_axis(tmp_path):
    run_dir = run_directory(
        tmp_path / "run", use_wandb=True, wandb_mode="offline", wandb_project="p", wandb_group="g", wandb_key="k-secret"
    )
    interrupted_and_continued(run_dir, "wandb")
    rows, config, run = wandb_history(run_dir.path / "wandb")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]
    # Step 2 was done again; W&B keeps what it was given first.
    assert [row.get("rollout/raw_reward") for row in rows] == [0, 0.25, 0.5, 1.5, None]
    assert math.isnan(rows[0]["train/odd"])
    assert rows[0]["eval/a/pass@2"] == 0.5
    assert rows[-1]["perf/save_time"] == 1.5
    assert config["optimizer"]["lr"] == 2e-5
    state = TrackerState.read(run_dir.path, "wandb")
    assert (run.project, run.run_group, run.run_id, run.display_name) == ("p", "g", state.run_id, f"g-{state.run_id}")
    ids = {path.name.rsplit("-", 1)[1] for path in (run_dir.path / "wandb").glob("offline-run-*")}
    assert ids == {state.run_id}, "the same run was continued"
    written = b"".join(path.read_bytes() for path in run_dir.path.rglob("*") if path.is_file())
    assert b"k-secret" not in written


def test_wandb_goes_by_its_flags(tmp_path):
    run_dir = run_directory(
        tmp_path / "run",
        use_wandb=True,
        wandb_mode="offline",
        wandb_run_id="mine",
        wandb_dir=str(tmp_path / "w"),
        wandb_always_use_train_step=True,
        wandb_team="t",
        wandb_group="g",
        wandb_host="http://127.0.0.1:9",
        disable_wandb_random_suffix=True,
    )
    (tmp_path / "w").mkdir()
    write(run_dir, 0, 3)
    seen = tmp_path / "server"
    code = f"import wandb; f = wandb.init\ndef g(**k):\n    run = f(**k); open({str(seen)!r}, 'w').write(run.settings.base_url); return run\nwandb.init = g"
    assert trackers(run_dir, "wandb", code=code).close("ok") == []
    assert seen.read_text() == "http://127.0.0.1:9"
    rows, _, run = wandb_history(tmp_path / "w" / "wandb")
    assert [row["train_step"] for row in rows] == [0, 3, 6]
    assert (run.entity, run.run_group, run.display_name, run.run_id) == ("t", "g", "g", "mine")
    assert TrackerState.read(run_dir.path, "wandb").run_id == "mine"


def test_tensorboard_shows_the_newest_values_of_steps_that_were_done_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = run_directory(
        tmp_path / "run", use_tensorboard=True, tb_project_name=str(tmp_path / "tb"), tb_experiment_name="e"
    )
    interrupted_and_continued(run_dir, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tb" / "e")).Reload()
    reward = events.Scalars("rollout/raw_reward")
    assert [(e.step, e.value) for e in reward] == [(0, 0.0), (1, 0.25), (2, 1.0), (3, 1.5)]
    assert [e.value for e in events.Scalars("eval/a/pass@2")] == [0.5, 0.5, 1.0, 1.0]
    assert [(e.step, e.value) for e in events.Scalars("perf/save_time")] == [(3, 1.5)]
    assert all(math.isnan(e.value) for e in events.Scalars("train/odd"))
    assert b'"lr": 0.00002' in events.Tensors("config")[-1].tensor_proto.string_val[0].replace(b"2e-5", b"0.00002")


def test_mlflow_holds_every_step_once_and_the_configuration(tmp_path, empty_mlflow):
    from mlflow import MlflowClient

    run_dir = mlflow_directory(tmp_path / "run", empty_mlflow, mlflow_experiment_name="x", mlflow_run_name="r")
    interrupted_and_continued(run_dir, "mlflow")
    client = MlflowClient(f"sqlite:///{run_dir.path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    assert run.info.run_id == TrackerState.read(run_dir.path, "mlflow").run_id
    assert (run.info.run_name, run.info.status) == ("r", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "rollout/raw_reward")
    assert [(m.step, m.value) for m in history] == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 1.5)]
    assert len(client.get_metric_history(run.info.run_id, "eval/a/pass_at_2")) == 4
    assert client.get_metric_history(run.info.run_id, "perf/save_time")[0].value == 1.5
    assert run.data.params["optimizer.lr"] == "2e-05"


def test_mlflow_continues_the_run_that_is_named(tmp_path, empty_mlflow):
    from mlflow import MlflowClient

    shutil.copy(empty_mlflow, tmp_path / "kept.db")
    client = MlflowClient(f"sqlite:///{tmp_path}/kept.db")
    mine = client.create_run(client.create_experiment("elsewhere")).info.run_id
    run_dir = run_directory(
        tmp_path / "run", use_mlflow=True, mlflow_run_id=mine, mlflow_tracking_uri=f"sqlite:///{tmp_path}/kept.db"
    )
    write(run_dir, 0, 2)
    assert trackers(run_dir, "mlflow").close("ok") == []
    assert [m.value for m in client.get_metric_history(mine, "rollout/raw_reward")] == [0, 0.25]
    assert (TrackerState.read(run_dir.path, "mlflow").run_id, client.get_run(mine).info.status) == (mine, "FINISHED")
    assert client.get_experiment_by_name("miles") is None


# -------------------------------------------------------------------------------------------------- what may go wrong

HANG = (
    "import tensorboard.summary.writer.event_file_writer as w, time; w.EventFileWriter.{} = lambda *a: time.sleep(600)"
)


@pytest.mark.parametrize("method", ["__init__", "add_event", "close"])
def test_a_tracker_that_hangs_costs_its_limit_at_the_end_and_says_what_it_lacks(tmp_path, method):
    run_dir = run_directory(tmp_path / "run", use_tensorboard=True)
    run = trackers(run_dir, "tensorboard", limit_s=0.5, code=HANG.format(method))
    write(run_dir, 0, 2)
    assert run.complaints() == []
    has = 1 if method == "close" else -1
    wait_until(lambda: TrackerState.read(run_dir.path, "tensorboard").delivered == has)
    (line,) = run.close("ok")
    assert line.startswith(f"tracker tensorboard ended with status 3 and has the steps up to {has} only (")
    assert "not finished 0.5 s after the end of the run: given up" in line
    assert f"python -m miles.observe.trackers tensorboard {run_dir.path} delivers the rest" in line


def test_a_tracker_that_fails_is_named_once_and_can_be_delivered_to_by_hand(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = run_directory(tmp_path / "run", use_tensorboard=True)
    code = "import tensorboard.summary.writer.event_file_writer as w\ndef f(*a): raise OSError('disk is\\nfull')\nw.EventFileWriter.add_event = f"
    run = trackers(run_dir, "tensorboard", code=code)
    write(run_dir, 0, 4)
    lines: list[str] = []
    wait_until(lambda: lines.extend(run.complaints()) or lines)
    assert lines[0].startswith("tracker tensorboard ended with status 1 and has the steps up to -1 only (OSError: disk")
    assert run.complaints() == run.close("ok") == []

    command = [sys.executable, "-m", "miles.observe.trackers", "tensorboard", str(run_dir.path)]
    for _ in range(2):  # the second finds nothing to do
        subprocess.run(command, check=True, timeout=60)
    events = EventAccumulator(str(run_dir.path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("rollout/raw_reward")] == [0, 1, 2, 3]


def test_a_slow_tracker_gets_all_and_one_whose_driver_is_killed_ends_by_itself(tmp_path, empty_mlflow):
    from mlflow import MlflowClient

    run_dir = mlflow_directory(tmp_path / "run", empty_mlflow)
    slow = "import time, mlflow; f = mlflow.MlflowClient.log_batch\ndef g(*a, **k): time.sleep(0.3); f(*a, **k)\nmlflow.MlflowClient.log_batch = g"
    run = trackers(run_dir, "mlflow", code=slow)
    write(run_dir, 0, 4)
    (process,) = run._live.values()
    assert process.stdin is not None
    process.stdin.close()  # what a killed driver's end looks like
    assert process.wait(timeout=40) == 0
    client = MlflowClient(f"sqlite:///{run_dir.path}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("miles").experiment_id])
    assert found.info.status == "KILLED"
    assert len(client.get_metric_history(found.info.run_id, "rollout/raw_reward")) == 4


def test_a_step_of_which_half_was_delivered_gets_the_other_half(tmp_path):
    """The worker ended between a step's line and the second one, that of its checkpoint."""
    run_dir = run_directory(tmp_path / "run")
    taken: list[tuple[int, list[str]]] = []

    class Sink:
        """Appends, as W&B and MLflow do."""

        run_id = "r"

        def __init__(self, target: Target):
            pass

        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            taken.append((step, sorted(metrics)))

        def close(self, outcome: str) -> None:
            pass

    write(run_dir, 0, 2)
    deliver("mlflow", run_dir.path, 0, Ending(None), Sink)
    MetricsFile(run_dir.metrics, first_step=9).log(1, {"perf/save_time": 1.5})
    for first_step in (2, 1, None):  # steps that are done again, and delivery by hand, find nothing to do
        deliver("mlflow", run_dir.path, first_step, Ending(None), Sink)
        assert taken == [(0, sorted(LINES[0])), (1, sorted(LINES[1])), (1, ["perf/save_time"])]


def test_a_run_that_starts_from_nothing_is_a_new_one(tmp_path):
    run_dir = run_directory(tmp_path / "run", use_wandb=True, wandb_mode="disabled")
    ids = []
    for _ in range(2):
        write(run_dir, 0, 2)
        assert trackers(run_dir, "wandb").close("failed") == []
        ids.append(TrackerState.read(run_dir.path, "wandb"))
    assert ids[0].run_id != ids[1].run_id
    assert [state.delivered for state in ids] == [1, 1]


# ---------------------------------------------------------------------------------------------------------- start-up


def test_a_missing_package_and_a_missing_key_are_one_line_each(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = make_config(use_wandb=True, use_tensorboard=True, use_mlflow=True)
    assert enabled(config.tracking) == ["wandb", "tensorboard", "mlflow"]
    (problem,) = check(config)
    assert str(problem) == (
        "--use-wandb: there is no API key for api.wandb.ai; set WANDB_API_KEY, run `wandb login`, or give --wandb-mode offline"
    )
    (problem,) = check(make_config(use_wandb=True, wandb_host="https://wandb.example:8080"))
    assert "there is no API key for wandb.example;" in str(problem)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    assert check(config) == []

    # A directory of the package's name is no package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("wandb", "tensorboard", "mlflow", "sqlalchemy", "alembic"):
        for loaded in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
            monkeypatch.delitem(sys.modules, loaded)
    assert [str(problem) for problem in check(config)] == [
        "--use-wandb: wandb cannot be imported; run pip install wandb, or leave it out",
        "--use-tensorboard: tensorboard cannot be imported; run pip install tensorboard, or leave it out",
        "--use-mlflow: mlflow and sqlalchemy and alembic cannot be imported; run pip install mlflow sqlalchemy alembic, or leave it out",
    ]
