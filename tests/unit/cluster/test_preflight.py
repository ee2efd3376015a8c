"""What preflight reads: the flags of the prompts' columns reach the reader, for training and for evaluation."""

from __future__ import annotations

from typing import Any

import pytest

from miles.cluster.preflight import _load_prompts, _no_prompts
from miles.config import make_config
from miles.data import Prompt, load_tokenizer
from miles.rollout import load_eval_prompts

ROW = (
    '{"q": [{"role": "user", "content": "1+1="}], "a": "2", "about": {"k": 1}, "specs": [{"name": "9"}], '
    '"input": "3+3=", "metadata": {"k": 3}, "tools": [{"name": "3"}]}\n'
)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ("3+3=", None, {"k": 3})),
        ({"apply_chat_template": True}, ("33+3=", None, {"k": 3})),
        (
            {
                "apply_chat_template": True,
                "apply_chat_template_kwargs": {"sign": "-"},
                "input_key": "q",
                "label_key": "a",
                "metadata_key": "about",
                "tool_key": "specs",
            },
            ("9-1+1=", "2", {"k": 1}),
        ),
    ],
)
def test_the_columns_are_those_of_the_flags(model, tmp_path, flags: dict[str, Any], expected):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROW)
    config = make_config(
        hf_checkpoint=str(model),
        prompt_data=str(rows),
        eval_prompt_data=("e", str(rows)),
        eval_interval=1,
        rm_type="random",
        rollout_batch_size=1,
        **flags,
    )
    training = _load_prompts(config)
    assert training is not None
    evaluation = load_eval_prompts(config, load_tokenizer(str(model)))
    for [prompt] in (training.prompts, *(prompts for _, prompts in evaluation)):
        assert isinstance(prompt, Prompt)
        assert (prompt.prompt, prompt.label, prompt.metadata) == expected


def test_longer_prompts_are_left_out(model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "1+1="}\n{"input": "10+10="}\n')
    flags = {"hf_checkpoint": str(model), "prompt_data": str(rows), "rm_type": "random", "rollout_batch_size": 1}
    prompts = _load_prompts(make_config(**flags, rollout_max_prompt_len=5))
    assert prompts is not None
    assert ([prompt.prompt for prompt in prompts.prompts], prompts.skipped) == (["1+1="], 1)


def test_the_length_limit_is_blamed_only_where_it_dropped_something():
    assert _no_prompts("p.jsonl", 3, 8) == (
        "--prompt-data, got p.jsonl: all 3 prompts are longer than 8 tokens; raise --rollout-max-prompt-len"
    )
    empty = _no_prompts("p.jsonl@[5:5]", 0, 8)
    assert empty.startswith("--prompt-data, got p.jsonl@[5:5]: there is no row in it;")
    assert "--rollout-max-prompt-len" not in empty
