"""What flags demand of each other, one small function per rule, run on the derived configuration.

A rule sees `given`, the field names that the user set, since a derived value is never the user's mistake.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterator
from pathlib import Path

from miles.errors import ConfigError

from .algorithm_rules import ALGORITHM_RANGES, ALGORITHM_RULES, algorithm_warnings
from .async_rules import ASYNC_RULES
from .critic_rules import CRITIC_RANGES, CRITIC_RULES
from .distillation_rules import DISTILLATION_RANGES, DISTILLATION_RULES
from .engine_args import DETERMINISTIC_BACKENDS, check_engine_args
from .eval_datasets import eval_datasets
from .fields import fields, flatten, show
from .groups import Config
from .jobs import JOB_RULES, job_of
from .model_rules import MODEL_RANGES, MODEL_RULES
from .parallel_rules import PARALLEL_RANGES, PARALLEL_RULES
from .preference_rules import PREFERENCE_RANGES, PREFERENCE_RULES
from .problem import Problem
from .reward_rules import REWARD_RANGES, REWARD_RULES
from .rule import Facts, Range, Rule, needs


def check_rules(facts: Facts, *, launch: bool) -> list[Problem | str]:
    """Every broken rule. `launch` adds what only a run needs: a checkpoint, prompts, a length, files that exist."""
    rules = RULES + LAUNCH_RULES if launch else RULES
    return [problem for rule in rules for problem in rule(facts)]


# --------------------------------------------------------------------------------------------------------------- ranges


_POSITIVE, _AT_LEAST_ONE, _NOT_NEGATIVE = Range(0, open_low=True), Range(1), Range(0)
_SHARE, _FRACTION = Range(0, 1, open_low=True), Range(0, 1)

RANGES: dict[str, Range] = {
    **dict.fromkeys(
        [
            *("actor_num_nodes", "actor_num_gpus_per_node", "num_gpus_per_node", "rollout_num_gpus_per_engine"),
            *("rollout_num_gpus", "sglang_server_concurrency", "update_weight_buffer_size", "rm_num_workers"),
            *("num_rollout", "num_epoch", "micro_batch_size", "over_sampling_batch_size", "max_tokens_per_gpu"),
            *("rollout_max_prompt_len", "rollout_max_response_len", "rollout_max_context_len", "seq_length"),
            *("max_position_embeddings", "make_vocab_size_divisible_by", "save_interval"),
            *("eval_interval", "n_samples_per_eval_prompt", "eval_max_response_len", "debug_exit_after_rollout"),
            *(
                "num_layers",
                "hidden_size",
                "num_attention_heads",
                "vocab_size",
                "lr_decay_iters",
                "save_retain_interval",
                "ref_update_interval",
            ),
        ],
        _AT_LEAST_ONE,
    ),
    **dict.fromkeys(
        [
            "rm_timeout",
            "sglang_request_timeout",
            "start_timeout",
            "wait_timeout",
            "custom_log_timeout",
            "distributed_timeout_minutes",
            "adam_eps",
        ],
        _POSITIVE,
    ),
    **dict.fromkeys(
        [
            *("rollout_temperature", "eval_temperature"),
            *("lr", "min_lr", "lr_warmup_iters", "weight_decay", "clip_grad", "rm_max_retries", "rollout_seed", "seed"),
            *("max_engine_restarts", "report_samples"),
            "tracker_close_timeout",
        ],
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(["rollout_top_p", "eval_top_p"], _SHARE),
    **dict.fromkeys(["max_failed_sample_fraction", "lr_warmup_fraction"], _FRACTION),
    **dict.fromkeys(["adam_beta1", "adam_beta2"], Range(0, 0.999999999)),
    # Signs of life come once a second, and are looked at a little later: below, a healthy process would be killed.
    "heartbeat_timeout": Range(3),
    **ALGORITHM_RANGES,
    **CRITIC_RANGES,
    **MODEL_RANGES,
    **REWARD_RANGES,
    **PREFERENCE_RANGES,
    **PARALLEL_RANGES,
    **DISTILLATION_RANGES,
}


def ranges(facts: Facts) -> Iterator[Problem]:
    """Each number alone: counts, times, probabilities."""
    values = flatten(facts.config)
    for name, allowed in RANGES.items():
        value = values[name]
        if name in facts.given and value is not None and value not in allowed:
            yield Problem(fields()[name].flag, show(value), f"it must be {allowed}", "choose such a value")


def top_k(facts: Facts) -> Iterator[Problem]:
    for flag, value in (
        ("--rollout-top-k", facts.config.rollout.rollout_top_k),
        ("--eval-top-k", facts.config.eval.eval_top_k if "eval_top_k" in facts.given else None),
    ):
        if value is not None and value != -1 and value < 1:
            yield Problem(flag, value, "it must be a number of tokens, or -1 for off", "give -1 or a number from 1 up")


def log_probs_chunk(facts: Facts) -> Iterator[Problem]:
    value = facts.config.perf.log_probs_chunk_size
    if value != -1 and value < 1:
        yield Problem(
            "--log-probs-chunk-size", value, "it must be a number of tokens, or -1 for all at once", "give 1024"
        )


# ---------------------------------------------------------------------------------- flags that act only beside another


def tracker_flags_need_tracker(facts: Facts) -> Iterator[Problem]:
    tracking = facts.config.tracking
    for on, switch, prefixes in (
        (tracking.use_wandb, "--use-wandb", ("wandb_", "disable_wandb_")),
        (tracking.use_tensorboard, "--use-tensorboard", ("tb_",)),
        (tracking.use_mlflow, "--use-mlflow", ("mlflow_",)),
    ):
        names = tuple(name for name in fields() if name.startswith(prefixes))
        why = f"without {switch} nothing is sent there"
        yield from needs(facts, names, unless=on, why=why, fix=f"add {switch}, or leave it out")


def save_flags_need_save(facts: Facts) -> Iterator[Problem]:
    yield from needs(
        facts,
        ("save_interval", "save_hf", "critic_save", "no_save_optim", "save_retain_interval"),
        unless=facts.config.ckpt.save is not None,
        why="without --save no checkpoint is written",
        fix="add --save DIR, or leave it out",
    )


def token_budget_needs_dynamic(facts: Facts) -> Iterator[Problem]:
    yield from needs(
        facts,
        ("max_tokens_per_gpu",),
        unless=facts.config.perf.use_dynamic_batch_size,
        why="without --use-dynamic-batch-size micro-batches are --micro-batch-size rows",
        fix="add --use-dynamic-batch-size, or leave it out",
    )


def chat_template_kwargs_need_template(facts: Facts) -> Iterator[Problem]:
    yield from needs(
        facts,
        ("apply_chat_template_kwargs",),
        unless=facts.config.rollout.apply_chat_template or job_of(facts.config).rows != "prompts",
        why="without --apply-chat-template no template is rendered",
        fix="add --apply-chat-template, or leave it out",
    )


def tools_need_template(facts: Facts) -> Iterator[Problem]:
    yield from needs(
        facts,
        ("tool_key",),
        unless=facts.config.rollout.apply_chat_template or job_of(facts.config).rows != "prompts",
        why="tool specs enter a prompt through the chat template alone",
        fix="add --apply-chat-template, or leave it out",
    )


def adam_flags_need_adam(facts: Facts) -> Iterator[Problem]:
    yield from needs(
        facts,
        ("adam_beta1", "adam_beta2", "adam_eps"),
        unless=facts.config.optimizer.optimizer == "adam",
        why=f"--optimizer {facts.config.optimizer.optimizer} has no such thing",
        fix="add --optimizer adam, or leave it out",
    )


def eval_flags_need_data(facts: Facts) -> Iterator[Problem]:
    evaluation = facts.config.eval
    names = ("eval_interval", "n_samples_per_eval_prompt", "eval_temperature", "eval_top_p", "eval_top_k")
    yield from needs(
        facts,
        (*names, "eval_max_response_len"),
        unless=evaluation.eval_prompt_data is not None or evaluation.eval_config is not None,
        why="there is nothing to evaluate",
        fix="add --eval-prompt-data NAME PATH or --eval-config FILE.yaml",
    )


def eval_data_needs_interval(facts: Facts) -> Iterator[Problem]:
    yield from needs(
        facts,
        ("eval_prompt_data", "eval_config"),
        unless=facts.config.eval.eval_interval is not None,
        why="without --eval-interval nothing is evaluated",
        fix="add --eval-interval N",
    )


def constant_schedule_has_no_decay(facts: Facts) -> Iterator[Problem]:
    yield from needs(
        facts,
        ("min_lr",),
        unless=facts.config.optimizer.lr_decay_style != "constant",
        why="--lr-decay-style constant does not decay",
        fix="add --lr-decay-style linear or cosine, or leave it out",
    )


def micro_batch_size_needs_static(facts: Facts) -> Iterator[Problem]:
    yield from needs(
        facts,
        ("micro_batch_size",),
        unless=not facts.config.perf.use_dynamic_batch_size,
        why="with --use-dynamic-batch-size micro-batches are filled up to --max-tokens-per-gpu",
        fix="give one of the two",
    )


# ----------------------------------------------------------------------------------------- flags that contradict others


def one_length_of_the_run(facts: Facts) -> Iterator[Problem]:
    if {"num_rollout", "num_epoch"} <= facts.given:
        rollout = facts.config.rollout
        why = f"--num-epoch {rollout.num_epoch} derives it too"
        yield Problem("--num-rollout", rollout.num_rollout, why, "give one of the two")


def over_sampling_covers_batch(facts: Facts) -> Iterator[Problem]:
    asked, batch = facts.config.rollout.over_sampling_batch_size, facts.config.rollout.rollout_batch_size
    if asked is not None and batch is not None and asked < batch:
        why = f"it is less than --rollout-batch-size {batch}, which it has to fill"
        yield Problem("--over-sampling-batch-size", asked, why, f"give at least {batch}, or leave it out")


def group_rewards_differ(facts: Facts) -> Iterator[Problem]:
    if facts.config.rollout.rollout_temperature == 0 and not facts.config.debug.debug_rollout_only:
        why = "greedy samples of one prompt are all the same, so every advantage is 0"
        yield Problem(
            "--rollout-temperature", 0, why, "sample, for instance at 1.0; --eval-temperature 0 evaluates greedily"
        )


def prompt_leaves_room(facts: Facts) -> Iterator[Problem]:
    rollout = facts.config.rollout
    prompt, context = rollout.rollout_max_prompt_len, rollout.rollout_max_context_len
    if prompt is not None and context is not None and prompt >= context:
        why = f"it leaves no room for a response within --rollout-max-context-len {context}"
        yield Problem("--rollout-max-prompt-len", prompt, why, f"give less than {context}, or raise the context")


def response_fits_context(facts: Facts) -> Iterator[Problem]:
    rollout = facts.config.rollout
    response, context = rollout.rollout_max_response_len, rollout.rollout_max_context_len
    if response is not None and context is not None and response > context:
        why = f"no response can be longer than --rollout-max-context-len {context}"
        yield Problem("--rollout-max-response-len", response, why, f"give at most {context}, or raise the context")


def lengths_fit_context(facts: Facts) -> Iterator[Problem]:
    rollout = facts.config.rollout
    names = {"rollout_max_prompt_len", "rollout_max_response_len"}
    prompt, response = rollout.rollout_max_prompt_len, rollout.rollout_max_response_len
    context = rollout.rollout_max_context_len
    if not names <= facts.given or None in (prompt, response, context):
        return
    assert prompt is not None
    assert response is not None
    assert context is not None
    if prompt < context and response <= context < prompt + response:
        why = f"with --rollout-max-prompt-len {prompt} that is {prompt + response} of {context} tokens of context"
        fix = "lower one of the two, or raise --rollout-max-context-len"
        yield Problem("--rollout-max-response-len", response, why, fix)


def context_fits_model(facts: Facts) -> Iterator[Problem]:
    context, model = facts.config.rollout.rollout_max_context_len, facts.config.model.max_position_embeddings
    if context is not None and model is not None and context > model:
        why = f"the model knows {model} positions (--max-position-embeddings)"
        yield Problem("--rollout-max-context-len", context, why, f"give at most {model}")


def context_fits_engine(facts: Facts) -> Iterator[Problem]:
    context = facts.config.rollout.rollout_max_context_len
    engine = facts.config.sglang.sglang_args.get("context_length")
    if isinstance(engine, int) and context is not None and context > engine:
        why = f"the engines' limit is --sglang-context-length {engine}"
        yield Problem("--rollout-max-context-len", context, why, "lower it, or raise the engines' limit")


def context_fits_trainer(facts: Facts) -> Iterator[Problem]:
    context, longest = facts.config.rollout.rollout_max_context_len, facts.config.model.seq_length
    if context is not None and longest is not None and longest < context:
        why = f"rows may have --rollout-max-context-len {context} tokens"
        yield Problem("--seq-length", longest, why, f"give at least {context}, or leave it out")


def dynamic_needs_token_budget(facts: Facts) -> Iterator[Problem]:
    perf = facts.config.perf
    if perf.use_dynamic_batch_size and perf.max_tokens_per_gpu is None:
        why = "micro-batches have no token budget"
        yield Problem("--use-dynamic-batch-size", None, why, "add --max-tokens-per-gpu N")


def one_warm_up(facts: Facts) -> Iterator[Problem]:
    optimizer = facts.config.optimizer
    if optimizer.lr_warmup_iters and optimizer.lr_warmup_fraction is not None:
        why = f"--lr-warmup-fraction {show(optimizer.lr_warmup_fraction)} says it too"
        yield Problem("--lr-warmup-iters", optimizer.lr_warmup_iters, why, "give one of the two")


def warm_up_ends_before_decay(facts: Facts) -> Iterator[Problem]:
    optimizer = facts.config.optimizer
    warmup, decay = optimizer.lr_warmup_iters, optimizer.lr_decay_iters
    if decay is not None and warmup >= decay and warmup > 0:
        why = f"the schedule ends at --lr-decay-iters {decay}, before the warm-up does"
        yield Problem("--lr-warmup-iters", warmup, why, f"give less than {decay}")


def warm_up_is_a_part(facts: Facts) -> Iterator[Problem]:
    fraction = facts.config.optimizer.lr_warmup_fraction
    if fraction == 1:
        why = "the warm-up would take the whole schedule, so the rate would never reach --lr"
        yield Problem("--lr-warmup-fraction", show(fraction), why, "give less than 1")


def decay_goes_down(facts: Facts) -> Iterator[Problem]:
    optimizer = facts.config.optimizer
    if optimizer.min_lr > optimizer.lr:
        why = f"it is above --lr {show(optimizer.lr)}, so the rate would rise"
        yield Problem("--min-lr", show(optimizer.min_lr), why, "give a rate at or below --lr")


def eval_pairs(facts: Facts) -> Iterator[Problem]:
    given = facts.config.eval.eval_prompt_data
    if given is None:
        return
    if len(given) % 2:
        yield Problem("--eval-prompt-data", " ".join(given), "it takes pairs", "write NAME PATH for each dataset")
    elif facts.config.eval.eval_config is not None:
        why = f"--eval-config {facts.config.eval.eval_config} names the datasets"
        yield Problem("--eval-prompt-data", " ".join(given), why, "give one of the two")


def eval_datasets_read(facts: Facts) -> Iterator[str]:
    """Whatever is wrong inside --eval-config and the pairs of --eval-prompt-data."""
    given = facts.config.eval.eval_prompt_data
    if given is not None and (len(given) % 2 or facts.config.eval.eval_config is not None):
        return
    try:
        eval_datasets(facts.config)
    except ConfigError as error:
        yield from str(error).splitlines()


def _eval_can_be_read(facts: Facts) -> bool:
    return next(eval_pairs(facts), None) is None and next(eval_datasets_read(facts), None) is None


def eval_responses_fit_context(facts: Facts) -> Iterator[Problem]:
    if not _eval_can_be_read(facts):
        return
    for dataset in eval_datasets(facts.config):
        response, context = dataset.max_response_len, dataset.max_context_len
        if response is not None and context is not None and response > context:
            why = f"no response of {dataset.name} can be longer than its context of {context}"
            fix = f"give at most {context}, or raise --rollout-max-context-len or the dataset's max_context_len"
            yield Problem("--eval-max-response-len", response, why, fix)


def eval_contexts_fit(facts: Facts) -> Iterator[Problem]:
    if not _eval_can_be_read(facts):
        return
    model, engine = facts.config.model.max_position_embeddings, facts.config.sglang.sglang_args.get("context_length")
    limits = [("the model knows {} positions", model), ("the engines' limit is --sglang-context-length {}", engine)]
    for dataset in eval_datasets(facts.config):
        for why, limit in limits:
            if dataset.max_context_len is not None and isinstance(limit, int) and dataset.max_context_len > limit:
                what = f"max_context_len of evaluation {dataset.name}"
                yield Problem(what, dataset.max_context_len, why.format(limit), f"give at most {limit}")


def nodes_hold_their_ranks(facts: Facts) -> Iterator[Problem]:
    cluster, sglang = facts.config.cluster, facts.config.sglang
    limit = cluster.num_gpus_per_node
    if limit is None:
        return
    why = f"a node has --num-gpus-per-node {limit}"
    if cluster.actor_num_gpus_per_node is not None and cluster.actor_num_gpus_per_node > limit:
        yield Problem("--actor-num-gpus-per-node", cluster.actor_num_gpus_per_node, why, f"give at most {limit}")
    if sglang.rollout_num_gpus_per_engine > limit:
        fix = f"give at most {limit}: an engine lives on one node"
        yield Problem("--rollout-num-gpus-per-engine", sglang.rollout_num_gpus_per_engine, why, fix)


def engines_divide_gpus(facts: Facts) -> Iterator[Problem]:
    sglang = facts.config.sglang
    total, each = sglang.rollout_num_gpus, sglang.rollout_num_gpus_per_engine
    if total is not None and each >= 1 and total % each:
        why = f"engines of --rollout-num-gpus-per-engine {each} do not fill it"
        yield Problem("--rollout-num-gpus", total, why, f"give a multiple of {each}")


def colocated_gpus_are_the_trainers(facts: Facts) -> Iterator[Problem]:
    cluster, total = facts.config.cluster, facts.config.sglang.rollout_num_gpus
    actors = cluster.actor_num_nodes * (cluster.actor_num_gpus_per_node or 0)
    if cluster.colocate and total != actors:
        why = f"with --colocate the engines share the trainer's {actors}"
        yield Problem("--rollout-num-gpus", total, why, "leave it out, or leave --colocate out")


def nccl_needs_gpu(facts: Facts) -> Iterator[Problem]:
    if facts.config.cluster.distributed_backend == "nccl" and not facts.platform.has_gpu:
        yield Problem("--distributed-backend", "nccl", "this machine has no GPU", "use gloo, or leave it out")


def deterministic_sglang_needs_backend(facts: Facts) -> Iterator[Problem]:
    config = facts.config
    if not config.cluster.deterministic_mode or config.cluster.rollout_engine != "sglang":
        return
    if config.sglang.sglang_args.get("attention_backend") not in DETERMINISTIC_BACKENDS:
        backends = ", ".join(DETERMINISTIC_BACKENDS)
        why = f"SGLang samples by seed only with one of its deterministic attention backends ({backends})"
        fix = f"add --sglang-attention-backend {DETERMINISTIC_BACKENDS[0]}, or use --rollout-engine embedded"
        yield Problem("--deterministic-mode", "--rollout-engine sglang", why, fix)


def debug_halves_exclude_each_other(facts: Facts) -> Iterator[Problem]:
    debug = facts.config.debug
    if debug.debug_rollout_only and debug.debug_train_only:
        other = "--debug-train-only" if "debug_train_only" in facts.given else "--load-debug-rollout-data"
        yield Problem("--debug-rollout-only", None, f"{other} leaves out the other half", "give one of the two")


def train_only_needs_data(facts: Facts) -> Iterator[Problem]:
    debug = facts.config.debug
    if debug.debug_train_only and debug.load_debug_rollout_data is None:
        yield Problem(
            "--debug-train-only", None, "there are no samples to train on", "add --load-debug-rollout-data FILE"
        )


def equality_check_needs_both_halves(facts: Facts) -> Iterator[Problem]:
    debug = facts.config.debug
    if debug.check_weight_update_equal and (debug.debug_rollout_only or debug.debug_train_only):
        why = "half a run has no weight update"
        yield Problem("--check-weight-update-equal", None, why, "leave it out")


def templates_name_the_rollout(facts: Facts) -> Iterator[Problem]:
    values = flatten(facts.config)
    several = facts.config.rollout.num_rollout != 1
    for name in ("save_hf", "save_debug_rollout_data", "load_debug_rollout_data"):
        template = values[name]
        if template is None:
            continue
        flag = fields()[name].flag
        try:
            names = {part for _, part, _, _ in string.Formatter().parse(template) if part is not None}
        except ValueError as error:
            yield Problem(flag, template, f"it is no template ({error})", "write {rollout_id} where the number belongs")
            continue
        if names - {"rollout_id"}:
            unknown = ", ".join(sorted(f"{{{n}}}" for n in names - {"rollout_id"}))
            yield Problem(flag, template, f"it has the unknown field {unknown}", "the only field is {rollout_id}")
        elif not names and several and name != "load_debug_rollout_data":
            yield Problem(flag, template, "every rollout would overwrite the same path", "put {rollout_id} into it")


def spec_is_module_and_function(facts: Facts) -> Iterator[Problem]:
    spec = facts.config.model.spec
    if spec is not None and len(spec) != 2:
        yield Problem("--spec", " ".join(spec), "it takes two words", "write --spec package.module function")


def stop_ids_are_tokens(facts: Facts) -> Iterator[Problem]:
    vocabulary = facts.config.model.vocab_size
    bad = [i for i in facts.config.rollout.rollout_stop_token_ids or () if i < 0 or (vocabulary and i >= vocabulary)]
    if bad:
        why = f"the vocabulary has {vocabulary} tokens" if vocabulary else "a token id is not negative"
        yield Problem("--rollout-stop-token-ids", " ".join(map(str, bad)), why, "give ids of the tokenizer")


def stop_strings_say_something(facts: Facts) -> Iterator[Problem]:
    if "" in (facts.config.rollout.rollout_stop or ()):
        yield Problem("--rollout-stop", "''", "every answer holds the empty text", "give the text to stop at")


def engine_flags(facts: Facts) -> Iterator[Problem]:
    yield from check_engine_args(facts.config)


# ----------------------------------------------------------------------------------------------------- what a run needs


def _required(flag: str, fix: str, why: str) -> Problem:
    return Problem(flag, "nothing", why, fix)


def run_needs_checkpoint(facts: Facts) -> Iterator[Problem]:
    if facts.config.ckpt.hf_checkpoint is None:
        yield _required("--hf-checkpoint", "add --hf-checkpoint DIR", "there is no model to train")


def run_needs_prompts(facts: Facts) -> Iterator[Problem]:
    if facts.config.rollout.prompt_data is None and not facts.config.debug.debug_train_only:
        yield _required("--prompt-data", "add --prompt-data FILE.jsonl", "there are no prompts to generate from")


def run_needs_batch(facts: Facts) -> Iterator[Problem]:
    sizes = {"rollout_batch_size", "n_samples_per_prompt", "global_batch_size", "num_steps_per_rollout"}
    if facts.config.rollout.rollout_batch_size is None and not sizes & facts.given:
        yield _required("--rollout-batch-size", "add --rollout-batch-size N", "a rollout has no size")


def run_needs_length(facts: Facts) -> Iterator[Problem]:
    if facts.config.rollout.num_rollout is None and facts.config.rollout.num_epoch is None:
        yield _required("--num-rollout", "add --num-rollout N or --num-epoch N", "the run has no end")


def epochs_need_prompts(facts: Facts) -> Iterator[Problem]:
    if facts.config.rollout.num_rollout is None and facts.config.debug.debug_train_only:
        why = "a run on saved samples reads no prompts to count"
        yield Problem("--num-epoch", facts.config.rollout.num_epoch, why, "add --num-rollout N")


def files_exist(facts: Facts) -> Iterator[Problem]:
    config = facts.config
    wanted: list[tuple[str, str | None]] = [
        ("--ref-load", config.ckpt.ref_load),
        ("--teacher-load", config.ckpt.teacher_load),
    ]
    if not config.debug.debug_train_only:
        wanted.append(("--prompt-data", config.rollout.prompt_data))
    if _eval_can_be_read(facts):
        flag = "--eval-config" if config.eval.eval_config is not None else "--eval-prompt-data"
        wanted += [(flag, dataset.path) for dataset in eval_datasets(config)]
    if config.ckpt.critic_load != config.ckpt.critic_save:  # one that is both is there from the first save on
        wanted.append(("--critic-load", config.ckpt.critic_load))
    for flag, path in wanted:
        if path is not None and not Path(path.partition("@[")[0]).exists():
            yield Problem(flag, path, "there is no such file or directory", "check the path")


def outputs_can_be_written(facts: Facts) -> Iterator[Problem]:
    """The first checkpoint may be hours away."""
    config = facts.config
    for flag, path in (
        ("--run-dir", config.cluster.run_dir),
        ("--save", config.ckpt.save),
        ("--save-hf", config.ckpt.save_hf),
        ("--critic-save", config.ckpt.critic_save),
        ("--wandb-dir", config.tracking.wandb_dir),
        ("--tb-project-name", config.tracking.tb_project_name),
        ("--save-debug-rollout-data", config.debug.save_debug_rollout_data),
    ):
        if path is None:
            continue
        # Templates name files of each rollout: what stands before the field is all that can be there already.
        place = Path(path.partition("{")[0]) if "{" in path else Path(path)
        is_file = flag == "--save-debug-rollout-data"
        there = next((p for p in ((place.parent if is_file else place), *place.absolute().parents) if p.exists()), None)
        if there is not None and not there.is_dir():
            yield Problem(flag, path, f"{there} is a file", "name a directory")
        elif there is not None and not os.access(there, os.W_OK | os.X_OK):
            yield Problem(flag, path, f"{there} cannot be written to", "name a directory of yours")


RULES: tuple[Rule, ...] = (
    ranges,
    top_k,
    log_probs_chunk,
    tracker_flags_need_tracker,
    save_flags_need_save,
    token_budget_needs_dynamic,
    chat_template_kwargs_need_template,
    tools_need_template,
    adam_flags_need_adam,
    eval_flags_need_data,
    eval_data_needs_interval,
    constant_schedule_has_no_decay,
    micro_batch_size_needs_static,
    one_length_of_the_run,
    over_sampling_covers_batch,
    group_rewards_differ,
    prompt_leaves_room,
    response_fits_context,
    lengths_fit_context,
    context_fits_model,
    context_fits_engine,
    context_fits_trainer,
    dynamic_needs_token_budget,
    one_warm_up,
    warm_up_ends_before_decay,
    warm_up_is_a_part,
    decay_goes_down,
    eval_pairs,
    eval_datasets_read,
    eval_responses_fit_context,
    eval_contexts_fit,
    nodes_hold_their_ranks,
    engines_divide_gpus,
    colocated_gpus_are_the_trainers,
    nccl_needs_gpu,
    deterministic_sglang_needs_backend,
    debug_halves_exclude_each_other,
    train_only_needs_data,
    equality_check_needs_both_halves,
    templates_name_the_rollout,
    spec_is_module_and_function,
    stop_ids_are_tokens,
    stop_strings_say_something,
    engine_flags,
    *MODEL_RULES,
    *ALGORITHM_RULES,
    *CRITIC_RULES,
    *ASYNC_RULES,
    *REWARD_RULES,
    *JOB_RULES,
    *DISTILLATION_RULES,
    *PREFERENCE_RULES,
    *PARALLEL_RULES,
)

LAUNCH_RULES: tuple[Rule, ...] = (
    run_needs_checkpoint,
    run_needs_prompts,
    run_needs_batch,
    run_needs_length,
    epochs_need_prompts,
    files_exist,
    outputs_can_be_written,
)


def warnings(config: Config) -> tuple[str, ...]:
    """What is allowed and probably not meant, for launch to print."""
    found: list[str] = []
    rollout = config.rollout
    found.extend(algorithm_warnings(config))
    if rollout.rollout_top_p < 1 or rollout.rollout_top_k > 0:
        found.append("--rollout-top-p / --rollout-top-k: the trainer's log-probs are of the whole distribution")
    return tuple(found)
