"""What the trainers refuse before any process starts, besides the rules of `miles.config`. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

from miles.config import Problem, check_names, load_hook, suggestion
from miles.config.algorithms import BUILT_IN, PAIR_LOSSES
from miles.config.hf import FAMILIES
from miles.config.platform import detect_platform
from miles.errors import HookError

if TYPE_CHECKING:
    from miles.config.groups import Config

#: What the hook of --custom-tis-function-path is called with, beside args.
CORRECTION_KEYWORDS = (
    *("pg_loss", "train_log_probs", "rollout_log_probs"),
    *("loss_masks", "total_lengths", "response_lengths"),
)

#: --attention-backend -> the package whose kernels it asks for.
_KERNELS = {"flash": "flash_attn", "fused": "transformer_engine"}


def check(config: Config) -> list[Problem]:
    """Every reason for which the trainer could not start with this configuration."""
    return [problem for rule in _RULES if (problem := rule(config)) is not None] + _check_parts_of_the_loss(config)


def _spec_resolves(config: Config) -> Problem | None:
    spec = config.model.spec
    if spec is None:
        return None
    got = " ".join(spec)
    if len(spec) != 2:
        return Problem("--spec", got, "it takes a module and a name in it", "write --spec MODULE NAME")
    try:
        found = importlib.util.find_spec(spec[0])
    except (ImportError, ValueError):
        found = None
    if found is None:
        return Problem(
            "--spec", got, f"there is no module {spec[0]}", "check the path; it must be importable in every worker"
        )
    return None


def _attention_kernels(config: Config) -> Problem | None:
    backend = config.perf.attention_backend
    package = _KERNELS.get(backend)
    if package is None or not detect_platform().has_gpu or importlib.util.find_spec(package) is not None:
        return None
    return Problem(
        "--attention-backend",
        backend,
        f"{package} is not installed",
        f"install it (pip install 'miles[{package.replace('_', '-')}]'), or take auto or local",
    )


def _linear_biases(config: Config) -> Problem | None:
    if config.model.disable_bias_linear is False and config.ckpt.model_name != "gpt_oss":
        return Problem(
            "--no-disable-bias-linear",
            None,
            "no model that can be loaded here has biases in all linear layers",
            "leave it out; --add-qkv-bias is for the Qwen2 kind",
        )
    return None


def _norm_epsilon(config: Config) -> Problem | None:
    epsilon = config.model.norm_epsilon
    if epsilon is not None and epsilon < 0:
        return Problem("--norm-epsilon", epsilon, "it is added to a variance", "give 0 or more")
    return None


def _model_name(config: Config) -> Problem | None:
    name = config.ckpt.model_name
    if name is None or name in FAMILIES:
        return None
    known = f"choose one of {', '.join(sorted(FAMILIES))}, or leave it out"
    return Problem(
        "--model-name", name, "no weight names are known for it", suggestion(name, FAMILIES, otherwise=known)
    )


def _custom_correction(config: Config) -> Problem | None:
    path = config.grpo.custom_tis_function_path
    if path is None:
        return None
    flag = "--custom-tis-function-path"
    try:
        load_hook(path, flag=flag, parameters=("args",), keywords=CORRECTION_KEYWORDS, is_async=False)
    except HookError as error:
        why, _, fix = str(error).removeprefix(f"{flag}, got {path}: ").rpartition("; ")
        takes = f"it is called with ({', '.join(('args', *CORRECTION_KEYWORDS))})"
        return Problem(flag, path, why or fix, fix if why else takes)
    return None


def _custom_loss(config: Config) -> Problem | None:
    path, flag = config.grpo.custom_loss_function_path, "--custom-loss-function-path"
    if path is None:
        return None
    try:
        load_hook(path, flag=flag, parameters=("args", "tokens"), is_async=False)
    except HookError as error:
        why, _, fix = str(error).removeprefix(f"{flag}, got {path}: ").rpartition("; ")
        return Problem(flag, path, why or fix, fix if why else "it is called with (args, tokens)")
    return None


def _check_parts_of_the_loss(config: Config) -> list[Problem]:
    """Names that are not built in are looked for among what plugins registered; only then is torch imported."""
    problems = []
    if unknown := [name for name in config.preference.dpo_loss_type if name not in PAIR_LOSSES]:
        from miles.algo.preference import pair_losses

        for name in unknown:
            if name not in (known := list(pair_losses)):
                fix = suggestion(name, known, otherwise=f"choose among {', '.join(known)}")
                problems.append(Problem("--dpo-loss-type", name, "neither Miles nor a --plugin registers it", fix))
    names = {name: getattr(config.grpo, name) for name in ("policy_loss", "off_policy_correction")}
    if all(value is None or value in BUILT_IN[name] for name, value in names.items()):
        return problems
    from miles.algo import surrogates
    from miles.algo.corrections import corrections

    return problems + check_names(config, {"policy_loss": surrogates, "off_policy_correction": corrections})


_RULES: tuple[Callable[[Config], Problem | None], ...] = (
    _spec_resolves,
    _model_name,
    _attention_kernels,
    _linear_biases,
    _norm_epsilon,
    _custom_correction,
    _custom_loss,
)
