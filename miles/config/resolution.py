"""The one way to a configuration: words and files in, a frozen and checked `Config` with the origin of each value out.

argv ──┐
file ──┼─ given values ── derive ── rules ── Resolution
HF   ──┘  (command line over file over config.json over default)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .command_line import Action, parse
from .config_file import read_config_file
from .derive import Draft, derive
from .engine_args import engine_args_not_in_effect
from .fields import coerce_all, fields, group_types, show
from .groups import Config
from .platform import Platform, detect_platform
from .problem import Problem, raise_if
from .rules import Facts, check_rules, warnings
from .secrets import hide_secrets, public_dict
from .source import COMMAND_LINE, Source


@dataclass(frozen=True)
class NotInEffect:
    """A flag that is valid and has nothing to act on here: it changes speed or memory of another kind of machine."""

    flag: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.flag} {show(self.value)} ({self.why})"


@dataclass(frozen=True)
class Resolution:
    """A resolved configuration and how it came about."""

    config: Config
    sources: Mapping[str, Source]
    """Flat field name -> where its value came from; every field is there."""
    action: Action
    not_in_effect: tuple[NotInEffect, ...]
    warnings: tuple[str, ...]
    """Allowed, and probably not meant."""
    platform: Platform
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment variable -> key that was given as a flag; the configuration holds `HIDDEN` in its place."""

    @property
    def has_gpu(self) -> bool:
        return self.platform.has_gpu

    def describe(self) -> str:
        """What `--print-config` prints: every flag by group, its value, and where it came from."""
        values = {name: value for group in public_dict(self.config).values() for name, value in group.items()}
        width = max(map(len, fields()))
        lines: list[str] = []
        for group in group_types():
            lines += ["", f"{group}:"]
            lines += [
                f"  {name:{width}}  {show(values[name]):<28}  {self.sources[name]}"
                for name, field in fields().items()
                if field.group == group
            ]
        if self.not_in_effect:
            lines += ["", f"not in effect on {self.platform.device}:", *(f"  {item}" for item in self.not_in_effect)]
        if self.warnings:
            lines += ["", "warnings:", *(f"  {text}" for text in self.warnings)]
        return "\n".join(lines[1:])


def resolve(
    argv: Sequence[str] | None = None, *, platform: Platform | None = None, rollouts_ahead: int = 0
) -> Resolution:
    """Reads `argv` (default: `sys.argv[1:]`) and the files that it names. Prints nothing, except for `--help` (exit 0).

    `platform` is the machine that defaults follow; found if not given. `rollouts_ahead` is the driver's. Raises `ConfigError` with every problem.
    """
    line = parse(sys.argv[1:] if argv is None else argv)
    values: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    engine: dict[str, Any] = {}
    if line.config_file is not None:
        file = read_config_file(line.config_file)
        values.update(file.values)
        engine.update(file.engine)
        sources.update({name: Source("file", f"{file.path}:{fields()[name].group}") for name in file.values})
        if file.engine:
            sources["sglang_args"] = Source("file", f"{file.path}:sglang")
        for name in line.unset & values.keys():
            del values[name], sources[name]
    engine.update(line.engine)
    values.update(line.values)
    sources.update(dict.fromkeys([*line.values, *(["sglang_args"] if line.engine else [])], COMMAND_LINE))
    driver = "train_async.py" if rollouts_ahead else "train.py"
    if values.setdefault("rollouts_ahead", rollouts_ahead) != rollouts_ahead:
        why = f"{driver} generates {rollouts_ahead} ahead"
        raise_if([Problem("--rollouts-ahead", values["rollouts_ahead"], why, "leave it out, and choose the driver")])
    sources.setdefault("rollouts_ahead", Source("derived", driver))
    if engine:
        values["sglang_args"] = {**values.get("sglang_args", {}), **engine}
    return _finish(values, sources, line.action, platform or detect_platform(), launch=True)


def make_config(*, platform: Platform | None = None, **flat: Any) -> Config:
    """A resolved `Config` from flat field names, for tests and tools: `make_config(hf_checkpoint=d, rollout_batch_size=4)`.

    Derivation and rules apply as for a run; what only a run needs (a checkpoint, prompts, a length) may be left out.
    The machine is a CPU unless `platform` says otherwise. Raises `ConfigError`.
    """
    values, problems = coerce_all(flat)
    raise_if(problems)
    sources = dict.fromkeys(values, COMMAND_LINE)
    return _finish(values, sources, "run", platform or Platform(), launch=False).config


def _finish(
    values: dict[str, Any], sources: dict[str, Source], action: Action, platform: Platform, *, launch: bool
) -> Resolution:
    values, secrets = hide_secrets(values)
    draft = derive(Draft.start(values, sources, platform))
    config = draft.config()
    given = frozenset(name for name, source in draft.sources.items() if source.explicit)
    raise_if([*draft.problems, *check_rules(Facts(config, given, platform), launch=launch)])
    return Resolution(
        config,
        dict(draft.sources),
        action,
        tuple(_not_in_effect(config, platform)),
        warnings(config),
        platform,
        secrets,
    )


def _not_in_effect(config: Config, platform: Platform) -> list[NotInEffect]:
    found = [
        NotInEffect(flag, value, "the embedded engine has nothing like it")
        for flag, value in engine_args_not_in_effect(config)
    ]
    if not platform.has_gpu and config.perf.attention_backend in ("flash", "fused"):
        found.append(NotInEffect("--attention-backend", config.perf.attention_backend, "kernels of a GPU"))
    for name in ("moe_grouped_gemm", "moe_permute_fusion"):
        if getattr(config.model, name) and not platform.has_gpu:
            found.append(NotInEffect(fields()[name].flag, True, "a kernel of a GPU"))
    if not platform.has_gpu and not config.optimizer.accumulate_allreduce_grads_in_fp32:
        found.append(NotInEffect("--accumulate-allreduce-grads-in-fp32", False, "a CPU's weights are fp32"))
    if config.perf.sequence_parallel and config.perf.tensor_model_parallel_size == 1:
        found.append(NotInEffect("--sequence-parallel", True, "one rank has each layer, and nobody to share with"))
    return found
