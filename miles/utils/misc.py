"""Compatibility: `load_function` as modules written for Miles know it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles.config import load_module
from miles.errors import HookError

__all__ = ["load_function"]


def load_function(path: str) -> Callable[..., Any]:
    """The object at `package.module.name` or `path/to/file.py:name`. Raises `HookError` where there is no such module."""
    file, colon, name = path.partition(".py:")
    module = file + ".py"
    if not colon:
        module, _, name = path.rpartition(".")
    found = load_module(module, flag="load_function")
    if not hasattr(found, name):
        raise HookError(f"load_function, got {path}: {module} has no {name!r}; check the name")
    function: Callable[..., Any] = getattr(found, name)
    return function
