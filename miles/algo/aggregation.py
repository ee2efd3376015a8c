"""How token losses become one number: a scalar weight for each row, fixed before any split.

The loss of an optimizer step is `sum over rows and tokens of weight[row] * mask[token] * token_loss[token]`, a plain sum,
so rows may land on any rank and in any micro-batch. Legend: `B` rows of one optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .registry import Registry


@dataclass(frozen=True)
class Population:
    """One optimizer step, counted over all ranks. A trajectory without a trained token is in none of the counts."""

    tokens_of_trajectory: np.ndarray
    """[B] trained tokens of the row's trajectory, over all its rows."""
    num_trajectories: int
    num_tokens: int


#: Population and constant length (tokens) -> weight [B] or scalar; only used where a row has trained tokens.
Aggregation = Callable[[Population, int | None], np.ndarray | float]

aggregations: Registry[Aggregation] = Registry("loss aggregation")


@aggregations.register("seq_mean")
def seq_mean(population: Population, constant_length: int | None) -> np.ndarray | float:
    """Mean over a trajectory's tokens, then over trajectories. arXiv 2402.03300."""
    return 1.0 / (population.tokens_of_trajectory * population.num_trajectories)


@aggregations.register("token_mean")
def token_mean(population: Population, constant_length: int | None) -> np.ndarray | float:
    """Mean over all tokens of the step. arXiv 2503.14476 (DAPO)."""
    return 1.0 / population.num_tokens


@aggregations.register("constant")
def constant(population: Population, constant_length: int | None) -> np.ndarray | float:
    """Sum over a trajectory's tokens divided by a constant length, then mean over trajectories. arXiv 2503.20783."""
    if constant_length is None or constant_length < 1:
        raise ValueError(
            f"constant_length, got {constant_length}: constant aggregation divides by it; give at least 1 token"
        )
    return 1.0 / (constant_length * population.num_trajectories)


def loss_weights(
    trained_tokens_of_row: np.ndarray, trajectory: np.ndarray, *, mode: str, constant_length: int | None = None
) -> np.ndarray:
    """Weight of each row's token losses in the loss of ONE optimizer step, `[B]` float64.

    trained_tokens_of_row: [B] integers >= 0, unmasked response tokens. trajectory: [B] integers, equal for the rows of
    one trajectory, which count once. mode: `seq_mean`, `token_mean` or `constant`. Rows and trajectories without a
    trained token are out of every denominator and weigh 0.
    Raises ConfigError for an unknown mode, ValueError for shapes that disagree or a missing constant length.
    """
    tokens = np.asarray(trained_tokens_of_row)
    trajectory = np.asarray(trajectory)
    if tokens.ndim != 1 or trajectory.shape != tokens.shape:
        raise ValueError(f"tokens and trajectory, got shapes {tokens.shape} and {trajectory.shape}: both must be [B]")
    if (tokens < 0).any():
        raise ValueError(f"trained_tokens_of_row, got {int(tokens.min())}: a count cannot be negative")
    aggregate = aggregations.get(mode)
    if not tokens.any():
        return np.zeros(tokens.shape, dtype=np.float64)

    names, number = np.unique(trajectory, return_inverse=True)
    per_trajectory = np.bincount(number, tokens, len(names))
    population = Population(
        # A trajectory without tokens has no weight to compute; 1 keeps the division defined.
        tokens_of_trajectory=np.maximum(per_trajectory, 1)[number],
        num_trajectories=int(np.count_nonzero(per_trajectory)),
        num_tokens=int(tokens.sum()),
    )
    return np.where(tokens > 0, aggregate(population, constant_length), 0.0)
