from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .trainer_tools import save_hf_model


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf_model(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def other_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape with other weights: a reference."""
    return save_hf_model(tmp_path_factory.mktemp("other"), seed=7)
