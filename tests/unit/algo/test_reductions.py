"""Masked reductions: an excluded NaN changes nothing, and a global mean needs every rank."""

import math

import pytest
import torch

from miles.algo import masked, masked_max, masked_mean, masked_sum

VALUES = torch.tensor([1.0, math.nan, 3.0, math.inf])
MASK = torch.tensor([True, False, True, False])


def test_values():
    assert masked_sum(VALUES, MASK).item() == 4
    assert masked_sum(VALUES, MASK, torch.tensor([0.5, math.nan, 2.0, 1.0])).item() == 6.5
    assert masked_mean(VALUES, MASK).item() == 2
    assert masked_max(VALUES, MASK).item() == 3


@pytest.mark.parametrize("size", [0, 3])
def test_nothing_left_is_zero(size):
    values, mask = torch.full((size,), math.nan), torch.zeros(size, dtype=torch.bool)
    assert masked_sum(values, mask) == masked_mean(values, mask) == masked_max(values, mask) == 0


def test_gradient_of_an_excluded_entry_is_zero():
    values = VALUES.clone().requires_grad_()
    masked_mean(values, MASK).backward()
    assert values.grad.tolist() == [0.5, 0, 0.5, 0]


def test_mean_over_ranks_counts_tokens_not_ranks():
    """Three ranks of 1, 3 and 0 tokens, reduced as a collective would."""
    shards = [torch.tensor([8.0]), torch.tensor([1.0, 2.0, 3.0]), torch.empty(0)]
    masks = [torch.ones(len(s), dtype=torch.bool) for s in shards]
    sums, counts = sum(s.sum() for s in shards), sum(m.sum() for m in masks)
    for shard, mask in zip(shards, masks, strict=True):
        replies = iter([sums, counts.float()])
        assert masked_mean(shard, mask, reduce=lambda _, replies=replies: next(replies)).item() == 3.5


def test_float_mask_is_refused():
    with pytest.raises(ValueError, match="bool"):
        masked(VALUES, MASK.float())
    with pytest.raises(ValueError, match="shapes"):
        masked(VALUES, MASK[:2])
