"""--custom-tis-function-path: a correction as modules for Miles and slime write it, called as they expect."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from miles.algo import PolicyLossSpec, finish_metrics, policy_loss
from miles.algo.metrics import merge_metrics
from miles.config import make_config
from miles.errors import HookError
from miles.trainers import check
from miles.trainers.hooks import custom_loss, with_custom_correction
from miles.types import LossInputs
from tests.unit.algo.test_policy_loss import make_inputs

MODULE = """
import torch

def tis(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kwargs):
    assert all(len(a) == len(b) for a, b in zip(train_log_probs, rollout_log_probs, strict=True))
    ratio = torch.exp(torch.cat(train_log_probs) - torch.cat(rollout_log_probs))
    weight = ratio.clamp(args.tis_clip_low, args.tis_clip)
    return pg_loss * weight, loss_masks, {"tis": ratio.detach()}

def first_row_only(args, *, pg_loss, loss_masks, total_lengths, response_lengths, **kwargs):
    assert len(total_lengths) == len(response_lengths) == len(loss_masks)
    return pg_loss, [m if i == 0 else torch.zeros_like(m) for i, m in enumerate(loss_masks)], {}

def too_short(args, **kwargs):
    return kwargs["pg_loss"][1:], kwargs["loss_masks"], {}

def odd_metric(args, **kwargs):
    return kwargs["pg_loss"], kwargs["loss_masks"], {"odd": torch.ones(3, 2)}

def no_masks(args, **kwargs):
    return kwargs["pg_loss"], 1, {}

def plain(args, **kwargs):
    return kwargs["pg_loss"], [m.tolist() for m in kwargs["loss_masks"]], {"a_number": 2}

def nothing(args, **kwargs):
    return None

def positional(args, pg_loss):
    return pg_loss
"""


@pytest.fixture
def spec_of(tmp_path: Path) -> Any:
    (tmp_path / "corrections.py").write_text(MODULE)

    def make(name: str, **flags: Any) -> PolicyLossSpec:
        config = make_config(custom_tis_function_path=f"{tmp_path}/corrections.py:{name}", **flags)
        return with_custom_correction(PolicyLossSpec(), config)

    return make


def test_a_users_tis_is_ours(spec_of: Any) -> None:
    inputs = make_inputs()
    built_in = policy_loss(inputs, PolicyLossSpec(use_tis=True, tis_clip=1.1))
    custom = policy_loss(inputs, spec_of("tis", use_tis=True, tis_clip=1.1))
    torch.testing.assert_close(custom.loss, built_in.loss)
    assert finish_metrics(custom.metrics)["tis"] == pytest.approx(finish_metrics(built_in.metrics)["tis"])
    empty = policy_loss(make_inputs(lengths=()), spec_of("tis"))
    assert empty.loss.item() == 0
    assert empty.metrics.keys() == custom.metrics.keys()


def test_tokens_that_it_masks_leave_the_policy_loss(spec_of: Any) -> None:
    inputs = make_inputs(mask_share=0)
    only = dataclasses.replace(inputs, token_weight=inputs.token_weight * (inputs.row == 0))
    got = policy_loss(inputs, spec_of("first_row_only"))
    torch.testing.assert_close(got.loss, policy_loss(only, PolicyLossSpec()).loss)


def test_masks_and_metrics_may_be_plain_numbers(spec_of: Any) -> None:
    got = policy_loss(make_inputs(), spec_of("plain"))
    torch.testing.assert_close(got.loss, policy_loss(make_inputs(), PolicyLossSpec()).loss)
    assert finish_metrics(got.metrics)["a_number"] == pytest.approx(2)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("too_short", "return one value for each token"),
        ("nothing", "it returns"),
        ("odd_metric", "one number, or one for each token"),
        ("no_masks", "return a mask for each row"),
    ],
)
def test_a_wrong_result_is_named(spec_of: Any, name: str, why: str) -> None:
    with pytest.raises(HookError, match=f"--custom-tis-function-path, got .*{why}"):
        policy_loss(make_inputs(), spec_of(name))


def test_found_at_launch(tmp_path: Path) -> None:
    (tmp_path / "corrections.py").write_text(MODULE)

    def problems(name: str) -> list[str]:
        config = make_config(custom_tis_function_path=f"{tmp_path}/corrections.py:{name}")
        return [str(p) for p in check(config) if "tis" in str(p.what)]

    assert problems("tis") == []
    assert "has no 'tiss'; did you mean tis?" in problems("tiss")[0]
    assert "it takes (args, pg_loss); it is called with (args, pg_loss=, train_log_probs=" in problems("positional")[0]


def test_a_loss_of_ones_own_names_its_metrics_without_tokens(tmp_path: Path) -> None:
    (tmp_path / "losses.py").write_text(
        "def loss(args, tokens):\n    assert len(tokens.log_probs)\n"
        "    return -tokens.log_probs, {'largest': tokens.log_probs.detach().max(), 'ref': tokens.ref_log_probs}\n"
    )
    loss = custom_loss(f"{tmp_path}/losses.py:loss", make_config())
    none, some = (torch.full((n,), -0.5, requires_grad=True) for n in (0, 2))

    def outputs_of(log_probs: torch.Tensor) -> Any:
        zeros = torch.zeros(len(log_probs))
        mask, row = torch.ones(len(log_probs), dtype=torch.bool), torch.zeros(len(log_probs), dtype=torch.long)
        weight, num_rows = torch.full_like(zeros, 0.5), min(len(log_probs), 1)
        return loss(LossInputs(log_probs, zeros, zeros, mask, weight, row, num_rows, ref_log_probs=zeros))

    empty, whole = outputs_of(none), outputs_of(some)
    assert set(empty.metrics) == set(whole.metrics) >= {"custom/largest", "custom/ref"}
    assert (empty.loss.item(), whole.loss.item()) == (0, 0.5)
    empty.loss.backward()
    merged = finish_metrics(merge_metrics(empty.metrics, whole.metrics))
    assert merged["custom/largest"] == -0.5
