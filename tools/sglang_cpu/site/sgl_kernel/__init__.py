"""Stands in for SGLang's kernel wheel, which needs CUDA libraries to be imported. Has what a CPU server calls; the rest raises."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__version__ = "0.4.10"


def _rows(index: Tensor, starts: Tensor, ends: Tensor) -> Any:
    """(row of the pool, its first and last column, where its columns begin in the packed tensor)."""
    begin = 0
    for row, start, end in zip(index.tolist(), starts.tolist(), ends.tolist(), strict=True):
        yield row, slice(start, end), slice(begin, begin + end - start)
        begin += end - start


def assign_req_to_token_pool_cpu(
    index: Tensor, pool: Tensor, starts: Tensor, ends: Tensor, packed: Tensor, *unused: Any
) -> None:
    for row, columns, place in _rows(index, starts, ends):
        pool[row, columns] = packed[place].to(pool.dtype)


def assign_extend_cache_locs_cpu(
    index: Tensor, pool: Tensor, starts: Tensor, ends: Tensor, packed: Tensor, *unused: Any
) -> None:
    for row, columns, place in _rows(index, starts, ends):
        packed[place] = pool[row, columns].to(packed.dtype)


def __getattr__(name: str) -> Any:
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in for a CPU")

    return missing
