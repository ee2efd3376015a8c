"""Rules of the MODEL flags between themselves; what contradicts a checkpoint is found in `derive`."""

from __future__ import annotations

from collections.abc import Iterator

from .derive import PATTERN_FLAGS
from .fields import fields, flatten
from .layer_pattern import listed
from .problem import Problem
from .rule import Facts, Range, Rule, needs


def patterns_are_of_the_layers(facts: Facts) -> Iterator[Problem]:
    values = flatten(facts.config)
    layers = values["num_layers"]
    for name in sorted(PATTERN_FLAGS):
        text = values[name]
        if text is None:
            continue
        try:
            pattern = listed(text)
        except ValueError as error:
            yield Problem(fields()[name].flag, text, str(error), "write such a list, or a number")
            continue
        if isinstance(pattern, int) and pattern < 1:
            yield Problem(fields()[name].flag, text, "every N-th layer is meant", "give 1 or more")
        if isinstance(pattern, list) and layers is not None and len(pattern) != layers:
            yield Problem(fields()[name].flag, text, f"it lists {len(pattern)} layers", f"list all {layers}")


def window_is_before_a_token(facts: Facts) -> Iterator[Problem]:
    window = facts.config.model.window_size
    if window is not None and (len(window) != 2 or window[0] < 0 or window[1] != 0):
        got, why = " ".join(map(str, window)), "it takes the tokens seen before a token, and 0 after it"
        yield Problem("--window-size", got, why, "write --window-size 4095 0 for a window of 4096")


_OF_EXPERTS = (
    *("moe_router_bias_update_rate", "moe_router_dtype", "moe_router_load_balancing_type", "moe_aux_loss_coeff"),
    *("moe_token_dispatcher_type", "moe_grouped_gemm", "moe_permute_fusion"),
)


def expert_flags_need_experts(facts: Facts) -> Iterator[Problem]:
    model = facts.config.model
    has_experts = model.num_experts is not None or facts.config.ckpt.hf_checkpoint is None
    yield from needs(
        facts,
        _OF_EXPERTS,
        unless=has_experts,
        why="the model has no experts",
        fix="leave it out, or train one that has",
    )
    yield from needs(
        facts,
        ("moe_router_bias_update_rate",),
        unless=bool(model.moe_router_enable_expert_bias) or model.num_experts is None,
        why="the model's router has no bias",
        fix="leave it out",
    )


def balancing_is_of_packed_sequences(facts: Facts) -> Iterator[Problem]:
    model = facts.config.model
    if model.moe_aux_loss_coeff and model.moe_router_load_balancing_type != "aux_loss":
        why = "sequences are packed, and the loss is not computed one by one"
        if model.moe_router_load_balancing_type == "none":
            why = "no loss is balanced by it: --moe-router-load-balancing-type is none"
        yield Problem(
            "--moe-aux-loss-coeff", model.moe_aux_loss_coeff, why, "add --moe-router-load-balancing-type aux_loss"
        )


def ranks_share_what_can_be_shared(facts: Facts) -> Iterator[Problem]:
    model, perf = facts.config.model, facts.config.perf
    if model.linear_attention_freq is not None and perf.context_parallel_size > 1:
        why = "the state of linear attention goes through the whole sequence"
        yield Problem("--context-parallel-size", perf.context_parallel_size, why, "leave it at 1")
    heads, ranks = model.linear_num_key_heads, perf.tensor_model_parallel_size
    if heads is not None and ranks > 0 and heads % ranks:
        why = f"the model has {heads} key heads of linear attention, and {heads} / {ranks} is no whole number"
        yield Problem("--tensor-model-parallel-size", ranks, why, f"give a divisor of {heads}")
    if model.num_experts is not None and model.disable_bias_linear is False and perf.expert_tensor_parallel_size > 1:
        why = "each rank of an expert would add its bias"
        yield Problem("--expert-tensor-parallel-size", perf.expert_tensor_parallel_size, why, "leave it at 1")


MODEL_RULES: tuple[Rule, ...] = (
    ranks_share_what_can_be_shared,
    patterns_are_of_the_layers,
    window_is_before_a_token,
    expert_flags_need_experts,
    balancing_is_of_packed_sequences,
)
MODEL_RANGES: dict[str, Range] = {
    "moe_aux_loss_coeff": Range(0),
    "moe_router_bias_update_rate": Range(0),
}
