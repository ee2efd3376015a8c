"""argv -> values: every form in which a flag can be typed, and one clear line for each that cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from miles.config import Resolution, resolve
from miles.config.command_line import parse
from miles.errors import ConfigError

Launch = Callable[..., Resolution]


def message(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert caught.value.args[0] == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--lr", "1e-6"], "lr", 1e-6),
        (["--lr=0.5"], "lr", 0.5),
        (["--rollout_batch_size", "4"], "rollout_batch_size", 4),
        (["--rollout-top-k", "-1"], "rollout_top_k", -1),
        (["--colocate"], "colocate", True),
        (["--no-colocate"], "colocate", False),
        (["--no_accumulate_allreduce_grads_in_fp32"], "accumulate_allreduce_grads_in_fp32", False),
        (["--no-save-optim"], "no_save_optim", True),
        (["--no-no-save-optim"], "no_save_optim", False),
        (["--rollout-stop", "a", "b"], "rollout_stop", ("a", "b")),
        (["--rollout-stop", "-x", "--", "\n"], "rollout_stop", ("-x", "--", "\n")),
        (["--rollout-stop=--end"], "rollout_stop", ("--end",)),
        (["--rollout-stop", "3"], "rollout_stop", ("3",)),
        (["--rollout-stop-token-ids", "1", "2"], "rollout_stop_token_ids", (1, 2)),
        (["--eval-prompt-data", "a", "a.jsonl", "b", "b.jsonl"], "eval_prompt_data", ("a", "a.jsonl", "b", "b.jsonl")),
        (["--plugin", "one", "--plugin", "two.py"], "plugin", ("one", "two.py")),
        (["--normalization", "LayerNorm"], "normalization", "LayerNorm"),
        (
            ["--apply-chat-template-kwargs", '{"enable_thinking": false, "n": 1}'],
            "apply_chat_template_kwargs",
            {"enable_thinking": False, "n": 1},
        ),
        (["--rm-type", "a b=c --d"], "rm_type", "a b=c --d"),
        (["--num-rollout", "60", "--num-rollout", "3"], "num_rollout", 3),
    ],
)
def test_every_form_of_a_flag(words: list[str], name: str, value: object) -> None:
    assert parse(words).values == {name: value}


def test_third_state_of_a_switch() -> None:
    assert "swiglu" not in parse([]).values
    assert parse(["--swiglu"]).values["swiglu"] is True
    assert parse(["--no-swiglu"]).values["swiglu"] is False
    assert parse(["--swiglu", "--no-swiglu"]).values["swiglu"] is False, "the last counts"


def test_unset_takes_back_what_came_before_it(tmp_path: Path) -> None:
    """As in a recipe whose `--eps-clip-high` another loss does not read."""
    assert parse(["--eps-clip-high", "0.28", "--eps-clip-high", "unset"]).values == {}
    assert parse(["--eps-clip-high", "unset", "--eps-clip-high", "0.3"]).values == {"eps_clip_high": 0.3}
    assert parse(["--swiglu", "--swiglu", "unset"]).values == {}
    file = tmp_path / "run.yaml"
    file.write_text("grpo:\n  eps_clip_high: 0.28\n  policy_loss: cispo\n")
    given = ["--hf-checkpoint", "none", "--config", str(file), "--policy-loss", "sapo"]
    with pytest.raises(ConfigError, match=r"--eps-clip-high, got 0\.28: --policy-loss sapo does not clip"):
        resolve(given)
    with pytest.raises(ConfigError) as found:
        resolve([*given, "--eps-clip-high", "unset"])
    assert "--eps-clip-high" not in str(found.value)


def test_engine_flags_are_set_aside() -> None:
    words = "--sglang-mem-fraction-static 0.7 --sglang-enable-metrics --sglang-cuda-graph-bs 1 2 --sglang-dtype=float32"
    line = parse([*words.split(), "--sglang-server-concurrency", "8"])
    assert line.engine == {
        "mem_fraction_static": 0.7,
        "enable_metrics": True,
        "cuda_graph_bs": [1, 2],
        "dtype": "float32",
    }
    assert line.values == {"sglang_server_concurrency": 8}


def test_actions(launch: Launch) -> None:
    assert launch().action == "run"
    assert launch("--print-config").action == "print-config"
    assert launch("--dry-run").action == "dry-run"


def test_unknown_flag_names_the_nearest() -> None:
    assert message("--rolout-batch-size", "3") == (
        "--rolout-batch-size: there is no such flag; did you mean --rollout-batch-size?"
    )
    assert message("--zzzz").endswith("see --help")
    assert message("--no-lr").startswith("--no-lr: there is no such flag"), "only switches have a --no- form"


def test_every_mistake_is_reported_at_once() -> None:
    lines = message("--lrr", "1", "--colocate", "yes", "--lora-rank", "8").splitlines()
    assert [line.split(",")[0].split(":")[0].split(" ")[0] for line in lines] == ["--lrr", "--colocate", "--lora-rank"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--lr", "abc"], "--lr, got 'abc': it takes a number; write it like --lr 0.5 or 1e-6"),
        (["--num-rollout", "1.5"], "--num-rollout, got '1.5': it takes a whole number; write it like --num-rollout 3"),
        (["--num-rollout"], "--num-rollout, got no value: it takes one; write --num-rollout INT"),
        (["--rollout-stop-token-ids", "1", "x"], "--rollout-stop-token-ids, got '1 x': it takes whole numbers"),
        (["--apply-chat-template-kwargs", "[1]"], "--apply-chat-template-kwargs, got '[1]': it takes a JSON object"),
        (["--apply-chat-template-kwargs", "{a"], "--apply-chat-template-kwargs, got '{a': it takes a JSON object"),
        (["--optimizer", "adm"], "--optimizer, got 'adm': it takes one of adam, sgd; did you mean adam?"),
        (
            ["--colocate", "true"],
            "--colocate, got 'true': it is a switch and takes no value; write --colocate or --no-colocate",
        ),
        (["--lr", "1", "2"], "--lr, got '1 2': it takes one value"),
        (["lr", "1"], "command line, got 'lr': a value without a flag"),
        (["--config"], "--config, got no value: it takes one file; write --config FILE.yaml"),
        (["--dry-run", "now"], "--dry-run, got 'now': it is a switch and takes no value; drop the value"),
    ],
)
def test_wrong_values_are_one_clear_line(words: list[str], text: str, capfd: pytest.CaptureFixture[str]) -> None:
    found = message(*words)
    assert found.startswith(text)
    assert "\n" not in found
    assert capfd.readouterr() == ("", ""), "the parser's own boxes do not reach the terminal"


def test_help_is_grouped_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        resolve(["--num-rollout", "1", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    groups = [
        "LAUNCH",
        "MODEL",
        "CKPT",
        "ROLLOUT",
        "EVAL",
        "PERF",
        "GRPO",
        "OPTIMIZER",
        "SGLANG",
        "CLUSTER",
        "TRACKING",
        "DEBUG",
    ]
    places = [text.index(f" {group} options ") for group in groups]
    assert places == sorted(places)
    for flag in (
        "--config",
        "--print-config",
        "--dry-run",
        "--no-swiglu",
        "--rollout-stop STR ...",
        "--optimizer {adam,sgd}",
    ):
        assert flag in text
    assert "Peak learning rate. (default: 1e-06)" in text
