"""The hooks' `args`: flat, read-only, picklable."""

from __future__ import annotations

import copy
import pickle

import pytest

from miles.config import args_view, make_config
from miles.config.fields import fields


def test_every_flag_is_an_attribute() -> None:
    config = make_config(rollout_batch_size=4, sglang_args={"context_length": 9})
    args = args_view(config, engine_url="http://127.0.0.1:1")
    assert args.rollout_batch_size == 4
    assert args.lr == 1e-6
    assert args.engine_url == "http://127.0.0.1:1"
    assert args.sglang_context_length == 9
    assert set(fields()) <= set(vars(args))
    assert set(args) == set(vars(args)) == set(dir(args))
    assert "lr" in args


def test_unknown_names() -> None:
    args = args_view(make_config())
    with pytest.raises(AttributeError, match=r"args.reward_kee: there is no such flag; did you mean args.reward_key\?"):
        _ = args.reward_kee
    assert getattr(args, "reward_kee", 3) == 3
    assert not hasattr(args, "nothing_like_it")


def test_read_only() -> None:
    args = args_view(make_config())
    with pytest.raises(AttributeError, match=r"args.lr: args are read-only; keep what a hook needs in sample.metadata"):
        args.lr = 1.0
    with pytest.raises(AttributeError, match="read-only"):
        del args.lr
    vars(args)["lr"] = 1.0
    assert args.lr == 1e-6, "vars() is a copy"


def test_pickle_and_copy() -> None:
    args = args_view(make_config(rollout_stop=["x"]), extra=1)
    assert pickle.loads(pickle.dumps(args)) == args
    assert copy.deepcopy(args).extra == 1
