"""scripts/lib/venv.sh with interpreters that write down what is asked of them: what is installed, in which order, when."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

from .paths import REPO, bash

#: What the script calls besides Python. Nothing else is on PATH, so the machine's own interpreters cannot be found.
TOOLS = ("bash", "cat", "chmod", "cksum", "cp", "cut", "dirname", "flock", "grep", "head", "mkdir", "rm", "touch", "tr")

#: Stands in for an interpreter and for the one in .venv: says its version, makes an environment, logs calls of pip.
INTERPRETER = """\
#!/usr/bin/env bash
case "$1 ${2-}" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip") shift 2; [ "$1" = --version ] || { echo "$*" >>"$PIP_LOG"; case "$*" in *"${PIP_FAILS_ON-nothing}"*) exit 1 ;; esac; } ;;
  "-c "*) case "$2" in *version_info*) [ "${FITS-yes}" = yes ] ;; esac ;;
  "--version ") echo Python 3.12.0 ;;
esac
"""


class Project:
    """A copy of what the script reads, on a machine of its own."""

    def __init__(self, directory: Path) -> None:
        self.root, self.bin, self.log = directory / "project", directory / "bin", directory / "pip.log"
        (self.root / "scripts").mkdir(parents=True)
        shutil.copytree(REPO / "scripts" / "lib", self.root / "scripts" / "lib")
        self.pyproject = self.root / "pyproject.toml"
        shutil.copy(REPO / "pyproject.toml", self.pyproject)
        self.bin.mkdir()
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.add_interpreter("python3.12")

    def add_interpreter(self, name: str) -> None:
        path = self.bin / name
        path.write_text(INTERPRETER)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def use_venv(self, extras: str = "core", **environment: str):
        return bash(
            "-euo",
            "pipefail",
            "-c",
            f'source scripts/lib/venv.sh; use_venv {extras}; echo "PYTHON=$PYTHON"',
            cwd=self.root,
            PATH=str(self.bin),
            PIP_LOG=str(self.log),
            **environment,
        )

    def installed(self) -> list[str]:
        """pip's arguments so far, one call a line, less the options that are always there."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.replace("install --disable-pip-version-check ", "").replace("--quiet ", "") for line in lines]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_torch_comes_first_and_from_its_own_index(project: Project) -> None:
    run = project.use_venv(TORCH_INDEX_URL="https://wheels.example/cpu")
    assert run.returncode == 0, run.stderr
    assert project.installed() == ["--index-url https://wheels.example/cpu torch==2.13.0", f"-e {project.root}"]
    assert f"PYTHON={project.root}/.venv/bin/python" in run.stdout


def test_installs_again_only_when_the_project_file_changed(project: Project) -> None:
    for _ in range(2):
        assert project.use_venv().returncode == 0
    assert len(project.installed()) == 2
    with project.pyproject.open("a") as file:
        file.write("# changed\n")
    assert project.use_venv().returncode == 0
    assert len(project.installed()) == 4


def test_dev_brings_the_core_along_and_not_the_other_way(project: Project) -> None:
    project.use_venv("core")
    assert project.use_venv("dev").returncode == 0
    assert project.installed()[2:] == ["torch==2.13.0", f"-e {project.root}[dev]"]
    project.use_venv("core")
    project.use_venv("dev")
    assert len(project.installed()) == 4


def test_a_failed_installation_is_tried_again(project: Project) -> None:
    run = project.use_venv(PIP_FAILS_ON="-e ")
    assert run.returncode != 0
    assert "pip could not install" in run.stderr
    assert "PYTHON=" not in run.stdout
    assert project.use_venv().returncode == 0
    assert project.installed()[-1] == f"-e {project.root}"


def test_an_interpreter_out_of_range_is_passed_over(project: Project) -> None:
    run = project.use_venv(FITS="no")
    assert run.returncode != 0
    assert "no Python 3.11, 3.12 or 3.13 with the venv module was found on PATH" in run.stderr
    assert not (project.root / ".venv").exists()


def test_no_python_at_all_is_one_clear_line(project: Project) -> None:
    (project.bin / "python3.12").unlink()
    run = project.use_venv()
    assert run.returncode != 0
    assert len(run.stderr.strip().splitlines()) == 1
    assert "install one" in run.stderr


def test_a_named_interpreter_is_used_as_it_is(project: Project) -> None:
    python = str(project.bin / "python3.12")
    run = project.use_venv("dev", MILES_PYTHON=python)
    assert run.returncode == 0, run.stderr
    assert f"PYTHON={python}" in run.stdout
    assert project.installed() == []
    assert not (project.root / ".venv").exists()
