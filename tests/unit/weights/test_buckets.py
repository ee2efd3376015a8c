"""Buckets: the stream is cut, never reordered; a bucket fits; nothing is held back."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.weights.buckets import ALIGNMENT_BYTES, iter_buckets, layout

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn]

named_tensors = st.lists(
    st.builds(
        lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta"),
        st.lists(st.integers(0, 9), max_size=3),
        st.sampled_from(DTYPES),
    ),
    max_size=20,
).map(lambda tensors: [(f"t{i}", tensor) for i, tensor in enumerate(tensors)])


@given(named_tensors)
def test_slots_are_aligned_disjoint_in_order_and_end_with_the_bucket(named):
    bucket = layout(named)
    end = 0
    for slot, (name, tensor) in zip(bucket.slots, named, strict=True):
        assert (slot.name, slot.dtype, slot.shape) == (name, tensor.dtype, tuple(tensor.shape))
        assert slot.nbytes == tensor.numel() * tensor.element_size()
        assert slot.offset % ALIGNMENT_BYTES == 0
        assert end <= slot.offset < end + ALIGNMENT_BYTES
        end = slot.offset + slot.nbytes
    assert bucket.nbytes == end
    assert bucket.payload_nbytes == sum(t.numel() * t.element_size() for _, t in named)


@given(named_tensors, st.integers(1, 2000))
def test_buckets_keep_the_stream_fit_the_buffer_and_are_as_full_as_they_get(named, buffer_bytes):
    buckets = list(iter_buckets(iter(named), buffer_bytes))
    assert [entry for bucket in buckets for entry in bucket] == named
    assert all(buckets)
    for bucket in buckets:
        assert layout(bucket).nbytes <= buffer_bytes or len(bucket) == 1
    for bucket, following in itertools.pairwise(buckets):
        assert layout([*bucket, following[0]]).nbytes > buffer_bytes


def test_layout_by_hand():
    named = [
        ("a", torch.empty(3, dtype=torch.bfloat16)),  # 6 bytes at 0
        ("b", torch.empty(5, 5, dtype=torch.float32)),  # 100 bytes at 64
        ("empty", torch.empty(0, 7)),  # nothing at 192
        ("scalar", torch.empty((), dtype=torch.int64)),  # 8 bytes at 192
    ]
    bucket = layout(named)
    assert [(s.offset, s.nbytes) for s in bucket.slots] == [(0, 6), (64, 100), (192, 0), (192, 8)]
    assert (bucket.nbytes, bucket.payload_nbytes) == (200, 114)


def test_a_tensor_larger_than_the_buffer_is_a_bucket_of_its_own():
    named = [("small", torch.empty(1)), ("large", torch.empty(100)), ("after", torch.empty(1))]
    assert [[name for name, _ in b] for b in iter_buckets(named, 64)] == [["small"], ["large"], ["after"]]


def test_a_bucket_is_freed_when_its_receiver_drops_it_and_the_stream_is_read_one_tensor_ahead():
    alive: list[weakref.ref] = []

    def stream():
        for i in range(9):
            tensor = torch.empty(16)  # 64 bytes
            alive.append(weakref.ref(tensor))
            yield f"t{i}", tensor
            del tensor

    buckets = iter_buckets(stream(), 3 * 64)
    for number in range(3):
        bucket = next(buckets)
        assert len(bucket) == 3
        assert len(alive) == min(3 * number + 4, 9)
        del bucket
        gc.collect()
        # The first tensor of the next bucket is all that is left.
        assert sum(ref() is not None for ref in alive) == (1 if number < 2 else 0)


@settings(max_examples=5)
@given(st.integers(-5, 0))
def test_a_buffer_without_room_is_refused(buffer_bytes):
    with pytest.raises(ValueError, match=f"buffer_bytes, got {buffer_bytes}"):
        next(iter_buckets([], buffer_bytes))
