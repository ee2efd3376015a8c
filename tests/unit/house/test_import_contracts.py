"""The import order: what .importlinter cannot say, and proof that what it says bites."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .paths import REPO

ALGO = sorted((REPO / "miles" / "algo").rglob("*.py"))


def reaches_torch_distributed(tree: ast.AST) -> bool:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names) if any(n.name.startswith("torch.distributed") for n in names):
                return True
            case ast.ImportFrom(module=str(module)) if module.startswith("torch.distributed"):
                return True
            case ast.ImportFrom(module="torch", names=names) if any(n.name == "distributed" for n in names):
                return True
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                return True
    return False


@pytest.mark.parametrize("file", ALGO, ids=lambda path: path.stem)
def test_algorithms_know_no_process_group(file: Path) -> None:
    assert not reaches_torch_distributed(ast.parse(file.read_text()))


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "import torch\ntorch.distributed.barrier()",
    ],
)
def test_every_way_to_a_process_group_is_seen(line: str) -> None:
    assert reaches_torch_distributed(ast.parse(line))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("project")
    only_python = shutil.ignore_patterns("__pycache__", "*.md", "*.yaml")
    for package in ("miles", "miles_plugins"):
        shutil.copytree(REPO / package, directory / package, ignore=only_python)
    shutil.copy(REPO / ".importlinter", directory)
    return directory


def lint(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    env = os.environ | {"PYTHONPATH": str(directory)}
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=60)


def test_contracts_hold(copy: Path) -> None:
    run = lint(copy)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("miles/algo/extra.py", "def f():\n    import ray", "Only the cluster room imports ray"),
        ("miles/rollout/extra.py", "import miles.trainers", "Imports between rooms point downwards"),
        ("miles/weights/extra.py", "import miles.engines", "Imports between rooms point downwards"),
        ("miles/algo/extra.py", "import miles.config", "Algorithms and contracts know no framework"),
        ("miles/engines/extra.py", "import megatron.core", "Only the trainers import megatron"),
        ("miles/data/extra.py", "import miles_plugins", "Miles never imports its plugins"),
        ("miles/observe/extra.py", "import miles.utils.types", "Only users' modules import the compatibility names"),
        ("miles/utils/extra.py", "import torch", "miles.utils re-exports types"),
    ],
)
def test_each_contract_bites(copy: Path, module: str, line: str, contract: str) -> None:
    file = copy / module
    file.write_text(line + "\n")
    try:
        run = lint(copy)
    finally:
        file.unlink()
    assert run.returncode == 1
    assert any(contract in text and "BROKEN" in text for text in run.stdout.splitlines()), run.stdout
