"""The flags of GRPO, as the losses take them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from miles.algo import PolicyLossSpec
from miles.config import Config, GrpoArgs
from miles.trainers.losses import policy_loss_spec

#: The hook, which --custom-tis-function-path fills.
FLAGS = [field for field in dataclasses.fields(PolicyLossSpec) if field.name != "custom_correction"]


def another(value: Any) -> Any:
    """A value that is not the default."""
    return not value if isinstance(value, bool) else 0.375 if isinstance(value, float) or value is None else "another"


@pytest.mark.parametrize("field", FLAGS, ids=lambda field: field.name)
def test_every_flag_reaches_the_policy_loss(field: dataclasses.Field[Any]) -> None:
    value = another(field.default)
    assert value != field.default
    config = dataclasses.replace(Config(), grpo=dataclasses.replace(GrpoArgs(), **{field.name: value}))
    assert getattr(policy_loss_spec(config), field.name) == value


def test_a_flag_that_is_not_given_leaves_the_losss_own_default() -> None:
    assert policy_loss_spec(Config()) == PolicyLossSpec()
