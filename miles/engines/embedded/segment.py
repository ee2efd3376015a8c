"""Shared memory of a sender, mapped read-only. Consumes a path of one of two forms, yields HF-named tensors over it.

    "/proc/<pid>/fd/<n>"       a memfd of the sender: nothing to clean up when the sender dies
    "/dev/shm/miles-<name>"    a named segment, where the sender's descriptors cannot be reached

Nothing is copied and nothing is unpickled: tensors are views of the mapping, valid inside the `with` block only.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from miles.errors import WeightUpdateError

from .model_config import DTYPES

_SEGMENT = re.compile(r"/proc/\d+/fd/\d+|/dev/shm/miles-[A-Za-z0-9._-]+")
_BACKING = re.compile(r"/memfd:.*|/dev/shm/miles-[A-Za-z0-9._-]+( \(deleted\))?")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a segment."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def size_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    @property
    def num_elements(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @classmethod
    def parse(cls, raw: Any) -> TensorSpec:
        """From `{name, dtype, shape, offset}`; raises `WeightUpdateError` that names the field."""
        if not isinstance(raw, Mapping):
            raise WeightUpdateError(f"tensors[], got {raw!r}: not an object; send {{name, dtype, shape, offset}}")
        name, shape, offset = raw.get("name"), raw.get("shape"), raw.get("offset")
        dtype_name = str(raw.get("dtype")).removeprefix("torch.")
        if not isinstance(name, str):
            raise WeightUpdateError(f"tensors[].name, got {name!r}: not a string; send the HF name")
        if dtype_name not in DTYPES:
            raise WeightUpdateError(f"dtype of {name}, got {dtype_name!r}: send one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype_name]
        if not isinstance(shape, Sequence) or not all(type(n) is int and n >= 0 for n in shape):
            raise WeightUpdateError(f"shape of {name}, got {shape!r}: not a list of lengths; send the tensor's shape")
        if type(offset) is not int or offset < 0 or offset % dtype.itemsize:
            raise WeightUpdateError(
                f"offset of {name}, got {offset!r}: not a multiple of {dtype.itemsize} bytes within the segment; align it"
            )
        return cls(name, dtype, tuple(shape), offset)


@contextmanager
def open_segment(path: str, specs: Sequence[TensorSpec]) -> Iterator[list[torch.Tensor]]:
    """Yields one CPU tensor per spec. Raises `WeightUpdateError` for a foreign path or a tensor outside the segment."""
    if not isinstance(path, str) or not _SEGMENT.fullmatch(path):
        raise WeightUpdateError(
            f"segment, got {path!r}: only the sender's shared memory is read; "
            "send /proc/<pid>/fd/<n> of a memfd or /dev/shm/miles-<name>"
        )
    try:
        # O_NONBLOCK: a descriptor that turns out to be a pipe must not block the engine.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if path.startswith("/dev/shm/") else 0)
        fd = os.open(path, flags)
    except OSError as error:
        raise WeightUpdateError(
            f"segment, got {path!r}: cannot be opened ({error.strerror}); keep it open until the engine has answered"
        ) from error
    try:
        backing = os.readlink(f"/proc/self/fd/{fd}")
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or not _BACKING.fullmatch(backing):
            raise WeightUpdateError(f"segment, got {path!r}: it is {backing}, not shared memory; send a memfd")
        for spec in specs:
            if spec.offset_bytes + spec.size_bytes > info.st_size:
                raise WeightUpdateError(
                    f"offset of {spec.name}, got {spec.offset_bytes}: its {spec.size_bytes} bytes end outside the "
                    f"segment of {info.st_size}; send the layout of this bucket"
                )
        if info.st_size == 0:
            yield [torch.empty(spec.shape, dtype=spec.dtype) for spec in specs]
            return
        # ACCESS_COPY is a private mapping: nothing we do can reach the sender's pages, and torch sees a writable buffer.
        mapping = mmap.mmap(fd, info.st_size, access=mmap.ACCESS_COPY)
    finally:
        os.close(fd)
    tensors = [_view(mapping, spec) for spec in specs]
    try:
        yield tensors
    finally:
        tensors.clear()
        # A traceback on its way up may still hold a view; the mapping then goes when that is collected.
        with suppress(BufferError):
            mapping.close()


def _view(mapping: mmap.mmap, spec: TensorSpec) -> torch.Tensor:
    if spec.num_elements == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    flat = torch.frombuffer(mapping, dtype=spec.dtype, count=spec.num_elements, offset=spec.offset_bytes)
    return flat.view(spec.shape)
