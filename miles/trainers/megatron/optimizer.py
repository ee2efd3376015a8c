"""Megatron's optimizer and schedule, and the one guarded step.

gradients (summed over ranks) -> norm -> finite? -> clip -> Adam or SGD -> schedule
                                          no: nothing has been touched, the caller raises
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import megatron.core.optimizer as mcore_optimizer
import megatron.core.optimizer.distrib_optimizer as mcore_distributed
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging
from torch import Tensor
from torch.optim.adamw import adamw

from miles.config.groups import OptimizerArgs, PerfArgs
from miles.errors import ConfigError

from . import cpu


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW with one fused kernel per parameter group, whose step count is the group's: the contract of TE's FusedAdam.

    arXiv 1711.05101. It takes FusedAdam's place where neither Transformer Engine nor Apex is installed; megatron's
    checkpoints of distributed optimizers need the count in the group. Runs on CPU and GPU.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
    ):
        if not (adam_w_mode and bias_correction):
            raise ValueError("GroupStepAdamW decouples weight decay and corrects the moments' bias, always")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            done = int(group.get("step", 0))
            group["step"] = done + 1
            if not params:
                continue
            for p in params:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(done), device=p.device) for p in params],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def _use_group_step_adam() -> None:
    """Gives megatron our Adam where it would fall back to torch's, which keeps a step count per parameter."""
    if mcore_optimizer.USING_PYTORCH_OPTIMIZER:
        mcore_optimizer.Adam = mcore_distributed.Adam = GroupStepAdamW
        mcore_optimizer.USING_PYTORCH_OPTIMIZER = False
        mcore_distributed.USING_APEX_OPTIMIZER = mcore_distributed.HAVE_APEX_OR_TE = True


def build_optimizer(
    args: OptimizerArgs, perf: PerfArgs, model: Sequence[DistributedDataParallel], dtype: torch.dtype
) -> MegatronOptimizer:
    """Megatron's optimizer over the model's parameters, with fp32 masters for bf16 ones. 1-d parameters have no decay."""
    _use_group_step_adam()
    config = OptimizerConfig(
        optimizer=args.optimizer,
        lr=args.lr,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_eps,
        clip_grad=args.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=perf.use_distributed_optimizer,
        overlap_param_gather=perf.overlap_param_gather,
    )
    with cpu.cuda_means_cpu():
        optimizer = get_megatron_optimizer(config, list(model), use_gloo_process_groups=False)
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            part.get_parameter_state_dp_zero = functools.partial(_state_in_place, part)
        if part.init_state_fn is None:
            part.init_state_fn = _zero_momentum
        # From the start, so that memory is known before the first step and a checkpoint of step 0 is complete.
        part.init_state_fn(part.optimizer, config)
    return optimizer


def _state_in_place(optimizer: DistributedOptimizer, **kwargs: Any) -> dict[Any, Any] | None:
    """Megatron's state of all data-parallel ranks for a checkpoint, each bucket where the buffer has it.

    Megatron leaves out the padding between buckets, and then cuts parameters out by their places in the buffer: with a second
    bucket, which a pipeline's copy of a tied embedding has always, it would write other parameters' values.
    """
    state: dict[Any, Any] | None = DistributedOptimizer.get_parameter_state_dp_zero(optimizer, **kwargs)
    for number, buffer in enumerate(optimizer.buffers if state is not None else ()):
        assert state is not None
        for of_dtype in state[number].values():
            for key, packed in of_dtype.items():
                if not isinstance(packed, Tensor):
                    continue
                placed, start = packed.new_zeros(buffer.numel), 0
                for bucket in buffer.buckets:
                    stop = start + bucket.numel_unpadded
                    placed[bucket.offset : bucket.offset + bucket.numel_unpadded] = packed[start:stop]
                    start = stop
                of_dtype[key] = placed
    return state


def _zero_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Gives SGD its state; megatron has this for Adam alone."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))


def build_schedule(args: OptimizerArgs, optimizer: MegatronOptimizer, total_steps: int) -> OptimizerParamScheduler:
    """Megatron's schedule, counted in optimizer steps; decay takes `total_steps` unless --lr-decay-iters says otherwise.

    As in Megatron, step k uses the rate of k finished steps: with warm-up the very first is 0. Raises ConfigError where
    warm-up is as long as decay.
    """
    decay = max(1, args.lr_decay_iters or total_steps)
    warmup = args.lr_warmup_iters if args.lr_warmup_fraction is None else int(args.lr_warmup_fraction * decay)
    if warmup >= decay:
        raise ConfigError(
            f"warm-up, got {warmup} optimizer steps: decay ends after {decay}, so the rate would never reach --lr; "
            "lower --lr-warmup-iters or --lr-warmup-fraction, or raise --lr-decay-iters"
        )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        # WSD without further flags: stable until the last tenth, then down linearly.
        wsd_decay_steps=max(1, decay // 10) if args.lr_decay_style == "WSD" else None,
        lr_wsd_decay_style="linear" if args.lr_decay_style == "WSD" else None,
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate that the next step will use."""
    return float(get_canonical_lr_for_logging(optimizer.param_groups) or 0.0)


def follow_flags(args: OptimizerArgs, optimizer: MegatronOptimizer) -> None:
    """Sets what the flags say of the optimizer: a loaded checkpoint brings the values of the run that wrote it."""
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = args.lr, args.min_lr
        if args.optimizer == "adam":
            group["betas"], group["eps"] = (args.adam_beta1, args.adam_beta2), args.adam_eps


class GuardedStep:
    """One optimizer step in two halves, with room between them to look at the gradient norm before anything moves."""

    def __init__(self, optimizer: MegatronOptimizer, clip_grad: float):
        self._optimizer, self._clip_grad = optimizer, clip_grad

    def gradient_norm(self) -> float:
        """Global L2 norm of the gradients, the same on every rank. NaN or infinite where a gradient is."""
        with cpu.cuda_means_cpu():
            self._optimizer.prepare_grads()
            return float(self._optimizer.get_grad_norm())

    def apply(self, norm: float) -> None:
        """Clips to --clip-grad and steps. `norm` is what `gradient_norm` returned."""
        if not math.isfinite(norm):
            raise ValueError(f"gradient norm, got {norm}: a step with it would destroy the weights")
        with cpu.cuda_means_cpu():
            for part in _parts(self._optimizer):
                parameters: list[Tensor] = part.get_parameters()
                if self._clip_grad > 0 and parameters:
                    clip_grad_by_total_norm_fp32(parameters, self._clip_grad, norm)
            self._optimizer.step_with_ready_grads()


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron chains one optimizer for dense and one for expert parameters."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
