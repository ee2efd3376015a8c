"""Bodies of /generate: what is accepted means what it says, what is not is refused by name."""

from __future__ import annotations

import math

import pytest

from miles.engines.embedded.requests import Limits, RequestError, max_new_tokens, parse_generate
from miles.engines.embedded.sampling import derive_seed

LIMITS = Limits(
    vocab_size=100, context_length=64, max_total_tokens=1024, encode=lambda text: [ord(c) % 100 for c in text]
)
BARE = Limits(vocab_size=100, context_length=64, max_total_tokens=32, encode=None)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ([], "body"),
        ({}, "neither"),
        ({"text": "a", "input_ids": [1]}, "both"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[]]}, "input_ids"),
        ({"input_ids": [[1], 2]}, "input_ids"),
        ({"input_ids": [1.5]}, "input_ids"),
        ({"input_ids": [True, 2]}, "input_ids"),
        ({"input_ids": [[1, 2], [True, 2]]}, "input_ids"),
        ({"input_ids": ["1"]}, "input_ids"),
        ({"input_ids": [100]}, "vocabulary has 100"),
        ({"input_ids": [-1]}, "vocabulary has 100"),
        ({"input_ids": [2**70]}, "input_ids"),
        ({"input_ids": [[[1]]]}, "input_ids"),
        ({"text": [1]}, "text"),
        ({"input_ids": [1] * 64}, "context length is 64"),
        ({"input_ids": [1], "strem": True}, "strem"),
        ({"input_ids": [1], "return_logprobs": True}, "did you mean 'return_logprob'"),
        ({"input_ids": [1], "stream": "yes"}, "stream"),
        ({"input_ids": [1], "lora_path": "x"}, "lora_path"),
        ({"input_ids": [1], "image_data": ["x"]}, "image_data"),
        ({"input_ids": [1], "return_logprob": "yes"}, "return_logprob"),
        ({"input_ids": [1], "logprob_start_len": 1}, "logprob_start_len"),
        ({"input_ids": [1], "top_logprobs_num": -1}, "top_logprobs_num"),
        ({"input_ids": [1], "rid": 3}, "rid"),
        ({"input_ids": [[1], [2]], "rid": ["a"]}, "rid"),
        ({"input_ids": [1], "sampling_params": 3}, "sampling_params"),
        ({"input_ids": [1], "sampling_params": [{}]}, "sampling_params"),
        ({"input_ids": [[1], [2]], "sampling_params": [{}]}, "sampling_params"),
        ({"input_ids": [[1], [2]], "sampling_params": [{"n": 1}, {"n": 2}]}, "share one n"),
    ],
)
def test_refused_bodies(body, named):
    with pytest.raises(RequestError) as caught:
        parse_generate(body, LIMITS)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": "hot"}, {"temperature": True},
        {"temperature": math.inf}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}, {"top_k": -2}, {"top_k": 1.5},
        {"min_p": -1}, {"frequency_penalty": 3}, {"presence_penalty": -3}, {"repetition_penalty": 0},
        {"max_new_tokens": -1}, {"max_new_tokens": 1.0}, {"min_new_tokens": 129}, {"n": 0}, {"n": 10**6},
        {"stop": ""}, {"stop": [""]}, {"stop": 3}, {"stop_token_ids": [100]}, {"stop_token_ids": "a"},
        {"stop_regex": "("}, {"ignore_eos": 1}, {"skip_special_tokens": "no"}, {"logit_bias": {"100": 1}},
        {"logit_bias": {"a": 1}}, {"logit_bias": {"1": "x"}}, {"logit_bias": [1]}, {"sampling_seed": -1},
        {"sampling_seed": 1.5}, {"sampling_seed": 2**64}, {"json_schema": "{}"}, {"regex": "a"}, {"ebnf": "x"}, {"custom_params": {"a": 1}},
        {"spaces_between_special_tokens": False}, {"temprature": 1.0},
    ],
)  # fmt: skip
def test_refused_sampling_params_are_named(params):
    with pytest.raises(RequestError) as caught:
        parse_generate({"input_ids": [1, 2], "sampling_params": params}, LIMITS)
    assert next(iter(params)) in str(caught.value)


def test_fields_spelled_out_as_off_are_accepted():
    body = {"input_ids": [1], "stream": False, "lora_path": None, "image_data": None, "return_hidden_states": False}
    assert len(parse_generate(body | {"sampling_params": {"json_schema": None, "top_p": None}}, LIMITS).rows) == 1


def test_without_a_tokenizer_texts_are_refused():
    for body in ({"text": "a"}, {"input_ids": [1], "sampling_params": {"stop": "a"}}):
        with pytest.raises(RequestError, match="no tokenizer"):
            parse_generate(body, BARE)


def test_a_request_that_can_never_fit_is_refused():
    body = {"input_ids": [1] * 10, "sampling_params": {"max_new_tokens": 23}}
    with pytest.raises(RequestError, match="KV cache holds 32"):
        parse_generate(body, BARE)
    body["sampling_params"]["max_new_tokens"] = 22
    assert parse_generate(body, BARE).rows


@pytest.mark.parametrize(("asked", "made"), [(10, 10), (60, 54), (None, 54), (0, 0)])
def test_answers_end_at_the_context_length(asked, made):
    row = parse_generate({"input_ids": [1] * 10, "sampling_params": {"max_new_tokens": asked}}, LIMITS).rows[0]
    assert max_new_tokens(row.input_ids, row.params, LIMITS.context_length) == made


def test_rows_come_prompt_by_prompt_with_seeds_of_their_own():
    job = parse_generate(
        {"input_ids": [[1], [2, 3]], "rid": "r", "sampling_params": {"n": 2, "sampling_seed": 9}}, LIMITS
    )
    assert [row.input_ids.tolist() for row in job.rows] == [[1], [1], [2, 3], [2, 3]]
    assert [row.seed for row in job.rows] == [derive_seed(9, i) for i in range(4)]
    assert [row.rid for row in job.rows] == ["r_0_0", "r_0_1", "r_1_0", "r_1_1"]
    assert job.as_list
    assert job.rid == "r"


def test_a_single_row_keeps_its_seed_and_id():
    row = parse_generate({"input_ids": [1], "rid": "r", "sampling_params": {"sampling_seed": 9}}, LIMITS).rows[0]
    assert (row.seed, row.rid) == (9, "r")


def test_each_prompt_of_a_batch_may_bring_its_own_params():
    job = parse_generate(
        {
            "text": ["a", "b"],
            "sampling_params": [{"sampling_seed": 4, "top_k": 3}, {}],
            "return_logprob": [True, False],
        },
        LIMITS,
    )
    assert [(row.seed, row.params.top_k, row.return_logprob) for row in job.rows] == [(4, 3, True), (None, -1, False)]
