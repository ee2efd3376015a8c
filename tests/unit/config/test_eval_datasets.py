"""--eval-config over the --eval-* flags over ROLLOUT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from miles.config import EvalDataset, eval_datasets, make_config
from miles.errors import ConfigError


@pytest.fixture
def eval_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "eval.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_pairs_inherit_from_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config(
        eval_interval=20,
        eval_prompt_data=["a", "a.jsonl@[0:5]", "b", "/b.parquet"],
        n_samples_per_eval_prompt=4,
        eval_temperature=0.6,
        rollout_top_p=0.9,
        rollout_max_response_len=8,
        rollout_stop=["\n"],
        input_key="prompt",
        label_key="answer",
        rm_type="math",
        apply_chat_template=True,
    )
    a, b = eval_datasets(config)
    assert a == EvalDataset(
        name="a",
        path=f"{tmp_path}/a.jsonl@[0:5]",
        n_samples_per_eval_prompt=4,
        temperature=0.6,
        top_p=0.9,
        max_response_len=8,
        input_key="prompt",
        label_key="answer",
        rm_type="math",
        apply_chat_template=True,
        stop=("\n",),
        interval=20,
    )
    assert (b.name, b.path) == ("b", "/b.parquet")


def test_the_main_job_evaluates_one_file_twice(eval_file: Callable[[str], str]) -> None:
    file = eval_file(
        """
        datasets:
          - {name: addition, path: /d/test.jsonl, n_samples_per_eval_prompt: 4}
          - {name: addition_greedy, path: /d/test.jsonl, temperature: 0}
        """
    )
    config = make_config(eval_interval=20, eval_config=file, eval_top_p=0.5)
    sampled, greedy = eval_datasets(config)
    assert (sampled.temperature, sampled.n_samples_per_eval_prompt, sampled.path) == (1.0, 4, "/d/test.jsonl")
    assert (greedy.temperature, greedy.n_samples_per_eval_prompt, greedy.top_p) == (0.0, 1, 0.5)


def test_entry_over_defaults_over_flags(eval_file: Callable[[str], str]) -> None:
    file = eval_file(
        """
        eval:
          defaults: {top_p: 0.7, max_response_len: 100, rm_type: exact}
          datasets:
            - {name: x, path: /x, top_p: 0.8, stop: [END], n_samples_per_prompt: 2, interval: 7}
        """
    )
    config = make_config(eval_interval=20, eval_config=file, eval_top_p=0.1, eval_max_response_len=5, rm_type="math")
    (x,) = eval_datasets(config)
    assert (x.top_p, x.max_response_len, x.rm_type, x.stop) == (0.8, 100, "exact", ("END",))
    assert (x.n_samples_per_eval_prompt, x.interval) == (2, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "it has no list `datasets`"),
        ("datasets: [{path: /x}]", "dataset 0: it has no name; add name: ..."),
        ("datasets: [{name: x}]", "dataset x: it has no path; add path: ..."),
        (
            "datasets: [{name: x, path: /x, temprature: 1}]",
            "key 'temprature': there is no such key; did you mean temperature?",
        ),
        ("datasets: [{name: x, path: /x, top_p: 2}]", "dataset x: top_p, got 2: it must be more than 0 and at most 1"),
        ("datasets: [{name: x, path: /x, top_k: many}]", "dataset x: top_k, got 'many': it is not a whole number"),
        ("datasets: [{name: x, path: /x}, {name: x, path: /y}]", "the name 'x' is there twice"),
        ("datasets: [3]", "it is not a mapping"),
        ("{datasets: [], defalts: {}}", "key 'defalts': there is no such key; did you mean defaults?"),
    ],
)
def test_mistakes_are_found_at_launch(eval_file: Callable[[str], str], text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(eval_interval=1, eval_config=eval_file(text))
    assert message in str(caught.value)


def test_nothing_to_evaluate() -> None:
    assert eval_datasets(make_config()) == ()
