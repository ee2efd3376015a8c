"""Memory files that two sides map: one memory at huge-page addresses, with any number of bytes, given back at the end."""

from __future__ import annotations

import os

import numpy as np
import pytest

from miles.weights.memory import HUGE_PAGE_BYTES, MappedFile

PAGE = HUGE_PAGE_BYTES or 2 * 1024 * 1024


def _mapped() -> int:
    return sum("memfd:miles-map" in line for line in open("/proc/self/maps"))


@pytest.mark.parametrize("nbytes", [4096, PAGE, 2 * PAGE + 4096])
def test_two_mappings_are_one_memory_also_after_a_move_to_huge_pages(nbytes):
    fd = os.memfd_create("miles-map")
    try:
        os.posix_fallocate(fd, 0, nbytes)
        sender, receiver = MappedFile(fd, nbytes, writable=True), MappedFile(fd, nbytes, writable=False)
        written, read = np.frombuffer(sender.memory, np.uint8), np.frombuffer(receiver.memory, np.uint8)
        written[:] = np.arange(nbytes) % 251
        sender.prefer_huge_pages(nbytes)
        assert len(read) == nbytes
        np.testing.assert_array_equal(read, np.arange(nbytes) % 251)
        written[-1] = 7
        assert read[-1] == 7
        assert not read.flags.writeable
        if HUGE_PAGE_BYTES and nbytes >= HUGE_PAGE_BYTES:
            assert written.ctypes.data % HUGE_PAGE_BYTES == read.ctypes.data % HUGE_PAGE_BYTES == 0
        assert _mapped() >= 2
        del written, read
        sender.close()
        receiver.close()
        assert _mapped() == 0
    finally:
        os.close(fd)


def test_a_mapping_lives_as_long_as_a_view_of_it():
    fd = os.memfd_create("miles-map")
    os.posix_fallocate(fd, 0, PAGE)
    view = np.frombuffer(MappedFile(fd, PAGE, writable=True).memory, np.uint8)
    os.close(fd)
    assert view[-1] == 0
    assert _mapped() >= 1
    del view
    assert _mapped() == 0


def test_a_file_that_cannot_be_mapped_is_an_os_error():
    fd = os.memfd_create("miles-map")
    os.close(fd)
    for nbytes in (4096, 2 * PAGE):
        with pytest.raises(OSError, match="Bad file descriptor"):
            MappedFile(fd, nbytes, writable=True)
