"""Each rule: the flags that break it, and the line that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miles.config import make_config
from miles.config.platform import detect_platform
from miles.config.rules import LAUNCH_RULES, RULES, Facts, outputs_can_be_written
from miles.errors import ConfigError

from .refusal import refused

BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"rollout_top_p": 0.0}, "--rollout-top-p, got 0: it must be more than 0 and at most 1; choose such a value"),
    ({"rollout_top_p": 1.5}, "--rollout-top-p, got 1.5: it must be more than 0 and at most 1"),
    (
        {"rollout_stop": ["a", ""]},
        "--rollout-stop, got '': every answer holds the empty text; give the text to stop at",
    ),
    ({"entropy_coef": float("nan")}, "--entropy-coef, got nan: it must be a finite number"),
    ({"lr": float("inf")}, "--lr, got inf: it must be at least 0"),
    ({"rm_timeout": 0.0}, "--rm-timeout, got 0: it must be more than 0"),
    ({"heartbeat_timeout": 2.0}, "--heartbeat-timeout, got 2: it must be at least 3"),
    ({"max_failed_sample_fraction": 1.1}, "--max-failed-sample-fraction, got 1.1: it must be at least 0 and at most 1"),
    ({"micro_batch_size": 0}, "--micro-batch-size, got 0: it must be at least 1"),
    ({"rollout_temperature": -1.0}, "--rollout-temperature, got -1: it must be at least 0"),
    ({"adam_beta2": 1.0}, "--adam-beta2, got 1: it must be at least 0 and at most 1"),
    ({"rollout_top_k": 0}, "--rollout-top-k, got 0: it must be a number of tokens, or -1 for off"),
    (
        {"log_probs_chunk_size": 0},
        "--log-probs-chunk-size, got 0: it must be a number of tokens, or -1 for all at once",
    ),
    (
        {"kl_loss_coef": 0.1},
        "--kl-loss-coef, got 0.1: without --use-kl-loss the loss has no KL term; add --use-kl-loss",
    ),
    (
        {"tis_clip": 3.0},
        "--tis-clip, got 3: without --use-tis or --off-policy-correction no importance weight is bounded; add --use-tis",
    ),
    ({"save_interval": 3}, "--save-interval, got 3: without --save no checkpoint is written; add --save DIR"),
    ({"no_save_optim": True}, "--no-save-optim, got true: without --save no checkpoint is written"),
    (
        {"loss_constant_length": 8},
        "--loss-constant-length, got 8: --loss-aggregation is seq_mean, which has no constant divisor",
    ),
    ({"max_tokens_per_gpu": 8}, "--max-tokens-per-gpu, got 8: without --use-dynamic-batch-size micro-batches are"),
    (
        {"use_dynamic_batch_size": True},
        "--use-dynamic-batch-size: micro-batches have no token budget; add --max-tokens",
    ),
    (
        {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 9, "micro_batch_size": 4},
        "--micro-batch-size, got 4: with --use-dynamic-batch-size micro-batches are filled up to --max-tokens-per-gpu",
    ),
    (
        {"apply_chat_template_kwargs": {"a": 1}},
        '--apply-chat-template-kwargs, got {"a": 1}: without --apply-chat-template no template is rendered',
    ),
    (
        {"disable_grpo_std_normalization": True, "disable_rewards_normalization": True},
        "--disable-grpo-std-normalization, got true: --disable-rewards-normalization leaves the rewards as they are",
    ),
    ({"eval_interval": 5}, "--eval-interval, got 5: there is nothing to evaluate; add --eval-prompt-data NAME PATH"),
    ({"eval_prompt_data": ["a", "p"]}, "--eval-prompt-data, got a "),
    (
        {"eval_prompt_data": ["a", "p", "b"], "eval_interval": 1},
        "--eval-prompt-data, got a ",
    ),
    ({"min_lr": 1e-7}, "--min-lr, got 1e-07: --lr-decay-style constant does not decay; add --lr-decay-style linear"),
    ({"num_rollout": 3, "num_epoch": 1}, "--num-rollout, got 3: --num-epoch 1 derives it too; give one of the two"),
    (
        {"rollout_batch_size": 8, "over_sampling_batch_size": 4},
        "--over-sampling-batch-size, got 4: it is less than --rollout-batch-size 8, which it has to fill",
    ),
    ({"rollout_temperature": 0.0}, "--rollout-temperature, got 0: greedy samples of one prompt are all the same"),
    (
        {"rollout_max_prompt_len": 10, "rollout_max_context_len": 10},
        "--rollout-max-prompt-len, got 10: it leaves no room for a response within --rollout-max-context-len 10",
    ),
    (
        {"rollout_max_response_len": 11, "rollout_max_context_len": 10},
        "--rollout-max-response-len, got 11: no response can be longer than --rollout-max-context-len 10",
    ),
    (
        {"rollout_max_prompt_len": 6, "rollout_max_response_len": 5, "rollout_max_context_len": 10},
        "--rollout-max-response-len, got 5: with --rollout-max-prompt-len 6 that is 11 of 10 tokens of context",
    ),
    (
        {"rollout_max_context_len": 100, "max_position_embeddings": 64},
        "--rollout-max-context-len, got 100: the model knows 64 positions (--max-position-embeddings); give at most 64",
    ),
    (
        {"rollout_max_context_len": 100, "sglang_args": {"context_length": 50}},
        "--rollout-max-context-len, got 100: the engines' limit is --sglang-context-length 50",
    ),
    (
        {"rollout_max_context_len": 100, "seq_length": 50},
        "--seq-length, got 50: rows may have --rollout-max-context-len 100",
    ),
    (
        {"calculate_per_token_loss": True, "loss_aggregation": "seq_mean"},
        "--loss-aggregation, got seq_mean: --calculate-per-token-loss is short for token_mean; give one of the two",
    ),
    (
        {"use_tis": True, "use_rollout_logprobs": True},
        "--use-tis: --use-rollout-logprobs takes the engine's log-probs as the old policy's, so every weight would be 1",
    ),
    ({"use_tis": True, "tis_clip_low": 3.0}, "--tis-clip-low, got 3: it is above --tis-clip 2"),
    (
        {"lr_warmup_iters": 3, "lr_warmup_fraction": 0.1},
        "--lr-warmup-iters, got 3: --lr-warmup-fraction 0.1 says it too; give one of the two",
    ),
    (
        {"lr_warmup_iters": 10, "lr_decay_iters": 10},
        "--lr-warmup-iters, got 10: the schedule ends at --lr-decay-iters 10, before the warm-up does; give less than 10",
    ),
    ({"min_lr": 1.0, "lr_decay_style": "linear"}, "--min-lr, got 1: it is above --lr 1e-06, so the rate would rise"),
    (
        {
            "eval_prompt_data": ["a", "p"],
            "eval_interval": 1,
            "eval_max_response_len": 9,
            "rollout_max_context_len": 8,
        },
        "--eval-max-response-len, got 9: no response of a can be longer than its context of 8; give at most 8",
    ),
    (
        {"rollout_num_gpus": 3, "rollout_num_gpus_per_engine": 2},
        "--rollout-num-gpus, got 3: engines of --rollout-num-gpus-per-engine 2 do not fill it; give a multiple of 2",
    ),
    (
        {"colocate": True, "actor_num_gpus_per_node": 2, "rollout_num_gpus": 1},
        "--rollout-num-gpus, got 1: with --colocate the engines share the trainer's 2; leave it out",
    ),
    ({"distributed_backend": "nccl"}, "--distributed-backend, got nccl: this machine has no GPU; use gloo"),
    (
        {"deterministic_mode": True, "rollout_engine": "sglang"},
        "--deterministic-mode, got --rollout-engine sglang: SGLang samples by seed only with one of its deterministic",
    ),
    (
        {"debug_rollout_only": True, "debug_train_only": True, "load_debug_rollout_data": "x"},
        "--debug-rollout-only: --debug-train-only leaves out the other half; give one of the two",
    ),
    (
        {"debug_rollout_only": True, "load_debug_rollout_data": "x"},
        "--debug-rollout-only: --load-debug-rollout-data leaves",
    ),
    ({"debug_train_only": True}, "--debug-train-only: there are no samples to train on; add --load-debug-rollout-data"),
    (
        {"check_weight_update_equal": True, "debug_rollout_only": True},
        "--check-weight-update-equal: half a run has no weight update; leave it out",
    ),
    (
        {"save": "s", "save_hf": "/out"},
        "--save-hf, got /out: every rollout would overwrite the same path; put {rollout_id} into it",
    ),
    (
        {"save_debug_rollout_data": "/out/{step}"},
        "--save-debug-rollout-data, got /out/{step}: it has the unknown field {step}; the only field is {rollout_id}",
    ),
    ({"save_debug_rollout_data": "/out/{"}, "--save-debug-rollout-data, got /out/{: it is no template"),
    (
        {"spec": ["package.module"]},
        "--spec, got package.module: it takes two words; write --spec package.module function",
    ),
    ({"rollout_stop_token_ids": [3, -1]}, "--rollout-stop-token-ids, got -1: a token id is not negative"),
    (
        {"rollout_stop_token_ids": [30], "vocab_size": 24},
        "--rollout-stop-token-ids, got 30: the vocabulary has 24 tokens",
    ),
    ({"tool_key": "functions"}, "--tool-key, got functions: tool specs enter a prompt through the chat template alone"),
    ({"optimizer": "sgd", "adam_beta2": 0.9}, "--adam-beta2, got 0.9: --optimizer sgd has no such thing; add"),
    ({"lr_warmup_fraction": 1.0}, "--lr-warmup-fraction, got 1: the warm-up would take the whole schedule"),
    (
        {"num_gpus_per_node": 2, "actor_num_gpus_per_node": 4},
        "--actor-num-gpus-per-node, got 4: a node has --num-gpus-per-node 2; give at most 2",
    ),
    (
        {"num_gpus_per_node": 1, "rollout_num_gpus_per_engine": 2},
        "--rollout-num-gpus-per-engine, got 2: a node has --num-gpus-per-node 1; give at most 1",
    ),
    ({"sglang_args": {"quantization": "fp8"}}, "--sglang-quantization, got fp8: it would change samples"),
]


@pytest.mark.parametrize(("flags", "line"), BROKEN, ids=[line.split(",")[0].split(":")[0] for _, line in BROKEN])
def test_a_broken_rule_says_which_flag_and_why(flags: dict[str, Any], line: str) -> None:
    refused(flags, line)


ALLOWED: list[dict[str, Any]] = [
    {"use_kl_loss": True, "kl_loss_coef": 0.0, "kl_loss_type": "low_var_kl"},
    {"kl_loss_coef": 0.0},  # asks for nothing, as launch scripts write it
    {"use_tis": True, "tis_clip": 3.0, "tis_clip_low": 0.5},
    {"save": "s", "save_interval": 2, "save_hf": "/out/{rollout_id}", "no_save_optim": True},
    {"save": "s", "save_hf": "/out", "num_rollout": 1},
    {"loss_aggregation": "constant", "loss_constant_length": 8},
    {"calculate_per_token_loss": True, "loss_aggregation": "token_mean"},
    {"min_lr": 1e-7, "lr_decay_style": "cosine", "lr_warmup_fraction": 0.1},
    {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 512},
    {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 512, "micro_batch_size": 1},
    {"rollout_temperature": 0.0, "debug_rollout_only": True},
    {"eval_interval": 5, "eval_prompt_data": ["a", "p"], "eval_temperature": 0.0},
    {"colocate": True, "actor_num_gpus_per_node": 2, "rollout_num_gpus": 2},
    {"rollout_max_prompt_len": 6, "rollout_max_response_len": 4, "rollout_max_context_len": 10},
    {"deterministic_mode": True},
    {"deterministic_mode": True, "rollout_engine": "sglang", "sglang_args": {"attention_backend": "fa3"}},
    {"debug_train_only": True, "load_debug_rollout_data": "x"},
    {"global_batch_size": 5, "rollout_batch_size": 5, "actor_num_gpus_per_node": 2},  # ranks need not divide it
]


@pytest.mark.parametrize("flags", ALLOWED, ids=lambda flags: " ".join(flags))
def test_what_the_rules_allow(flags: dict[str, Any]) -> None:
    make_config(**flags)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(kl_loss_coef=0.1, use_tis=True, use_rollout_logprobs=True, rollout_top_k=0)
    assert len(str(caught.value).splitlines()) == 3


def test_eval_pairs_and_file_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("datasets: [{name: a, path: p}]")
    with pytest.raises(ConfigError, match=r"--eval-config .*e.yaml names the datasets; give one of the two"):
        make_config(eval_prompt_data=["a", "p"], eval_config=str(tmp_path / "e.yaml"), eval_interval=1)


@pytest.mark.parametrize(
    ("limit", "why"),
    [
        ({"max_position_embeddings": 64}, "the model knows 64 positions; give at most 64"),
        (
            {"rollout_max_context_len": 64, "sglang_args": {"context_length": 64}},
            "the engines' limit is --sglang-context-length 64; give at most 64",
        ),
    ],
)
def test_no_evaluation_has_a_longer_context_than_the_engines(tmp_path: Path, limit: dict[str, Any], why: str) -> None:
    def config(tokens: int) -> None:
        text = f"datasets: [{{name: a, path: p, max_context_len: {tokens}, max_response_len: 8}}]"
        (tmp_path / "e.yaml").write_text(text)
        make_config(eval_config=str(tmp_path / "e.yaml"), eval_interval=1, **limit)

    config(64)
    with pytest.raises(ConfigError) as caught:
        config(65)
    assert str(caught.value) == f"max_context_len of evaluation a, got 65: {why}"


def test_rules_have_names_of_their_own() -> None:
    names = [rule.__name__ for rule in RULES + LAUNCH_RULES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("flag", "below"), [("run_dir", "run"), ("save", "a/b"), ("save_hf", "hf_{rollout_id}"), ("save", "")]
)
def test_outputs_go_where_a_directory_can_be_made(tmp_path: Path, flag: str, below: str) -> None:
    (tmp_path / "file").write_text("")

    def problems(root: Path) -> list[str]:
        path = str(root / below) if below else str(root)
        config = make_config(num_rollout=1, **{"save": str(tmp_path / "s"), flag: path})
        return [str(p) for p in outputs_can_be_written(Facts(config, frozenset(), detect_platform()))]

    assert problems(tmp_path / "new") == []
    (problem,) = problems(tmp_path / "file")
    assert problem.endswith(f"{tmp_path}/file is a file; name a directory")
