"""Fills in what was not given: from config.json, from other flags, from the machine. Each step is one function."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from miles.errors import ConfigError

from .algorithms import CORRECTION_BOUNDS, WHITENED_ESTIMATORS
from .async_rules import accounts_for_lag
from .batch_sizes import BatchSizes, solve_batch_sizes
from .fields import build_config, fields, show
from .groups import Config
from .hf import model_values, read_hf_config
from .hooks import absolute_hook, absolute_path
from .jobs import JOBS, find_job
from .layer_pattern import listed
from .platform import Platform
from .problem import Problem
from .source import DEFAULT, Source

#: MODEL flags that may differ from config.json: they are choices, not shapes of the checkpoint's tensors.
FREE_MODEL_FLAGS = frozenset(
    {
        *("seq_length", "max_position_embeddings", "make_vocab_size_divisible_by", "spec"),
        *("moe_router_bias_update_rate", "moe_router_dtype", "moe_router_load_balancing_type", "moe_aux_loss_coeff"),
        *("moe_token_dispatcher_type", "moe_grouped_gemm", "moe_permute_fusion"),
    }
)
#: MODEL flags that are a pattern of layers; one may be written in several ways.
PATTERN_FLAGS = frozenset({"window_attn_skip_freq", "moe_layer_freq", "linear_attention_freq"})


@dataclass
class Draft:
    """A configuration in the making: flat values, where each came from, and what was found wrong on the way."""

    values: dict[str, Any]
    sources: dict[str, Source]
    platform: Platform
    problems: list[Problem | str] = field(default_factory=list)

    @classmethod
    def start(cls, given: dict[str, Any], sources: dict[str, Source], platform: Platform) -> Draft:
        values = {name: given.get(name, copy(f.default)) for name, f in fields().items()}
        return cls(values, {name: sources.get(name, DEFAULT) for name in fields()}, platform)

    def fill(self, name: str, value: Any, origin: str | Source) -> None:
        """Sets an unset value; `origin` is what it was derived from."""
        if self.values[name] is None and value is not None:
            self.put(name, value, origin)

    def put(self, name: str, value: Any, origin: str | Source) -> None:
        self.values[name] = value
        self.sources[name] = origin if isinstance(origin, Source) else Source("derived", origin)

    def config(self) -> Config:
        return build_config(self.values)


def derive(draft: Draft) -> Draft:
    """Runs every step in order; a later one may use what an earlier one filled in."""
    for step in STEPS:
        step(draft)
    return draft


def _model(draft: Draft) -> None:
    directory = draft.values["hf_checkpoint"]
    if directory is None:
        return
    try:
        hf = read_hf_config(directory)
        shape = model_values(hf, where=directory)
    except ConfigError as error:
        draft.problems.append(str(error))
        return
    source = Source("config.json", f"{directory}/config.json")
    draft.fill("model_name", hf["model_type"], source)
    for name, flag in ((name, f.flag) for name, f in fields().items() if f.group == "model"):
        if name not in FREE_MODEL_FLAGS and name not in shape and draft.values[name]:
            why = f"{directory}/config.json describes a {hf['model_type']} model without it"
            draft.problems.append(Problem(flag, show(draft.values[name]), why, f"leave {flag} out"))
    for name, value in shape.items():
        given = draft.values[name]
        if given is not None and name not in FREE_MODEL_FLAGS and not _equal(name, given, value):
            flag = fields()[name].flag
            why = f"{directory}/config.json says {show(value)}"
            draft.problems.append(
                Problem(flag, show(given), why, f"leave {flag} out, or give the checkpoint it describes")
            )
        if name == "max_position_embeddings" and given is not None and given > value:
            why = f"{directory}/config.json says that the model knows {value}, and engines serve no more"
            draft.problems.append(Problem("--max-position-embeddings", given, why, f"give at most {value}"))
        draft.fill(name, value, source)


def _equal(name: str, a: Any, b: Any) -> bool:
    if name in PATTERN_FLAGS:
        try:
            return listed(a) == listed(b)
        except ValueError:
            return True  # A rule says what is wrong with it.
    return math.isclose(a, b, rel_tol=1e-9) if isinstance(a, float) else bool(a == b)


def _vocabulary_padding(draft: Draft) -> None:
    draft.fill(
        "make_vocab_size_divisible_by", 128 if draft.platform.has_gpu else 1, f"the {draft.platform.device} device"
    )


def _batch_sizes(draft: Draft) -> None:
    names = list(vars(BatchSizes()))
    solved = solve_batch_sizes(BatchSizes(**{name: draft.values[name] for name in names}))
    if isinstance(solved, Problem):
        if any(draft.values[name] is not None for name in names):
            draft.problems.append(solved)
        return
    known = ", ".join(fields()[name].flag for name in names if draft.values[name] is not None)
    for name, value in vars(solved).items():
        draft.fill(name, value, known)


def _prompt_column(draft: Draft) -> None:
    # Rows of data sets have several forms, each with columns of its own.
    if find_job(draft.values["loss_type"], online=draft.values["online_preferences"]).rows == "prompts":
        draft.fill("input_key", "input", "--loss-type")


def _lengths(draft: Draft) -> None:
    v = draft.values
    limit, engine_limit = v["max_position_embeddings"], v["sglang_args"].get("context_length")
    if find_job(v["loss_type"], online=v["online_preferences"]).rows != "prompts" and v["seq_length"] is not None:
        draft.fill("rollout_max_context_len", min(v["seq_length"], limit or v["seq_length"]), "--seq-length")
    if isinstance(engine_limit, int) and (limit is None or engine_limit < limit):
        draft.fill("rollout_max_context_len", engine_limit, "--sglang-context-length")
    draft.fill("rollout_max_context_len", limit, "--max-position-embeddings")
    draft.fill("rollout_max_response_len", v["rollout_max_context_len"], "--rollout-max-context-len")
    if v["rollout_max_context_len"] is not None:
        # A prompt that fills the context leaves no room for one token.
        draft.fill("rollout_max_prompt_len", v["rollout_max_context_len"] - 1, "--rollout-max-context-len")
    draft.fill("seq_length", v["rollout_max_context_len"], "--rollout-max-context-len")


def _sampling(draft: Draft) -> None:
    v = draft.values
    draft.fill("over_sampling_batch_size", v["rollout_batch_size"], "--rollout-batch-size")
    for name in ("temperature", "top_p", "top_k", "max_response_len"):
        draft.fill(f"eval_{name}", v[f"rollout_{name}"], fields()[f"rollout_{name}"].flag)


def _loss(draft: Draft) -> None:
    v = draft.values
    estimator = v["advantage_estimator"]
    if v["use_opd"]:
        draft.fill("opd_type", "megatron" if v["teacher_urls"] is None else "sglang", "--use-opd")
    draft.fill("policy_loss", "gspo" if estimator == "gspo" else "ppo_clip", "--advantage-estimator")
    draft.fill("normalize_advantages", estimator in WHITENED_ESTIMATORS, "--advantage-estimator")
    draft.fill("eps_clip_high", v["eps_clip"], "--eps-clip")
    if v["policy_loss"] == "dual_clip":
        draft.fill("eps_clip_c", 3.0, "--policy-loss")
    draft.fill("dppo_threshold", 0.15 if v["dppo_divergence"] == "tv" else 0.05, "--dppo-divergence")
    if v["calculate_per_token_loss"]:
        draft.fill("loss_aggregation", "token_mean", "--calculate-per-token-loss")
    draft.fill("loss_aggregation", JOBS[v["loss_type"]].loss_aggregation, "--loss-type")
    if v["loss_aggregation"] == "constant":
        draft.fill("loss_constant_length", v["rollout_max_response_len"], "--rollout-max-response-len")
    if v["use_tis"] and v["custom_tis_function_path"] is None:
        draft.fill("off_policy_correction", "token_truncate", "--use-tis")
    low, high = CORRECTION_BOUNDS.get(v["off_policy_correction"], (0.0, 2.0))
    draft.fill("tis_clip_low", low, "--off-policy-correction")
    draft.fill("tis_clip", high, "--off-policy-correction")


def _ahead(draft: Draft) -> None:
    draft.fill("rollouts_ahead", 0, "the driver")
    if not accounts_for_lag(draft.values):
        draft.put("use_rollout_logprobs", True, "train_async.py: the weights that answered are older")


def _schedule(draft: Draft) -> None:
    v = draft.values
    if v["num_rollout"] is not None and v["num_steps_per_rollout"] is not None:
        steps = (v["num_rollout"] - v["num_critic_only_steps"]) * v["num_steps_per_rollout"]
        draft.fill("lr_decay_iters", max(1, steps), "--num-rollout and --num-steps-per-rollout")
    elif v["num_epoch"] is not None:
        # Known when the prompts are; see `derive_num_rollout`.
        for name in ("num_rollout", "lr_decay_iters"):
            if v[name] is None:
                draft.sources[name] = Source("derived", "--num-epoch and the number of prompts")


def _critic(draft: Draft) -> None:
    v = draft.values
    if v["advantage_estimator"] == "ppo":
        draft.fill("critic_lr", v["lr"], "--lr")
        for name in ("num_nodes", "num_gpus_per_node"):
            draft.fill(f"critic_{name}", v[f"actor_{name}"], fields()[f"actor_{name}"].flag)


def _ranks(draft: Draft) -> None:
    v, machine = draft.values, draft.platform
    if machine.has_gpu:
        draft.fill("actor_num_gpus_per_node", v["num_gpus_per_node"], "--num-gpus-per-node")
        draft.fill("actor_num_gpus_per_node", 8, "the GPU machine")
    draft.fill("actor_num_gpus_per_node", 1, "the CPU machine")
    actors = v["actor_num_nodes"] * v["actor_num_gpus_per_node"]
    if v["colocate"]:
        draft.fill("rollout_num_gpus", actors, "--colocate")
    draft.fill("rollout_num_gpus", v["rollout_num_gpus_per_engine"], "--rollout-num-gpus-per-engine, one engine")


def _automatic(draft: Draft) -> None:
    v, device = draft.values, draft.platform.device
    if v["rollout_engine"] == "auto":
        draft.put("rollout_engine", "embedded", "what is built")
    if v["distributed_backend"] == "auto":
        draft.put("distributed_backend", "nccl" if device == "cuda" else "gloo", f"the {device} device")


def _debug(draft: Draft) -> None:
    if draft.values["load_debug_rollout_data"] is not None and not draft.values["debug_train_only"]:
        draft.put("debug_train_only", True, "--load-debug-rollout-data")


#: Flags that name a file or a directory of this machine.
PATH_FLAGS = (
    *(
        "hf_checkpoint",
        "ref_load",
        "load",
        "save",
        "save_hf",
        "critic_load",
        "critic_save",
        "rm_model",
        "ref_log_probs_dir",
        "prompt_data",
        "eval_config",
        "run_dir",
    ),
    *("teacher_load", "save_debug_rollout_data", "load_debug_rollout_data", "wandb_dir", "tb_project_name"),
)
HOOK_FLAGS = (
    *("custom_rm_path", "custom_generate_function_path", "dynamic_sampling_filter_path"),
    *("custom_tis_function_path", "custom_loss_function_path"),
    *("custom_rollout_log_function_path", "custom_eval_rollout_log_function_path"),
)


def _absolute_paths(draft: Draft) -> None:
    """Worker processes may have another working directory."""
    v = draft.values
    for names, absolute in ((PATH_FLAGS, absolute_path), (HOOK_FLAGS, absolute_hook)):
        v.update({name: absolute(v[name]) for name in names if v[name] is not None})
    v["plugin"] = tuple(absolute_hook(path) for path in v["plugin"])
    if v["eval_prompt_data"] is not None:
        v["eval_prompt_data"] = tuple(absolute_path(w) if i % 2 else w for i, w in enumerate(v["eval_prompt_data"]))


STEPS: tuple[Callable[[Draft], None], ...] = (
    _model,
    _vocabulary_padding,
    _batch_sizes,
    _prompt_column,
    _lengths,
    _sampling,
    _loss,
    _ahead,
    _schedule,
    _ranks,
    _critic,
    _automatic,
    _debug,
    _absolute_paths,
)


def derive_num_rollout(config: Config, num_prompts: int) -> Config:
    """`config` with --num-rollout (and --lr-decay-iters) from --num-epoch and the number of prompts, where it is unset.

    The passes over the prompts follow each other without a gap; the rollouts are those that they fill. Raises
    `ConfigError` when they do not fill one.
    """
    rollout = config.rollout
    if rollout.num_rollout is not None or rollout.num_epoch is None:
        return config
    assert rollout.rollout_batch_size is not None
    num_rollout = rollout.num_epoch * num_prompts // rollout.rollout_batch_size
    if num_rollout == 0:
        raise ConfigError(
            f"--num-epoch, got {rollout.num_epoch}: {num_prompts} prompts a pass do not fill one rollout of "
            f"--rollout-batch-size {rollout.rollout_batch_size}; raise --num-epoch or lower --rollout-batch-size"
        )
    derived = replace(config, rollout=replace(rollout, num_rollout=num_rollout))
    if config.optimizer.lr_decay_iters is None and rollout.num_steps_per_rollout is not None:
        trained = max(1, num_rollout - config.grpo.num_critic_only_steps)
        optimizer = replace(derived.optimizer, lr_decay_iters=trained * rollout.num_steps_per_rollout)
        derived = replace(derived, optimizer=optimizer)
    return derived
