"""The CPU patches end with their scope; AdamW equals torch's; the schedule is Megatron's."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from miles.config.groups import OptimizerArgs
from miles.errors import ConfigError
from miles.trainers.megatron import cpu
from miles.trainers.megatron.optimizer import GroupStepAdamW, GuardedStep, build_schedule, follow_flags

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA")


@without_cuda
def test_patches_hold_inside_and_are_gone_outside() -> None:
    before = (torch.zeros, torch.Tensor.type, torch.cuda.current_device, torch.cuda.synchronize)
    with cpu.cuda_means_cpu(), cpu.cuda_means_cpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.empty(1, pin_memory=True, device=torch.device("cuda", 0)).device.type == "cpu"
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1).type(torch.int64).dtype == torch.int64
        assert torch.cuda.current_device() == torch.device("cpu")
        torch.cuda.synchronize()
    assert (torch.zeros, torch.Tensor.type, torch.cuda.current_device, torch.cuda.synchronize) == before
    with pytest.raises(RuntimeError), cpu.cuda_means_cpu():
        raise RuntimeError
    assert torch.zeros is before[0]
    with torch.device("meta"):
        assert torch.zeros(1).device.type == torch.arange(3).device.type == "meta"


def test_adam_equals_torch_and_counts_steps_in_the_group() -> None:
    torch.manual_seed(0)
    ours = [torch.randn(5, 3, requires_grad=True), torch.randn(7, requires_grad=True)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizer = GroupStepAdamW([{"params": ours[:1], "weight_decay": 0.3}, {"params": ours[1:]}], **options)
    expected = torch.optim.AdamW(
        [{"params": theirs[:1], "weight_decay": 0.3}, {"params": theirs[1:], "weight_decay": 0.0}], **options
    )
    for _ in range(6):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        expected.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert [group["step"] for group in optimizer.param_groups] == [6, 6]


def _rates(steps: int, **args: Any) -> list[float]:
    optimizer: Any = SimpleNamespace(param_groups=[{"max_lr": 1.0, "min_lr": 0.1, "wd_mult": 1.0}])
    schedule = build_schedule(OptimizerArgs(lr=1.0, min_lr=0.1, **args), optimizer, 10)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(1)
    return rates


def test_schedules() -> None:
    assert _rates(3) == [1.0, 1.0, 1.0]
    assert _rates(12, lr_decay_style="linear") == pytest.approx([1 - 0.09 * k for k in range(11)] + [0.1])
    assert _rates(4, lr_warmup_iters=2, lr_decay_style="constant") == pytest.approx([0.0, 0.5, 1.0, 1.0])
    assert _rates(6, lr_warmup_fraction=0.2, lr_decay_style="cosine")[2:] == pytest.approx(
        [0.1 + 0.45 * (1 + math.cos(math.pi * k / 8)) for k in range(4)]
    )
    assert _rates(5, lr_decay_iters=4, lr_decay_style="linear")[-1] == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="warm-up, got 10"):
        _rates(1, lr_warmup_iters=10)


def test_a_non_finite_norm_never_reaches_the_optimizer() -> None:
    untouched: Any = None
    with pytest.raises(ValueError, match="gradient norm, got nan"):
        GuardedStep(untouched, 1.0).apply(math.nan)


def test_adams_flags_are_the_groups() -> None:
    optimizer: Any = SimpleNamespace(param_groups=[{}])
    follow_flags(OptimizerArgs(lr=0.5, min_lr=0.25, adam_beta1=0.8, adam_beta2=0.7, adam_eps=1e-3), optimizer)
    assert optimizer.param_groups == [{"max_lr": 0.5, "min_lr": 0.25, "betas": (0.8, 0.7), "eps": 1e-3}]
