"""From logits to tokens. The randomness of a row's token `t` is a hash of (the row's seed, t) and nothing else.

    logits [B, V] -> penalties, bias, minimum length -> / temperature -> log_softmax (reported)
                  -> top-k, top-p, min-p -> inverse CDF at uniform(seed, t) -> token [B]

Reported log-probs are taken before top-k / top-p / min-p, as SGLang does. Legend: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK_64 = (1 << 64) - 1

#: Up to here the CDF is one float64 cumsum; above, one sum per block finds the block first.
_BLOCK = 512


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), on uint64 arrays."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Uniform numbers in (0, 1), float64 `[B]`: a pure function of (seed uint64, step) per row."""
    bits = _mix(_mix(seeds) + _GOLDEN * (steps.astype(np.uint64) + np.uint64(1)))
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def derive_seed(seed: int, row: int) -> int:
    """Seed of row `row` of a request whose rows share one seed: SplitMix64 of both, in [0, 2**64)."""
    return _mix_int(_mix_int(seed & _MASK_64) + int(_GOLDEN) * (row + 1) & _MASK_64)


def _mix_int(x: int) -> int:
    """`_mix` of one number; plain ints are ten times quicker than arrays of one."""
    x = (x ^ (x >> 30)) * int(_MIX_1) & _MASK_64
    x = (x ^ (x >> 27)) * int(_MIX_2) & _MASK_64
    return x ^ (x >> 31)


@dataclass(frozen=True)
class Filters:
    """Truncation of the distribution for some rows, `[K]` each."""

    rows: torch.Tensor
    top_k: torch.Tensor
    """int64; the vocabulary's size where off"""
    top_p: torch.Tensor
    min_p: torch.Tensor


def log_probs(logits: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
    """`log_softmax(logits / temperature)`, `[B, V]` float32; `temperature` is `[B, 1]`, None for 1 everywhere."""
    return torch.log_softmax(logits if temperature is None else logits / temperature, -1)


def truncate(probs: torch.Tensor, filters: Filters) -> None:
    """Zeroes, in place, what top-k, top-p and min-p exclude. Each looks at the distribution before truncation.

    A token stays if fewer than top_k are likelier, the likelier ones hold at most top_p together, and it has at least
    min_p times the highest probability; the likeliest always stays.
    """
    chosen = probs[filters.rows]
    ordered, order = chosen.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(probs.shape[-1], device=probs.device)
    likelier_mass = ordered.cumsum(-1) - ordered
    keep = ranks < filters.top_k[:, None]
    keep &= likelier_mass <= filters.top_p[:, None]
    keep &= ordered >= filters.min_p[:, None] * ordered[:, :1]
    keep[:, 0] = True
    probs[filters.rows] = torch.zeros_like(chosen).scatter_(-1, order, ordered * keep)


def draw(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Token of each row by inverse CDF: the first whose cumulative mass exceeds `uniform * total`. `[B]` int64.

    `probs` `[B, V]` float32 need not sum to 1; a token of probability 0 is never drawn. `uniform` `[B]` float64.
    """
    num_rows, vocab = probs.shape
    if vocab <= 2 * _BLOCK:
        return _invert(probs, uniform)
    whole = vocab // _BLOCK * _BLOCK
    masses = probs[:, :whole].view(num_rows, -1, _BLOCK).sum(-1)
    if whole < vocab:
        masses = torch.cat((masses, probs[:, whole:].sum(-1, keepdim=True)), -1)
    cumulative = masses.cumsum(-1, dtype=torch.float64)
    target = uniform * cumulative[:, -1]
    block = _first_above(cumulative, target)
    # Within the block the remaining target is again a fraction of the block's mass.
    before = cumulative.gather(1, block) - masses.gather(1, block).double()
    within = ((target[:, None] - before) / masses.gather(1, block).double()).clamp_(0.0, 1.0)[:, 0]
    columns = block * _BLOCK + torch.arange(_BLOCK, device=probs.device)
    inside = probs.gather(1, columns.clamp(max=vocab - 1)) * (columns < vocab)
    return block[:, 0] * _BLOCK + _invert(inside, within)


def _invert(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    return _first_above(cumulative, uniform * cumulative[:, -1])[:, 0]


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[B, 1] the first column whose cumulative mass exceeds the target; rounding cannot push it past the last mass."""
    limit = cumulative[:, -1] * (1.0 - 2.0**-52)
    return torch.searchsorted(cumulative, torch.minimum(target, limit)[:, None], right=True).clamp_(
        max=cumulative.shape[-1] - 1
    )


def penalise(
    logits: torch.Tensor,
    counts: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
    repetition: torch.Tensor,
) -> torch.Tensor:
    """Penalties on what a row has generated so far. `logits`, `counts` `[K, V]`; the penalties `[K, 1]`; a new tensor.

    `logits - frequency * count - presence * (count > 0)`, then positive logits of seen tokens are divided and negative
    ones multiplied by `repetition` (Keskar et al. 2019).
    """
    seen = counts > 0
    out = logits - frequency * counts - presence * seen
    return torch.where(seen, torch.where(out > 0, out / repetition, out * repetition), out)
