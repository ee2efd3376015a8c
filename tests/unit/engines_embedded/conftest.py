"""One tiny checkpoint per family for the whole session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .checkpoints import save_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen3")
    save_checkpoint(directory)
    return directory
