"""What megatron-core needs to run where torch has no CUDA: a few named patches on torch, in force only while it runs.

    with cpu.cuda_means_cpu():
        ... megatron builds a model, runs a schedule, steps an optimizer, writes a checkpoint ...

megatron-core 0.16 asks for device "cuda" by name, for `torch.cuda.current_device()`, and for CUDA type names. Within
`cuda_means_cpu` all of these mean the CPU; outside it torch is as it was, so other libraries in the process (transformers
places tensors by the very functions that are replaced here) never notice. With CUDA it does nothing. Parts of the model
that refuse a CPU (norms, attention) are replaced through `ModuleSpec` in `model.py` instead.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils import _device

_CPU = torch.device("cpu")
_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like")


def prepare() -> None:
    """Settings that have to be made before megatron is imported."""
    # Megatron's order of communication and computation counts on one queue to the GPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        return
    # Without a GPU torch.compile only costs start-up time: megatron's fusions then run as the plain functions they are.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # The last one speaks of experts, each of which one rank holds whole.
    for message in (".*Apex (is|are) not installed", "full scope is deprecated", "`sequence_parallel` is set to"):
        warnings.filterwarnings("ignore", message=message, category=UserWarning, module="megatron")


@contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """Patches torch for megatron for as long as it is open. May be nested; a no-op with CUDA."""
    if torch.cuda.is_available() or torch.zeros is _patched().get("zeros"):
        yield
        return
    # torch lists its own factories on first use, for `with torch.device(...)`: it must not find ours.
    _device._device_constructors()
    from megatron.core.tensor_parallel import random  # `prepare` comes before

    with ExitStack() as stack:
        # Parameters, gradient buffers and rotary tables are allocated on the current device.
        stack.enter_context(_replaced(torch.cuda, "current_device", lambda: _CPU))
        # A pipeline moves the copy of tied embeddings to the GPU.
        stack.enter_context(_replaced(torch.Tensor, "cuda", lambda self, *_, **__: self))
        # The checkpoint writer synchronizes the device before it copies, and a pipeline after it sends.
        stack.enter_context(_replaced(torch.cuda, "synchronize", lambda *_, **__: None))
        # Experts copy their token counts on a stream of their own; a CPU has none to wait for.
        stack.enter_context(_replaced(torch.cuda, "Stream", _NoStream))
        stack.enter_context(_replaced(torch.cuda, "current_stream", _NoStream))
        stack.enter_context(_replaced(torch.cuda, "stream", nullcontext))
        # Recomputation puts the generator of the GPU back; that of the CPU it keeps by itself.
        stack.enter_context(_replaced(random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()))
        stack.enter_context(_replaced(random, "_set_cuda_rng_state", lambda *_, **__: None))
        # Schedules, optimizers and checkpoints make small tensors with `device="cuda"` and pinned memory.
        for name, factory in _patched().items():
            stack.enter_context(_replaced(torch, name, factory))
        # Optimizers and clipping choose by `tensor.type() == "torch.cuda.FloatTensor"`.
        stack.enter_context(_replaced(torch.Tensor, "type", _cuda_type_name))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@functools.cache
def _patched() -> dict[str, Callable[..., torch.Tensor]]:
    return {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return call


class _NoStream:
    """In the place of a CUDA stream: everything has happened already."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self) -> _NoStream:
        return self


def _names_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or getattr(device, "type", None) == "cuda"


_type = torch.Tensor.type


def _cuda_type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is not None:
        return _type(self, dtype, *args, **kwargs)
    return _type(self).replace("torch.", "torch.cuda.", 1)
