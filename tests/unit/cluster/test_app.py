"""When the verbs of the loop act: evaluation by each data set's own interval, and never twice for one step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from miles.cluster.app import App
from miles.config import make_config
from miles.observe import Timers


class _Anything:
    """Takes what the app reports."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


class _Manager:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def evaluate(self, step: int) -> dict[str, float]:
        self.steps.append(step)
        return {}


def evaluated(tmp_path: Path, *, start: int = 0, **flags: Any) -> list[int]:
    (tmp_path / "e.yaml").write_text("datasets: [{name: a, path: p}, {name: b, path: p, interval: 3}]")
    app = object.__new__(App)
    app.config = make_config(
        eval_config=str(tmp_path / "e.yaml"), eval_interval=5, num_rollout=11, rollout_batch_size=1, **flags
    )
    app.start, app.timers, app._engines = start, Timers(), _Anything()
    app.rollout_manager, app.tracker, app.display = _Manager(), _Anything(), _Anything()
    app.state, app.trainers = _Anything(), _Anything()
    app._evaluate = app._choose_evaluation()
    for step in range(start, 12):
        app.evaluate_if_due(step)
    return app.rollout_manager.steps


@pytest.mark.parametrize(
    ("start", "flags", "steps"),
    [
        (0, {}, [0, 3, 5, 6, 9, 10, 11]),
        (0, {"skip_eval_before_train": True}, [3, 5, 6, 9, 10, 11]),
        (5, {}, [6, 9, 10, 11]),
    ],
)
def test_evaluation_follows_every_interval(tmp_path: Path, start: int, flags: dict[str, Any], steps: list[int]) -> None:
    assert evaluated(tmp_path, start=start, **flags) == steps


def test_the_run_name_names_the_default_run_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepared = SimpleNamespace(config=make_config(run_name="mine"))
    assert App(prepared, None, _Anything()).run_dir.path.name.startswith("mine-")  # type: ignore[arg-type]


def test_an_engine_counts_with_all_of_its_devices_in_the_bubble():
    app = object.__new__(App)
    layout = SimpleNamespace(engine_bundles=((1, 2), (3, 4)), actor_bundles=(0,), colocate=False)
    step = {"perf/step_time": 10.0, "perf/generate_time": 4.0, "perf/actor_train_time": 2.0}
    app._prepared, app.tracker = SimpleNamespace(layout=layout), SimpleNamespace(pending=step)  # type: ignore[assignment]
    assert app._bubble()["perf/bubble_fraction"] == pytest.approx((4 * 0.6 + 1 * 0.8) / 5)
