"""Shared memory of a sender, mapped read-only. Consumes a path of one of two forms, yields bytes of HF-named tensors.

    "/proc/<pid>/fd/<n>"       a memfd of the sender: nothing to clean up when the sender dies
    "/dev/shm/miles-<name>"    a named segment, where the sender's descriptors cannot be reached

The sender may still be filling the segment: it then says at `progress` how far it is, and a reader follows. Nothing is
unpickled. A segment stays mapped as long as the sender keeps it, since mapping it anew costs more than copying it.

A sender may offer a segment for adoption: it then does not write there while an engine uses it. The segment's serial number,
an int64 behind `progress`, changes before every filling, so that an engine can tell whether the promise was kept. Samples of the
tensors that it sends along tell whether what we map is what it wrote.
"""

from __future__ import annotations

import math
import os
import re
import stat
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from miles.errors import WeightUpdateError
from miles.weights.memory import CHUNK_BYTES, MappedFile, sample_hash

from .model_config import DTYPES

_SEGMENT = re.compile(r"/proc/\d+/fd/\d+|/dev/shm/miles-[A-Za-z0-9._-]+")
_BACKING = re.compile(r"/memfd:.*|/dev/shm/miles-[A-Za-z0-9._-]+( \(deleted\))?")

#: `progress` and the serial number.
_HEADER_BYTES = 16

#: A sender that writes nothing for so long is taken for dead. It copies gigabytes a second.
STALL_LIMIT_S = 30.0
_POLL_S = 5e-5

#: Device, inode and size.
_Identity: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a segment."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

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


class Bucket:
    """A bucket in a mapped segment. It and its tensors hold the mapping: drop them when the bucket is not needed any more."""

    def __init__(self, path: str, memory: torch.Tensor, progress_bytes: int | None, serial: int | None) -> None:
        """`memory`: all bytes of the segment."""
        self._path, self._memory, self._serial = path, memory, serial
        self._bytes = memory.numpy()
        header = None if progress_bytes is None else self._bytes[progress_bytes : progress_bytes + _HEADER_BYTES]
        self._header = None if header is None else header.view("<i8")

    def check_kept(self) -> None:
        """Raises `WeightUpdateError` where the sender has begun to fill the segment again since it offered it."""
        if self._serial is not None and (found := -1 if self._header is None else int(self._header[1])) != self._serial:
            raise WeightUpdateError(
                f"segment {self._path}, got filling {found} where {self._serial} was offered for adoption: the sender wrote to "
                "memory that it had given away; publish the whole weights again"
            )

    def offered_as(self, path: str, serial: int | None) -> bool:
        """Whether this is that filling of that segment."""
        return serial is not None and (self._path, self._serial) == (path, serial)

    def compare_samples(self, specs: Sequence[TensorSpec], samples_bytes: int) -> None:
        """Waits until each tensor is written, and compares its beginning and end with the sample that the sender took of it:
        a uint64 for each, from `samples_bytes` on. Raises `WeightUpdateError`, also as `chunks` does."""
        samples = self._bytes[samples_bytes : samples_bytes + 8 * len(specs)].view("<u8")
        for index, spec in enumerate(specs):
            # An empty one has no bytes to wait for, and its sample may not be there yet.
            if not spec.size_bytes:
                continue
            end = spec.offset_bytes + spec.size_bytes
            self._wait(spec.name, end)
            # Read only now: it is written before the tensor's end is announced.
            if sample_hash(self._bytes[spec.offset_bytes : end]) != int(samples[index]):
                raise WeightUpdateError(
                    f"sample of {spec.name} in segment {self._path}, got other bytes than the sender's: what the engine maps is not "
                    "what was written; publish the whole weights again"
                )

    def tensor(self, spec: TensorSpec, shape: Sequence[int] | None = None) -> torch.Tensor:
        """The tensor in place; with a `shape`, together with those that adjoin it.

        Its memory cannot be written: an attempt ends the process.
        """
        shape = spec.shape if shape is None else shape
        size_bytes = math.prod(shape) * spec.dtype.itemsize
        return self._memory[spec.offset_bytes : spec.offset_bytes + size_bytes].view(spec.dtype).view(shape)

    def adjoins(self, spec: TensorSpec, following: Bucket, next_spec: TensorSpec) -> bool:
        """Whether the second tensor begins where the first one ends."""
        return following is self and next_spec.offset_bytes == spec.offset_bytes + spec.size_bytes

    def chunks(self, spec: TensorSpec) -> Iterator[np.ndarray]:
        """The tensor's bytes in order, at most `CHUNK_BYTES` at a time, each as soon as the sender has written it.

        Raises `WeightUpdateError` where the sender gives up, or writes nothing for `STALL_LIMIT_S`.
        """
        end = spec.offset_bytes + spec.size_bytes
        for begin in range(spec.offset_bytes, end, CHUNK_BYTES):
            stop = min(begin + CHUNK_BYTES, end)
            self._wait(spec.name, stop)
            yield self._bytes[begin:stop]

    def _wait(self, name: str, needed_bytes: int) -> None:
        if self._header is None or self._header[0] >= needed_bytes:
            return
        seen, deadline = int(self._header[0]), time.monotonic() + STALL_LIMIT_S
        while (ready := int(self._header[0])) < needed_bytes:
            if ready < 0:
                raise WeightUpdateError(f"segment {self._path}, got {name} cut off: the sender gave up; see its log")
            if ready != seen:
                seen, deadline = ready, time.monotonic() + STALL_LIMIT_S
            elif time.monotonic() > deadline:
                raise WeightUpdateError(
                    f"segment {self._path}, got {ready} of {needed_bytes} bytes and no more for {STALL_LIMIT_S:g} s while "
                    f"waiting for {name}: the sender died or hangs; publish the whole weights again"
                )
            time.sleep(_POLL_S)


class Segments:
    """The mappings of senders' segments. One thread uses them at a time."""

    def __init__(self) -> None:
        self._mappings: dict[str, tuple[_Identity, torch.Tensor]] = {}

    def open(
        self,
        path: str,
        specs: Sequence[TensorSpec],
        progress_bytes: int | None = None,
        serial: int | None = None,
        samples_bytes: int | None = None,
    ) -> Bucket:
        """`serial` is that of a segment offered for adoption. Raises `WeightUpdateError` for a foreign path or a tensor
        outside the segment."""
        self._drop_replaced()
        mapping = self._map(path)
        ends = [(f"offset of {spec.name}", spec.offset_bytes, spec.size_bytes) for spec in specs]
        if progress_bytes is not None:
            ends.append(("progress", progress_bytes, _HEADER_BYTES))
        if samples_bytes is not None:
            ends.append(("samples", samples_bytes, 8 * len(specs)))
        for what, offset, size in ends:
            if offset + size > len(mapping):
                raise WeightUpdateError(
                    f"{what}, got {offset}: its {size} bytes end outside the segment of {len(mapping)}; "
                    "send the layout of this bucket"
                )
        return Bucket(path, mapping, progress_bytes, serial)

    def _map(self, path: str) -> torch.Tensor:
        if not _SEGMENT.fullmatch(path):
            raise WeightUpdateError(
                f"segment, got {path!r}: only the sender's shared memory is read; "
                "send /proc/<pid>/fd/<n> of a memfd or /dev/shm/miles-<name>"
            )
        if path in self._mappings:
            return self._mappings[path][1]
        try:
            # O_NONBLOCK: a descriptor that turns out to be a pipe must not block the engine.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if path.startswith("/dev/shm/") else 0)
            fd = os.open(path, flags)
        except OSError as error:
            raise WeightUpdateError(
                f"segment, got {path!r}: cannot be opened ({error.strerror}); keep it open until the engine has answered"
            ) from error
        try:
            backing, info = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or not _BACKING.fullmatch(backing):
                raise WeightUpdateError(f"segment, got {path!r}: it is {backing}, not shared memory; send a memfd")
            if info.st_size == 0:
                raise WeightUpdateError(f"segment, got {path!r}: it is empty; fill it before it is announced")
            memory = MappedFile(fd, info.st_size, writable=False).memory
        finally:
            os.close(fd)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            mapping = torch.frombuffer(memory, dtype=torch.uint8)
        self._mappings[path] = _identity(info), mapping
        return mapping

    def _drop_replaced(self) -> None:
        """Forgets what a sender has closed or replaced: our mapping would keep its memory alive."""
        for path, (identity, _) in list(self._mappings.items()):
            try:
                kept = _identity(os.stat(path)) == identity
            except OSError:
                kept = False
            if not kept:
                # Unmapped when the last view of it is collected.
                del self._mappings[path]


def _identity(info: os.stat_result) -> _Identity:
    return info.st_dev, info.st_ino, info.st_size
