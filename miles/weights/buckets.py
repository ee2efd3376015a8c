"""Named tensors, streamed in buckets of bounded size, and where each tensor lies inside its bucket.

    named tensors --iter_buckets--> [(name, tensor), ...] --layout--> offsets and total size

Both are functions of names, dtypes and shapes alone, so sender and receiver can check each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

NamedTensor: TypeAlias = tuple[str, torch.Tensor]

#: Every tensor begins on a cache line, which is also a whole number of elements of any dtype.
ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor lies in its bucket: contiguous, row-major, in its own dtype."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the bucket's start."""
    nbytes: int


@dataclass(frozen=True)
class BucketLayout:
    """The slots of a bucket in the order of its tensors."""

    slots: tuple[TensorSlot, ...]
    nbytes: int
    """Size of the bucket, padding between tensors included."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(slot.name for slot in self.slots)

    @property
    def payload_nbytes(self) -> int:
        """Size of the tensors alone."""
        return sum(slot.nbytes for slot in self.slots)


def layout(tensors: Sequence[NamedTensor]) -> BucketLayout:
    """Lays tensors side by side in the given order. Reads no data: meta tensors will do."""
    slots: list[TensorSlot] = []
    end = 0
    for name, tensor in tensors:
        offset, end = _place(end, tensor)
        slots.append(TensorSlot(name, tensor.dtype, tuple(tensor.shape), offset, _nbytes(tensor)))
    return BucketLayout(tuple(slots), end)


def iter_buckets(named: Iterable[NamedTensor], buffer_bytes: int) -> Iterator[list[NamedTensor]]:
    """Cuts a stream into buckets whose layout fits `buffer_bytes`, in order, as full as they get.

    A tensor larger than the buffer is a bucket of its own. `named` is read as buckets are asked for, one tensor ahead,
    and nothing of a bucket is held back once it was handed out.
    """
    if buffer_bytes < 1:
        raise ValueError(f"buffer_bytes, got {buffer_bytes}: a bucket must hold something; give a positive size")
    filling = _Filling()
    for name, tensor in named:
        if filling.end_with(tensor) > buffer_bytes and filling.tensors:
            yield filling.take()
        filling.add(name, tensor)
        # The loop variable would keep the tensor alive beyond its bucket.
        del tensor
    if filling.tensors:
        yield filling.take()


class _Filling:
    """The bucket that is being filled. `take` leaves no reference behind while the generator is suspended."""

    def __init__(self) -> None:
        self.tensors: list[NamedTensor] = []
        self._end = 0

    def end_with(self, tensor: torch.Tensor) -> int:
        return _place(self._end, tensor)[1]

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._end = self.end_with(tensor)
        self.tensors.append((name, tensor))

    def take(self) -> list[NamedTensor]:
        taken, self.tensors, self._end = self.tensors, [], 0
        return taken


def _place(end: int, tensor: torch.Tensor) -> tuple[int, int]:
    """Offset and end in bytes of a tensor that follows one ending at `end`."""
    offset = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return offset, offset + _nbytes(tensor)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
