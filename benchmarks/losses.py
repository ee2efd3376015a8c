"""What a loss costs: forward and backward of each policy and preference loss at 64k packed tokens, beside reading its tensors once.

    .venv/bin/python benchmarks/losses.py [--tokens 65536] [--repeats 9] [--json FILE]

All sides are computed from per-token log-probs, as the trainer does. `read` sums every input column once: no loss can be faster.
Token-level, sequence-level and preference losses are classes of their own; each is compared with the cheapest of its class. A reward
model's loss is not among them: it reads one score a row.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from common import interleave, median, pin, report, spread

if TYPE_CHECKING:
    import torch

    from miles.types import LossInputs, LossOutputs

    Function = Callable[[LossInputs], LossOutputs]

SEQUENCE_LEVEL = ("gspo", "sequence_truncate", "sequence_mask", "geometric", "opsm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536, help="response tokens side by side")
    parser.add_argument("--row-tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cores", type=int, nargs="+")
    parser.add_argument("--json")
    given = parser.parse_args()
    pin(given.cores)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on the terminal

    inputs = make_inputs(given.tokens, given.row_tokens)
    sides: dict[str, Callable[[], object]] = {"read": lambda: read(inputs)}
    classes = {"token": policies(), "sequence": {}, "preference": preferences()}
    for name in SEQUENCE_LEVEL:
        classes["sequence"][name] = classes["token"].pop(name)
    levels = {name: level for level, losses in classes.items() for name in losses}
    for losses in classes.values():
        sides |= {name: (lambda loss=loss: step(inputs, loss)) for name, loss in losses.items()}
    times = interleave(sides, repeats=given.repeats, warm_up=2)
    cheapest = {level: min(median(times[name]) for name in losses) for level, losses in classes.items()}
    rows = []
    for name, side in sides.items():
        time_s, level = median(times[name]), levels.get(name)
        rows.append(
            {
                "loss": name,
                "level": level or "-",
                "ms": 1e3 * time_s,
                "spread": spread(times[name]),
                "x read": time_s / median(times["read"]),
                "x cheapest of its class": time_s / cheapest[level] if level else "-",
                "peak MiB": peak_bytes(side) / 2**20,
            }
        )
    settings = {"tokens": given.tokens, "row tokens": given.row_tokens, "repeats": given.repeats, "dtype": "float32"}
    report("losses", rows, settings=settings, json_path=given.json)


def policies() -> dict[str, Function]:
    """Every policy loss alone, and every correction on top of ppo_clip."""
    from miles.algo import PolicyLossSpec, policy_loss, surrogates
    from miles.algo.corrections import corrections

    found = {name: PolicyLossSpec(policy_loss=name) for name in surrogates}
    found |= {name: PolicyLossSpec(off_policy_correction=name) for name in corrections if name != "opsm"}
    found["opsm"] = PolicyLossSpec(use_opsm=True)
    found["kl and entropy"] = PolicyLossSpec(
        use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="k3", use_unbiased_kl=True, entropy_coef=0.01
    )
    return {name: functools.partial(policy_loss, spec=spec) for name, spec in found.items()}


def preferences() -> dict[str, Function]:
    """Every loss of pairs with a reference, and those without one; KTO beside its baseline's pass, which it needs as well."""
    from miles.algo.kto import kto
    from miles.algo.preference import cpo, dpo, orpo, pair_losses, simpo
    from miles.algo.preference_spec import PreferenceSpec

    found: dict[str, Function] = {}
    for name in pair_losses:
        smoothing = 0.1 if name in ("exo_pair", "robust") else 0.0
        found[f"dpo {name}"] = functools.partial(
            dpo, spec=PreferenceSpec(dpo_loss_type=(name,), label_smoothing=smoothing)
        )
    found["dpo, all options"] = functools.partial(
        dpo, spec=PreferenceSpec(f_divergence="js_divergence", rpo_alpha=1.0, ld_alpha=0.5, label_smoothing=0.1)
    )
    for loss in (orpo, simpo, cpo, kto):
        found[loss.__name__] = functools.partial(loss, spec=PreferenceSpec())
    return found


def make_inputs(tokens: int, row_tokens: int) -> LossInputs:
    import torch

    from miles.types import LossInputs

    torch.manual_seed(0)
    row = torch.arange(tokens) // row_tokens
    rows = int(row.max()) + 1
    pairs = torch.arange(rows // 2) * 2

    def log_probs() -> torch.Tensor:
        return -torch.rand(tokens) * 2 - 0.01

    return LossInputs(
        log_probs=log_probs().requires_grad_(),
        old_log_probs=log_probs(),
        advantages=torch.randn(rows)[row],
        loss_mask=torch.rand(tokens) > 0.1,
        token_weight=torch.full((tokens,), 1 / tokens),
        row=row,
        num_rows=rows,
        ref_log_probs=log_probs(),
        rollout_log_probs=log_probs(),
        entropy=torch.rand(tokens).requires_grad_(),
        row_weight=torch.full((rows,), 2 / rows),
        chosen_rows=pairs,
        rejected_rows=pairs + 1,
        desirable=torch.arange(rows) % 2 == 0,
        kl_baseline=torch.tensor(0.1),
    )


def step(inputs: LossInputs, loss: Function) -> None:
    inputs.log_probs.grad = inputs.entropy.grad = None
    loss(inputs).loss.backward()


def read(inputs: LossInputs) -> None:
    import torch

    for value in vars(inputs).values():
        if isinstance(value, torch.Tensor):
            value.detach().sum()


def peak_bytes(side: Callable[[], object]) -> int:
    """The most memory beyond the inputs that tensors hold at a time, from the allocator's own events."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        side()
    held = peak = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main()
