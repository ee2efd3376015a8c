"""Imported by every interpreter of the environment, through a .pth file: mends on import what a CPU torch cannot load."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from typing import Any

_kept: list[Any] = []


def _before_torchvision() -> None:
    """Its wheel is built for CUDA and its library does not load here; importing it needs the schemas of two operators."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


def _after_host_pool(module: Any) -> None:
    """`--enable-return-routed-experts` pins host memory through CUDA: plain memory does."""
    module._cuda_host_register = lambda *args, **kwargs: None


_BEFORE = {"torchvision": _before_torchvision}
_AFTER = {"sglang.srt.mem_cache.pool_host.common": _after_host_pool}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if before := _BEFORE.pop(name, None):
            before()
        if (after := _AFTER.pop(name, None)) is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                after(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
