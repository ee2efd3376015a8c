"""The recipes and shell files: they parse, they are clean, and what they hand to train.py is what they promise."""

from __future__ import annotations

import shutil
import stat
import sys
from pathlib import Path

import pytest

from .paths import REPO, SHELL_SCRIPTS, bash

RECIPE = "scripts/run_qwen3_grpo.sh"
RELEASED = Path(__file__).parent / "released_configs"


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: str(path.relative_to(REPO)))
def test_parses(script: Path) -> None:
    run = bash("-n", str(script))
    assert run.returncode == 0, run.stderr


def test_ci_does_what_a_developer_does() -> None:
    commands = [line for line in (REPO / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert len(commands) == 1
    assert commands[0].endswith('/../scripts/test.sh"')


@pytest.fixture
def real_run(tmp_path: Path) -> dict[str, str | None]:
    """A checkpoint directory and prompts as far as --print-config looks at them."""
    checkpoint = tmp_path / "Qwen3-4B"
    checkpoint.mkdir()
    shutil.copy(RELEASED / "qwen3-4B.json", checkpoint / "config.json")
    prompts = tmp_path / "math.jsonl"
    prompts.write_text('{"prompt": [{"role": "user", "content": "1+1="}], "label": "2"}\n')
    return {"HF_CHECKPOINT": "Qwen3-4B", "PROMPT_DATA": "math.jsonl", "MILES_PYTHON": sys.executable, "NUM_GPUS": "0"}


def printed(output: str, field: str) -> str:
    """The line of --print-config about a field."""
    return next(line for line in output.splitlines() if line.split()[:1] == [field])


def test_the_real_recipe_resolves(tmp_path: Path, real_run: dict[str, str | None]) -> None:
    run = bash(str(REPO / RECIPE), "--num-rollout", "7", "--print-config", cwd=tmp_path, **real_run)
    assert run.returncode == 0, run.stderr
    assert str(tmp_path / "Qwen3-4B") in printed(run.stdout, "hf_checkpoint")
    assert printed(run.stdout, "num_rollout").split()[1] == "7"
    assert printed(run.stdout, "global_batch_size").split()[1] == "256"
    assert "command line" in printed(run.stdout, "hidden_size")


@pytest.mark.parametrize(("recipe", "loss_type"), [("dpo", "dpo"), ("kto", "kto"), ("dpo", "simpo")])
def test_the_real_preference_recipes_resolve(
    tmp_path: Path, real_run: dict[str, str | None], recipe: str, loss_type: str
) -> None:
    script, flags = (
        str(REPO / f"scripts/run_qwen3_{recipe}.sh"),
        ("--loss-type", loss_type, "--beta", "0.3", "--print-config"),
    )
    run = bash(script, *flags, cwd=tmp_path, **real_run)
    assert run.returncode == 0, run.stderr
    assert printed(run.stdout, "loss_type").split()[1] == loss_type
    assert printed(run.stdout, "beta").split()[1] == "0.3"
    assert str(tmp_path / f"checkpoints/Qwen3-4B-{recipe}") in printed(run.stdout, "save")
    assert printed(run.stdout, "global_batch_size").split()[1] == "64"


@pytest.mark.parametrize(("recipe", "data"), [("ppo", "PROMPT_DATA"), ("rm", "PROMPT_DATA"), ("sft", "SFT_DATA")])
def test_the_other_real_recipes_resolve(
    tmp_path: Path, real_run: dict[str, str | None], recipe: str, data: str
) -> None:
    environment = {**real_run, "PROMPT_DATA": None, data: real_run["PROMPT_DATA"]}
    run = bash(str(REPO / f"scripts/run_qwen3_{recipe}.sh"), "--print-config", cwd=tmp_path, **environment)
    assert run.returncode == 0, run.stderr
    assert str(tmp_path / "checkpoints/Qwen3-4B") in printed(run.stdout, "save")


def test_the_wrong_model_is_an_error_of_train_py(tmp_path: Path, real_run: dict[str, str | None]) -> None:
    run = bash(str(REPO / RECIPE), "--print-config", cwd=tmp_path, **real_run, MODEL="qwen3-8B")
    assert run.returncode == 2
    assert "4096" in run.stderr
    assert "2560" in run.stderr


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"HF_CHECKPOINT": "x"}, "PROMPT_DATA is not set"),
        ({"PROMPT_DATA": "x"}, "HF_CHECKPOINT is not set"),
        ({"HF_CHECKPOINT": "nowhere", "PROMPT_DATA": "x", "MILES_PYTHON": sys.executable}, "nowhere/config.json"),
        ({"MILES_PYTHON": "no-such-python"}, "MILES_PYTHON, got 'no-such-python'"),
    ],
)
def test_wrong_use_is_said_before_anything_happens(environment: dict[str, str], says: str) -> None:
    run = bash(RECIPE, **environment)
    assert run.returncode != 0
    assert says in run.stderr


def test_an_unknown_model_names_those_there_are(tmp_path: Path, real_run: dict[str, str | None]) -> None:
    run = bash(str(REPO / RECIPE), cwd=tmp_path, **real_run, MODEL="qwen3-5B")
    assert run.returncode != 0
    assert "qwen3-4B.sh" in run.stderr


def test_a_running_cluster_gets_the_job(tmp_path: Path, real_run: dict[str, str | None]) -> None:
    """`ray` beside the interpreter is replaced by one that prints its arguments: no cluster is needed to see them."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, text in (
        ("python", f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n'),
        ("ray", '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n'),
    ):
        path = binaries / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = real_run | {"MILES_PYTHON": str(binaries / "python"), "RAY_ADDRESS": "http://10.0.0.1:8265"}
    run = bash(str(REPO / RECIPE), "--seed", "7", cwd=tmp_path, **environment)
    words = run.stdout.splitlines()
    assert words[:7] == [
        *("job", "submit", "--address", "http://10.0.0.1:8265", "--"),
        str(binaries / "python"),
        str(REPO / "train.py"),
    ]
    assert words[-2:] == ["--seed", "7"]


def test_no_recipe_kills_by_name() -> None:
    for script in SHELL_SCRIPTS:
        text = script.read_text()
        assert not any(word in text for word in ("pkill", "killall", "ray stop")), script
