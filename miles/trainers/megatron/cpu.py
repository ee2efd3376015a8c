"""What megatron-core needs to run where torch has no CUDA: a few named patches on torch, none on megatron.

    miles.trainers.megatron (package __init__) --install()--> torch --import--> megatron.core

megatron-core 0.16 asks for device "cuda" by name and for `torch.cuda.current_device()`. Here both mean the CPU. Nothing
happens on a machine with CUDA. Each patch is one function whose docstring names who needs it; parts of the model that
refuse a CPU (norms, attention) are replaced through `ModuleSpec` in `model.py` instead.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like")
_installed = False


def install() -> None:
    """Installs the patches once, before megatron is imported; a no-op with CUDA.

    Raises RuntimeError where megatron was imported first: it copies names out of torch at import.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before miles.trainers.megatron, which prepares torch for it")
    # Without a GPU torch.compile only costs start-up time: megatron's fusions then run as the plain functions they are.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed", category=UserWarning)
    _map_current_device()
    _map_factories()
    _drop_synchronize()
    _installed = True


def _map_current_device() -> None:
    """Parameters, gradient buffers and rotary tables are allocated on `torch.cuda.current_device()`."""
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]


def _map_factories() -> None:
    """Schedules, optimizers and checkpoint code make small tensors with `device="cuda"` and pinned memory."""
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return call


def _names_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or getattr(device, "type", None) == "cuda"


def _drop_synchronize() -> None:
    """The distributed checkpoint writer synchronizes the device before it copies."""
    torch.cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]


@contextmanager
def cuda_type_names() -> Iterator[None]:
    """Within it, CPU tensors report CUDA type names.

    Megatron's optimizers and its clipping choose by `tensor.type() == "torch.cuda.FloatTensor"`. Too broad a lie to keep
    up, so it is told only where an optimizer is built or steps. A no-op with CUDA.
    """
    if torch.cuda.is_available():
        yield
        return
    original = torch.Tensor.type

    def named(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        name = original(self)
        return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = named  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]
