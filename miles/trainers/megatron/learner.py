"""A model under training: gradient buffers, optimizer and schedule around its weights, and the one step they make.

zero -> forward and backward (the caller's) -> all finite? -> clip, step, schedule
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from miles.algo import Metric, finish_metrics
from miles.config.groups import OptimizerArgs, PerfArgs

from . import cpu
from .model import params_dtype
from .optimizer import GuardedStep, build_optimizer, build_schedule, follow_flags, learning_rate
from .parallel import Parallel


class NonFiniteStep(ArithmeticError):
    """Loss or gradient norm of a step is not finite; no weight was moved."""

    def __init__(self, loss: float, norm: float):
        super().__init__(f"loss {loss}, gradient norm {norm}")
        self.loss, self.norm = loss, norm


class Learner:
    """One model and what trains it. Made around the weights as they are: the optimizer's masters are copied from them."""

    def __init__(
        self, model: Sequence[GPTModel], args: OptimizerArgs, perf: PerfArgs, parallel: Parallel, *, total_steps: int
    ):
        """`total_steps` is the run's number of optimizer steps, which the rate decays over. Raises ConfigError."""
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32,
            use_distributed_optimizer=perf.use_distributed_optimizer,
            overlap_grad_reduce=perf.overlap_grad_reduce,
            overlap_param_gather=perf.overlap_param_gather,
        )
        config = model[0].config  # of all its pieces
        with cpu.cuda_means_cpu():
            self.ddp = [
                DistributedDataParallel(config, ddp_config, m, disable_bucketing=m is not model[0]) for m in model
            ]
        for part in self.ddp:
            part.broadcast_params()
        config.finalize_model_grads_func = _sum_gradients
        if perf.overlap_grad_reduce:
            no_sync = [part.no_sync for part in self.ddp]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.optimizer = build_optimizer(args, perf, self.ddp, params_dtype(parallel.device))
        self._schedule = build_schedule(args, self.optimizer, total_steps)
        self._guard = GuardedStep(self.optimizer, args.clip_grad)
        self._args, self._perf, self._parallel = args, perf, parallel
        self.steps = 0
        """Optimizer steps so far."""

    def step(self, loss_and_gradients: Callable[[], dict[str, Metric]]) -> dict[str, float]:
        """One optimizer step of the gradients that the call leaves in the model; its metrics, of which `loss` is one.

        Returns the metrics of all ranks, finished, with `grad_norm` and `lr`. Raises NonFiniteStep before anything moves.
        """
        for part in self.ddp:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()
        reduced = reduce_metrics(loss_and_gradients(), self._parallel)
        norm = self._guard.gradient_norm()
        loss = float(reduced["loss"][1])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteStep(loss, norm)
        rate = learning_rate(self.optimizer)
        self._guard.apply(norm)
        self._schedule.step(1)
        self.steps += 1
        return {**finish_metrics(reduced), "grad_norm": norm, "lr": rate}

    def finish(self) -> None:
        """After the last of several steps: weights that are still on their way to this rank arrive."""
        if self._perf.overlap_param_gather:
            for part in self.ddp:
                part.start_param_sync(force_sync=True)

    def continue_from(self, steps: int, *, with_optimizer: bool) -> None:
        """After a checkpoint was loaded: hyper-parameters are the flags', the schedule stands at `steps`.

        with_optimizer False: the checkpoint had the weights alone, and the masters are copied from them.
        """
        if not with_optimizer:
            self.optimizer.reload_model_params()
        follow_flags(self._args, self.optimizer)
        self.steps = steps
        self._schedule.num_steps = 0
        self._schedule.step(steps)


def reduce_metrics(metrics: dict[str, Metric], parallel: Parallel) -> dict[str, Metric]:
    """Metrics of the whole step, the same on every rank: one sum and one maximum over the data-parallel ranks.

    `metrics` are those of the last pipeline stage; other stages have none.
    """
    reduced: dict[str, Metric] = {}
    for is_max, reduce in ((False, parallel.sum_over_data), (True, parallel.max_over_data)):
        names = sorted(name for name, (kind, _) in metrics.items() if (kind == "max") == is_max)
        if not names:
            continue
        stacked = torch.stack([metrics[name][1].double() for name in names])
        values = reduce(stacked).cpu()
        reduced |= {name: (metrics[name][0], values[i]) for i, name in enumerate(names)}
    return parallel.from_last_stage(reduced)


def _sum_gradients(chunks: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's reduction over ranks, without its division by a token count."""
    finalize_model_grads(chunks, None, **kwargs)
