from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .harness import REPO, environment


@pytest.fixture(scope="session")
def task() -> Path:
    """The tiny base model and the addition task, made once and kept where the recipe keeps them."""
    directory = REPO / ".miles" / "tiny_addition"
    command = [sys.executable, str(REPO / "tools" / "make_tiny_task.py"), str(directory)]
    subprocess.run(command, check=True, env=environment(), timeout=300)
    return directory
