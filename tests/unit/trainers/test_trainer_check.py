"""What the trainers' preflight refuses, and that it costs nothing to ask."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from miles.config import make_config
from miles.config.groups import Config
from miles.trainers import check


def _config(group: str, **values: Any) -> Config:
    config = Config()
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **values)})


@pytest.mark.parametrize(
    ("group", "values", "named"),
    [
        ("model", {"spec": ("no.such.module", "spec")}, "--spec, got no.such.module spec"),
        ("model", {"spec": ("one",)}, "--spec MODULE NAME"),
        ("model", {"disable_bias_linear": False}, "--no-disable-bias-linear"),
        ("model", {"norm_epsilon": -1.0}, "--norm-epsilon, got -1.0"),
    ],
)
def test_problems_are_named(group: str, values: dict[str, Any], named: str) -> None:
    (problem,) = check(_config(group, **values))
    assert named in str(problem)


def test_a_plain_configuration_has_no_problem() -> None:
    assert check(Config()) == []
    assert check(_config("model", spec=("miles.trainers.megatron.model", "local_layer_spec"))) == []


def test_checking_imports_neither_torch_nor_megatron() -> None:
    code = "import sys, miles.trainers, miles.config.groups as g; miles.trainers.check(g.Config()); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_an_unknown_model_name_is_found_before_any_process_starts():
    (problem,) = check(make_config(model_name="qwen33"))
    assert "--model-name, got qwen33" in str(problem)
    assert "qwen3" in problem.fix
    assert check(make_config(model_name="qwen3")) == []


def test_every_family_of_the_config_has_weight_names_in_the_trainer():
    from miles.config.hf import FAMILIES
    from miles.trainers.megatron.hf_names import model_kinds

    assert set(FAMILIES) == set(model_kinds)


def test_a_loss_that_no_plugin_registered() -> None:
    config = make_config(policy_loss="cisppo", off_policy_correction="mine", plugin=("some.py",))
    first, second = map(str, check(config))
    assert first == "--policy-loss, got cisppo: neither Miles nor a --plugin registers it; did you mean cispo?"
    assert second.startswith(
        "--off-policy-correction, got mine: neither Miles nor a --plugin registers it; choose one of"
    )


def test_a_pair_loss_that_no_plugin_registered() -> None:
    config = make_config(loss_type="dpo", dpo_loss_type=("sigmoid", "higne"), plugin=("some.py",))
    (problem,) = map(str, check(config))
    assert problem == "--dpo-loss-type, got higne: neither Miles nor a --plugin registers it; did you mean hinge?"
