"""The random streams of a trainer process, seeded, saved and continued. Tensors in a safetensors file: no pickle."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from megatron.core import tensor_parallel
from safetensors.torch import load_file, save_file


def seed(value: int) -> None:
    """Seeds Python, numpy, torch and megatron's streams of the parallel ranks."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
    # On a CPU nothing draws from megatron's streams (there is no dropout), and its tracker reads CUDA generators.
    on_gpu = torch.cuda.is_available()
    tensor_parallel.model_parallel_cuda_manual_seed(value, inference_rng_tracker=not on_gpu, force_reset_rng=True)


def save(path: Path) -> None:
    """Writes all streams' states."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    assert (version, kind) == (3, "MT19937"), (version, kind)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
        for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items():
            states[f"megatron.{name}"] = state
    save_file(states, path)


def load(path: Path) -> None:
    """Continues all streams from `save`'s file."""
    states = load_file(path)
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = states["numpy_position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, states["numpy_gauss"].item()))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
        tracked = {n.removeprefix("megatron."): s for n, s in states.items() if n.startswith("megatron.")}
        tensor_parallel.get_cuda_rng_tracker().set_states(tracked)
