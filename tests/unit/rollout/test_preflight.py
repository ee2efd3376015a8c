"""What is found before anything starts, and which rows need labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.config import EvalDataset, make_config
from miles.errors import ConfigError
from miles.rollout import check, label_required
from miles.rollout.reward_setup import evaluation_rewards

HOOKS = """
async def good(args, sample, **kwargs): return 1.0
def sync(args, sample): return 1.0
async def group(args, samples): return [1.0 for s in samples]
async def narrow(args): return 1.0
def sync_generate(args, sample, sampling_params): return sample
async def generate(args, sample, sampling_params): return sample
def keep(args, samples, **kwargs): return True
"""


@pytest.fixture
def hooks(tmp_path: Path) -> str:
    path = tmp_path / "hooks.py"
    path.write_text(HOOKS)
    return str(path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rm_type": "maths", "label_key": "l"}, "--rm-type, got maths: no reward has this name; did you mean math?"),
        (
            {"rm_type": "math"},
            "--label-key: --rm-type math compares with a label; name the column that holds the answers",
        ),
        ({"rm_type": "boxed_exact"}, "--label-key: --rm-type boxed_exact compares"),
        ({"rm_type": "reward_model"}, "--rm-model: --rm-type reward_model asks a model; give the directory"),
        (
            {"rm_type": "reward_model", "rm_model": "nowhere"},
            "--rm-model: --rm-type reward_model cannot be scored by",
        ),
        ({"rm_type": "remote_rm"}, "--rm-url: --rm-type remote_rm asks a service; give its address"),
        ({"rm_type": "remote_rm", "rm_url": "grader:80"}, "--rm-url, got grader:80: it is no web address"),
        ({"rm_type": "remote_rm", "rm_url": "http://"}, "--rm-url, got http://: it is no web address"),
        ({"custom_rm_path": "HOOKS:god"}, "did you mean good?"),
        ({"custom_rm_path": "HOOKS:narrow"}, "called with (args, sample)"),
        ({"custom_generate_function_path": "HOOKS:sync_generate"}, "not a coroutine function"),
        ({"custom_generate_function_path": "HOOKS:good"}, "called with (args, sample, sampling_params)"),
        ({"dynamic_sampling_filter_path": "HOOKS:narrow"}, "called with (args, samples)"),
        ({"dynamic_sampling_filter_path": "no.such.filter"}, "there is no module 'no"),
        ({"custom_generate_timeout": 0.0}, "--custom-generate-timeout, got 0.0"),
    ],
)
def test_problems(flags: dict, message: str, hooks: str) -> None:
    flags = {k: v.replace("HOOKS", hooks) if isinstance(v, str) else v for k, v in flags.items()}
    lines = [str(problem) for problem in check(make_config(**flags))]
    assert any(message in line for line in lines), lines


def test_nothing_to_say(hooks: str) -> None:
    filters = "miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    for flags in (
        {"rm_type": "random"},
        {"rm_type": "math", "label_key": "label", "dynamic_sampling_filter_path": filters},
        {"custom_rm_path": f"{hooks}:sync", "dynamic_sampling_filter_path": f"{hooks}:keep"},
        {"custom_rm_path": f"{hooks}:group", "group_rm": True},
        {"custom_generate_function_path": f"{hooks}:generate"},
    ):
        assert check(make_config(**flags)) == []


def test_rows_that_need_labels(hooks: str) -> None:
    by_type = label_required(make_config(rm_type="math", label_key="l"))
    assert by_type({}) is True
    assert by_type({"rm_type": "random"}) is False
    by_hook = label_required(make_config(custom_rm_path=f"{hooks}:good", rm_type="math"))
    assert by_hook({}) is False
    assert by_hook({"rm_type": "boxed_exact"}) is True
    with pytest.raises(ConfigError, match="did you mean exact"):
        by_hook({"rm_type": "exac"})


def test_every_row_needs_a_way_to_be_scored(hooks: str) -> None:
    nameless = label_required(make_config())
    assert nameless({"rm_type": "random"}) is False
    with pytest.raises(ConfigError, match=r"reward type, got none: .*; give --rm-type or --custom-rm-path"):
        nameless({})
    with pytest.raises(ConfigError, match="it asks a service; give its address as --rm-url"):
        nameless({"rm_type": "remote_rm"})
    generates = make_config(custom_generate_function_path=f"{hooks}:generate")
    assert label_required(generates)({}) is False  # the hook may set the reward


def test_an_evaluation_with_a_reward_type_of_its_own_leaves_the_hook(hooks: str) -> None:
    config = make_config(custom_rm_path=f"{hooks}:group", group_rm=True)
    inherited = evaluation_rewards(config, EvalDataset("d", "p", custom_rm_path=f"{hooks}:group"))
    assert (inherited.hook, inherited.group) == (config.rollout.custom_rm_path, True)
    own_type = evaluation_rewards(config, EvalDataset("d", "p", custom_rm_path=f"{hooks}:group", rm_type="math"))
    assert (own_type.hook, own_type.rm_type) == (None, "math")
    own_hook = evaluation_rewards(config, EvalDataset("d", "p", custom_rm_path=f"{hooks}:good"))
    assert (own_hook.hook, own_hook.group) == (f"{hooks}:good", False)
