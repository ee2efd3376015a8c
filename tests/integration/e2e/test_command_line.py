"""What a user sees before anything starts: help, the plan, and one clear line for each mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from .harness import REPO, environment, flags


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "train.py", *argv], cwd=REPO, env=environment(), capture_output=True, text=True, timeout=90
    )


def test_help_is_grouped_and_imports_no_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "train.py", "--help"],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0
    assert "--rollout-batch-size" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "miles.config.groups" in imported
    assert not imported & {"torch", "ray", "transformers"}, "it answers at once"


def test_dry_run_prints_the_plan_and_starts_nothing(task, tmp_path):
    done = command(*flags(task), "--run-dir", str(tmp_path / "run"), "--dry-run")
    assert done.returncode == 0, done.stderr
    for word in ("prompts", "samples", "tokens", "optimizer steps", "trainer ranks", "engines"):
        assert word in done.stdout, done.stdout
    assert not (tmp_path / "run").exists()


def test_print_config_says_where_each_value_came_from(task):
    done = command(*flags(task), "--print-config")
    assert done.returncode == 0, done.stderr
    assert "hidden_size" in done.stdout.replace("-", "_")
    assert "command line" in done.stdout
    assert "config.json" in done.stdout


def test_an_evaluation_row_without_a_label_is_found_before_anything_starts(task, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n{"prompt": "1+2="}\n')
    done = command(*flags(task, eval_prompt_data=["bad", tmp_path / "bad.jsonl"], eval_interval=1, dry_run=True))
    assert done.returncode == 2, done.stdout
    assert f"{tmp_path}/bad.jsonl:2, got None in 'label'" in done.stderr


MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({"rm_typ": "exact"}, ["--rm-typ", "--rm-type"]),
    ({"hidden_size": 64}, ["hidden-size", "64", "128"]),
    ({"global_batch_size": 5}, ["8", "4", "5"]),
    ({"rm_type": "exat"}, ["exat", "exact"]),
    ({"label_key": None}, ["label"]),
    ({"label_key": "lable"}, ["lable", "train.jsonl"]),
    ({"prompt_data": "/nowhere.jsonl"}, ["/nowhere.jsonl"]),
    ({"custom_rm_path": "examples.nowhere.f"}, ["--custom-rm-path", "examples.nowhere"]),
    ({"use_routing_replay": True}, ["--use-routing-replay", "not built yet"]),
    ({"hf_checkpoint": "/nowhere"}, ["/nowhere"]),
    ({"rollout_engine": "sglang"}, ["sglang"]),
]

#: The command, for one command line after another: what takes seconds is its imports.
ONE_AFTER_ANOTHER = """
import contextlib, io, json, sys
from miles.cluster import run
from train import train
said = []
for argv in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        try:
            status = run(train, argv)
        except SystemExit as end:
            status = end.code
    said.append((status, out.getvalue()))
print("SAID", json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(task) -> list[tuple[int, str]]:
    """Exit status and error output of each of the mistakes."""
    argvs = [flags(task, **change) for change, _ in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER],
        cwd=REPO,
        env=environment(),
        input=orjson.dumps(argvs).decode(),
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    return orjson.loads(done.stdout.rpartition("SAID ")[2])


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[" ".join(change) for change, _ in MISTAKES])
def test_a_mistake_is_one_clear_line_and_exit_status_2(said, number):
    status, error = said[number]
    assert status == 2, error
    assert "Traceback" not in error
    for word in MISTAKES[number][1]:
        assert word in error


def test_a_placement_that_does_not_fit_fails_fast(task, tmp_path):
    done = command(*flags(task, actor_num_gpus_per_node=4000, global_batch_size=None), "--run-dir", str(tmp_path / "r"))
    assert done.returncode in (1, 2)
    assert "asked" in done.stderr or "4000" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_start_that_takes_too_long_is_an_error_that_names_the_flag(task, tmp_path):
    done = command(*flags(task, start_timeout=0.01), "--run-dir", str(tmp_path / "r"))
    assert done.returncode == 1
    assert "--start-timeout" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_recipe_resolves_without_arguments(task: Path) -> None:
    """With the tiny model, up to what a run would be; the teacher of gkd is the model itself."""
    scripts = sorted((REPO / "scripts").glob("run_*.sh"))
    assert len(scripts) >= 7
    started = [
        subprocess.Popen(
            ["bash", str(script), "--print-config"],
            cwd=REPO,
            env={**environment(), "TEACHER": str(task / "model")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for script in scripts
    ]
    refused = {
        script.name: text
        for script, run in zip(scripts, started, strict=True)
        if (text := run.communicate(timeout=200)[1]) and run.returncode
    }
    assert not refused
