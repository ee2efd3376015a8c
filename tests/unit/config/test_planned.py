"""Every flag that a user of such systems knows works, or says that it is not built yet: none is silently ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.config.command_line import parse
from miles.config.fields import fields
from miles.config.planned import ALREADY_SO, INSTEAD, PARTS, PLANNED_CHOICES, planned_flag
from miles.errors import ConfigError

KNOWN = (Path(__file__).parent / "known_flags.txt").read_text().split()


@pytest.mark.parametrize("flag", KNOWN)
def test_every_known_flag_is_a_field_or_says_that_it_is_not_built(flag: str) -> None:
    problem = planned_flag(flag)
    if flag.replace("-", "_") in fields():
        assert problem is None
    else:
        assert problem is not None, f"--{flag} is neither"
        assert str(problem).startswith(f"--{flag} is not built yet: ")
        assert "; " in str(problem)


def test_tables_name_flags_that_are_planned() -> None:
    planned = [flag for part in PARTS for flag in part.flags]
    assert len(set(planned)) == len(planned), "a flag is in two parts"
    for flag in (*INSTEAD, *ALREADY_SO):
        assert planned_flag(flag) is not None, flag
    for name, choices in PLANNED_CHOICES.items():
        assert not set(choices) & set(fields()[name].choices or ())


def test_megatrons_names_of_scaled_rope_name_ours() -> None:
    for flag in ("--rotary-scaling-factor", "--mscale-all-dim", "--use-rope-scaling"):
        with pytest.raises(
            ConfigError, match=r"leave it out: RoPE's scaling is read from config.json, and --rope-scaling"
        ):
            parse([flag, "1"])


def test_the_line() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(["--lora-rank", "8", "--prometheus-port", "9", "--router-policy", "y", "--bf16"])
    assert str(caught.value).splitlines() == [
        "--lora-rank is not built yet: LoRA; train all weights",
        "--prometheus-port is not built yet: more metrics and exporters; read metrics.jsonl in the run directory",
        "--router-policy is not built yet: external engines, routers and sessions; the run starts its own engines and "
        "balances between them; see --rollout-num-gpus",
        "--bf16 is not built yet: bf16 compute chosen by hand (training memory and speed); the device decides: bf16 on GPU, "
        "fp32 on CPU",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--train-backend", "fsdp"],
            "--train-backend fsdp is not built yet: the FSDP trainer; use --train-backend megatron",
        ),
        (["--optimizer", "muon"], "--optimizer muon is not built yet: the Muon optimizer; use --optimizer adam or sgd"),
    ],
)
def test_choices_that_are_not_built(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert str(caught.value).startswith(line)


def test_a_value_that_is_so_anyway_is_accepted() -> None:
    script = """--attention-dropout 0.0 --hidden-dropout 0.0 --attention-softmax-in-fp32 --update_weights_interval 1"""
    assert parse(script.split()).values == {}
    for words in (["--hidden-dropout", "0.1"], ["--qkv-format", "bshd"]):
        with pytest.raises(ConfigError, match="is not built yet"):
            parse(words)
