"""Rotary frequencies and their scalings for longer contexts.

Legend: `D` dimensions of a head that rotate. A pair of them turns by `position * frequency`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def inverse_frequencies(dim: int, base: float, scaling: Mapping[str, Any] | None = None) -> tuple[Tensor, float]:
    """[D/2] fp32 frequencies, and what cos and sin are multiplied by. `scaling` is --rope-scaling, whole.

    linear: all frequencies / factor. llama3: only waves longer than the first training's context, with a smooth passage.
    yarn (arXiv 2309.00071): the same idea by the number of turns within that context, and attention made sharper.
    """
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if scaling is None:
        return frequencies, 1.0
    factor = float(scaling["factor"])
    kind = scaling["rope_type"]
    if kind == "linear":
        return frequencies / factor, 1.0
    length = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = length / (2 * math.pi / frequencies)
        # 0: a wave that is scaled in full; 1: one that stays.
        share = ((turns - low) / (high - low)).clamp(0, 1)
        smooth = (1 - share) * frequencies / factor + share * frequencies
        return torch.where(share == 1, frequencies, torch.where(share == 0, frequencies / factor, smooth)), 1.0
    if kind == "yarn":
        bounds = [dim * math.log(length / (scaling[b] * 2 * math.pi)) / (2 * math.log(base)) for b in _BETAS]
        if scaling["truncate"]:
            bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
        first, last = max(bounds[0], 0), min(bounds[1], dim - 1)
        ramp = ((torch.arange(dim // 2) - first) / (last - first if last != first else 0.001)).clamp(0, 1)
        return frequencies / factor * ramp + frequencies * (1 - ramp), _sharpness(scaling)
    raise ValueError(f"--rope-scaling, got rope_type {kind!r}: it is linear, llama3 or yarn; see config.json")


_BETAS = ("beta_fast", "beta_slow")


def _sharpness(scaling: Mapping[str, Any]) -> float:
    if scaling["attention_factor"]:
        return float(scaling["attention_factor"])
    own, all_dims, factor = scaling["mscale"], scaling["mscale_all_dim"], scaling["factor"]
    return yarn_mscale(factor, own) / yarn_mscale(factor, all_dims) if own and all_dims else yarn_mscale(factor, 1)


def yarn_mscale(factor: float, mscale: float) -> float:
    """`0.1 * mscale * ln(factor) + 1` for a longer context, else 1."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0
