"""The critic of PPO: a scalar model on the actor's ranks, with an optimizer of its own.

    before the first update: micro-batches -> values [R] -> (GAE, in `preparation`) -> advantages for the actor, returns
    then for each optimizer step: the same micro-batches -> values -> clipped value loss -> the critic's own step

It shares the actor's ranks, process groups and micro-batches, so that no value crosses a process: every token's value is
made where its log-prob is. What it costs is the memory of a second model and optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from miles.config.groups import Config, OptimizerArgs
from miles.trainers import checkpoints

from . import checkpoint, cpu
from .hf_files import is_hf_directory, write_hf_directory
from .hf_names import NameMap
from .learner import Learner
from .model import build_scalar_model, params_dtype
from .model_weights import ModelWeights
from .packing import MicroBatch
from .parallel import Parallel
from .scores import ValuePasses


class Critic:
    """The value model with its optimizer, on one rank. All ranks call each method together."""

    def __init__(self, config: Config, names: NameMap, parallel: Parallel, *, total_steps: int):
        """Builds the model; `load` gives it weights. `total_steps`: the critic's optimizer steps in the whole run."""
        self._config, self._parallel, self._total_steps = config, parallel, total_steps
        with cpu.cuda_means_cpu():
            self.model = build_scalar_model(config, parallel)
        self._weights = ModelWeights(self.model, names, parallel, tied=False)

    def start(self, warm_start: str | None) -> None:
        """Weights from --critic-load, else from `warm_start`, with a head of zeros if there is none there; then the optimizer.

        A --critic-load that is --critic-save may not be there yet. `warm_start` None: `load` comes next.
        """
        if warm_start is not None:
            ckpt = self._config.ckpt
            given = ckpt.critic_load
            has_own = given is not None and (given != ckpt.critic_save or _holds_weights(given))
            self._weights.load(given if has_own and given is not None else warm_start)
        self.learner = Learner(
            self.model,
            critic_optimizer(self._config),
            self._config.perf,
            self._parallel,
            total_steps=self._total_steps,
        )
        self._passes = ValuePasses(self.learner.ddp, self._parallel)

    def values(self, micro_batches: Sequence[MicroBatch], num_tokens: int) -> Tensor:
        """[num_tokens], in the batch's order of response tokens."""
        return self._passes.score(micro_batches, num_tokens)

    def step(self, micro_batches: Sequence[MicroBatch], old_values: Tensor, returns: Tensor) -> dict[str, float]:
        """One optimizer step; its metrics. Raises NonFiniteStep before anything moves."""
        clip = self._config.grpo.value_clip
        made = self.learner.step(lambda: self._passes.loss_and_gradients(micro_batches, old_values, returns, clip=clip))
        made.pop("loss")
        return made | {"critic_grad_norm": made.pop("grad_norm"), "critic_lr": made.pop("lr")}

    def load(self, found: Path, *, steps: int, with_optimizer: bool) -> None:
        """Continues from the critic of a whole checkpoint. Raises CheckpointError where it does not fit."""
        place = found / checkpoint.CRITIC
        optimizer = self.learner.optimizer if with_optimizer else None
        checkpoint.load_state(place, model=self.model, optimizer=optimizer, parallel=self._parallel)
        self.learner.continue_from(steps, with_optimizer=with_optimizer)

    def save_hf(self, path: str | Path) -> None:
        """Writes an HF sequence-classification directory with one label: the score of a text is its last token's value."""
        source = self._config.ckpt.hf_checkpoint
        assert source is not None
        if self._parallel.is_main:
            write_hf_directory(
                path, self._weights.stream(), source=source, dtype=params_dtype(self._parallel.device), one_score=True
            )
        else:
            for _ in self._weights.stream():
                pass
        self._parallel.barrier()


def critic_optimizer(config: Config) -> OptimizerArgs:
    """The OPTIMIZER flags with the critic's own rate and warm-up; its schedule also covers the critic-only rollouts."""
    optimizer, grpo = config.optimizer, config.grpo
    extra = grpo.num_critic_only_steps * (config.rollout.num_steps_per_rollout or 1)
    decay = optimizer.lr_decay_iters
    return dataclasses.replace(
        optimizer,
        lr=optimizer.lr if optimizer.critic_lr is None else optimizer.critic_lr,
        lr_warmup_iters=optimizer.critic_lr_warmup_iters,
        lr_warmup_fraction=None,
        lr_decay_iters=None if decay is None else decay + extra,
    )


def _holds_weights(path: str) -> bool:
    return is_hf_directory(path) or checkpoints.holds_checkpoints(path)
