"""A sender's segment: memory that it fills with tensors while engines of the same host read, and which they may then keep."""

from __future__ import annotations

import mmap
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash

from miles.errors import WeightUpdateError

from .buckets import BucketLayout, NamedTensor, TensorSlot, layout
from .memory import CHUNK_BYTES, GIVEN_UP, HEADER_BYTES, HUGE_PAGE_BYTES, MappedFile, sample_hash

_NOTHING = torch.empty(0, dtype=torch.uint8), np.zeros(2, np.int64)


@dataclass(frozen=True)
class Filled:
    """What `Segment.fill` did."""

    checksums: dict[str, str]
    """HF name -> checksum of the tensor as it was given to us; empty where they were not asked for."""
    seconds: float
    ended: float
    """`time.perf_counter()` at the end."""


def samples_place(bucket: BucketLayout) -> int:
    """Where the samples begin: little-endian uint64, one for each tensor, in bytes from the segment's beginning."""
    return -(-(HEADER_BYTES + bucket.nbytes) // 8) * 8


class Segment:
    """A stretch of memory that another process can open by `path`. Grows by being replaced; empty until first filled."""

    def __init__(self, *, anonymous: bool) -> None:
        self._anonymous = anonymous
        self.users: set[str] = set()
        """Identities of the engines that may compute with what lies in it."""
        self._fd = -1
        self._path = ""
        self._file: MappedFile | None = None
        self._bytes, self._header = _NOTHING
        self._backed_bytes = 0

    @property
    def path(self) -> str:
        return self._path

    @property
    def serial(self) -> int:
        """Number of the filling; another one for each."""
        return int(self._header[1])

    def reserve(self, tensors: Sequence[NamedTensor]) -> BucketLayout:
        """Makes room, marks all of it as not ready, and returns where the tensors will lie."""
        bucket = layout(tensors)
        self._reserve(samples_place(bucket) + 8 * len(bucket.slots))
        self._announce(0)
        self._header[1] += 1
        return bucket

    def fill(self, tensors: Sequence[NamedTensor], bucket: BucketLayout, *, checksums: bool = True) -> Filled:
        """Copies the tensors in, from whatever device, and says after each chunk how far it is. Samples are there before a
        tensor's last byte is announced; `checksums` of all bytes cost about a third of the copy."""
        started, hashes = time.perf_counter(), dict[str, str]()
        begin = samples_place(bucket)
        samples = self._bytes[begin : begin + 8 * len(bucket.slots)].numpy().view("<u8")
        try:
            for index, (slot, (_, tensor)) in enumerate(zip(bucket.slots, tensors, strict=True)):
                source = self._source(slot, tensor.detach())
                samples[index] = sample_hash(source)
                hasher = xxhash.xxh3_64() if checksums else None
                self._fill_slot(slot, source, hasher)
                if hasher is not None:
                    hashes[slot.name] = hasher.hexdigest()
        except BaseException:
            self._announce(GIVEN_UP)
            raise
        ended = time.perf_counter()
        return Filled(hashes, ended - started, ended)

    def _source(self, slot: TensorSlot, tensor: torch.Tensor) -> np.ndarray:
        """The tensor's bytes as it was given; in the segment, already copied, where it is not contiguous in this host's memory."""
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            return tensor.view(-1).view(torch.uint8).numpy()
        target = self._raw(slot)
        if slot.nbytes:
            target.view(slot.dtype).view(slot.shape).copy_(tensor)
        return target.numpy()

    def _fill_slot(self, slot: TensorSlot, source: np.ndarray, hasher: xxhash.xxh3_64 | None) -> None:
        """Hashes each chunk just before it is copied: the hash has brought it into the cache."""
        target = self._raw(slot).numpy()
        copied = np.may_share_memory(source, target)
        for begin in range(0, slot.nbytes, CHUNK_BYTES):
            end = min(begin + CHUNK_BYTES, slot.nbytes)
            if hasher is not None:
                hasher.update(source[begin:end].data)
            if not copied:
                np.copyto(target[begin:end], source[begin:end])
            self._announce(HEADER_BYTES + slot.offset + end)

    def _announce(self, ready_bytes: int) -> None:
        # An aligned 8-byte store, after the copy on every processor that keeps stores in order; where one does not, the
        # interpreter lock is given up and taken between the two.
        self._header[0] = ready_bytes

    def _raw(self, slot: TensorSlot) -> torch.Tensor:
        begin = HEADER_BYTES + slot.offset
        return self._bytes[begin : begin + slot.nbytes]

    def close(self) -> None:
        """Gives the memory back. The segment can be filled again afterwards."""
        # Both hold the mapping's buffer, and a mapping with a user cannot be unmapped.
        self._bytes, self._header = _NOTHING
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if not self._anonymous:
                Path(self._path).unlink(missing_ok=True)
        self._path, self._backed_bytes = "", 0

    def _reserve(self, nbytes: int) -> None:
        """Makes room. Addresses grow in powers of two and cost nothing; pages are backed as far as they are needed."""
        page = HUGE_PAGE_BYTES if HUGE_PAGE_BYTES and nbytes >= HUGE_PAGE_BYTES else mmap.PAGESIZE
        nbytes = -(-nbytes // page) * page
        try:
            if nbytes > len(self._bytes):
                self.close()
                self._open(1 << (nbytes - 1).bit_length())
            if self._file is not None and nbytes > self._backed_bytes:
                # Asked for now, when running out is an error; on first touch it would be a SIGBUS, here or in an engine.
                os.posix_fallocate(self._fd, 0, nbytes)
                self._file.prefer_huge_pages(nbytes)
                self._backed_bytes = nbytes
        except OSError as error:
            self.close()
            raise WeightUpdateError(
                f"shared memory for a weight bucket, got no {nbytes} bytes ({error.strerror}): the host's memory, or its "
                f"limit, is too small; lower --update-weight-buffer-size or raise the limit"
            ) from error

    def _open(self, nbytes: int) -> None:
        if self._anonymous:
            self._fd = os.memfd_create("miles-weights")
            self._path = f"/proc/{os.getpid()}/fd/{self._fd}"
        else:
            self._path = f"/dev/shm/miles-{os.getpid()}-{secrets.token_hex(8)}"
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(self._fd, nbytes)
        self._file = MappedFile(self._fd, nbytes, writable=True)
        self._bytes = torch.frombuffer(self._file.memory, dtype=torch.uint8)
        self._header = np.frombuffer(self._file.memory, np.dtype("<i8"), count=2)
