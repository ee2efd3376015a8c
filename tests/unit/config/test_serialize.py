"""Config <-> JSON without loss, for any values that fields may hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.config import Config, config_from_dict, config_to_dict, make_config
from miles.config.fields import Field, build_config, coerce, fields, flatten
from miles.errors import ConfigError

SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**53), 2**53),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=8),
    bool: st.booleans(),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


def values_of(field: Field) -> st.SearchStrategy[Any]:
    if field.choices:
        found: st.SearchStrategy[Any] = st.sampled_from(field.choices)
    elif field.kind == "list":
        found = st.lists(SCALARS[field.item_type], max_size=3).map(tuple)
    elif field.kind == "json":
        found = st.dictionaries(st.text(max_size=4), JSON, max_size=3)
    else:
        found = SCALARS[field.type]
    return st.none() | found if field.optional else found


FLAT = st.fixed_dictionaries({}, optional={name: values_of(field) for name, field in fields().items()})


@settings(max_examples=25, deadline=None)
@given(FLAT)
def test_flat_to_config_to_json_and_back(flat: dict[str, Any]) -> None:
    config = build_config(flat)
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert again == config
    assert {name: value for name, value in flatten(again).items() if name in flat} == flat


@settings(max_examples=25, deadline=None)
@given(FLAT)
def test_coercion_keeps_what_has_the_right_type(flat: dict[str, Any]) -> None:
    assert {name: coerce(fields()[name], value) for name, value in flat.items()} == flat


def test_defaults_fill_what_a_document_leaves_out() -> None:
    assert config_from_dict({}) == Config()
    assert config_from_dict({"optimizer": {"lr": 1}}).optimizer.lr == 1.0


def test_mistakes() -> None:
    for document, message in (
        ({"optimiser": {}}, "group 'optimiser': there is no such group; did you mean optimizer?"),
        ({"optimizer": {"lrr": 1}}, "config lrr: there is no such flag"),
        ({"rollout": {"lr": 1}}, "it belongs to optimizer"),
        ({"optimizer": {"lr": None}}, "config --lr, got None: it is not a number"),
    ):
        with pytest.raises(ConfigError) as caught:
            config_from_dict(document)  # type: ignore[arg-type]
        assert message in str(caught.value)


def test_a_resolved_config_survives() -> None:
    config = make_config(
        rollout_batch_size=4, plugin=["a", "b"], apply_chat_template=True, apply_chat_template_kwargs={"k": [1]}
    )
    assert config_from_dict(config_to_dict(config)) == config
