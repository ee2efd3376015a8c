"""The flags of jobs on data sets reach the rows."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from typing import Any

import pytest

from miles.config import make_config
from miles.data import RolloutDataSource
from miles.errors import ConfigError, DataError
from miles.rollout import DatasetRollout, channels_of, load_eval_rows, load_rows
from miles.types import MARGIN

from .test_conversations import PLAIN, TURNS, chat

OTHER = chat("u1+1", "a2")


@pytest.fixture
def load(tokenizer: Any, tmp_path: Path) -> Any:
    def load(*rows: dict[str, Any], of_evaluation: bool = False, channels: tuple[str, ...] = (), **flags: Any) -> Any:
        one = copy.deepcopy(tokenizer)
        one.add_special_tokens({"eos_token": "</s>"})
        one.chat_template = PLAIN
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        evaluation: dict[str, Any] = (
            {"eval_prompt_data": ["held", str(path)], "eval_interval": 1} if of_evaluation else {}
        )
        if entry := flags.pop("entry", None):
            listed = tmp_path / "eval.yaml"
            listed.write_text(json.dumps({"datasets": [{"name": "held", "path": str(path), **entry}]}))
            evaluation = {"eval_config": str(listed), "eval_interval": 1}
        chosen = {"loss_type": "sft_loss", "prompt_data": str(path), "rollout_batch_size": 2, **evaluation, **flags}
        config = make_config(**chosen)
        return load_eval_rows(config, one, channels) if of_evaluation else load_rows(config, one)

    return load


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        ({"loss_scale": "last_round"}, [{"messages": TURNS}]),
        ({"input_key": "talk"}, [{"talk": TURNS}]),
        ({"input_key": "input"}, [{"prompt": "1", "input": "2", "completion": "3"}]),
        ({"input_key": "q", "label_key": "a"}, [{"q": "1", "a": "2"}]),
        ({"apply_chat_template": True}, [{"prompt": "1", "completion": "2"}]),
        ({"apply_chat_template_kwargs": {"quiet": True}}, [{"messages": chat("u1", "a()2")}]),
        ({"metadata_key": "about"}, [{"messages": OTHER, "about": {"id": 1}}]),
        ({"tool_key": "uses"}, [{"messages": OTHER, "uses": [{"name": "look"}]}]),
        ({"channel_key": "source"}, [{"messages": OTHER, "source": "web"}]),
        ({"seq_length": 25, "overlong_rows": "drop"}, [{"messages": TURNS}, {"messages": chat("u1", "a2")}]),
        ({"seq_length": 40, "overlong_rows": "truncate"}, [{"messages": TURNS}]),
    ],
)
def test_every_flag_changes_the_rows(load: Any, flags: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    made = load(*rows, **flags)
    try:
        without = load(*rows, **({"seq_length": flags["seq_length"]} if "seq_length" in flags else {}))
    except DataError:
        return
    assert without.fingerprint != made.fingerprint


def test_rows_come_in_order_and_evaluations_whole(load: Any) -> None:
    rows = [{"messages": chat(f"u{i}", f"a{i}")} for i in range(5)]
    source = RolloutDataSource(load(*rows), n_samples_per_prompt=1, shuffle=False, seed=0)
    output = asyncio.run(DatasetRollout(source, num_groups=2).generate(0))
    assert [[s.response for s in group] for group in output.groups] == [["0</s>"], ["1</s>"]]
    ((dataset, groups),) = load(*rows, of_evaluation=True)
    assert dataset.name == "held"
    assert len(groups) == 5


def test_channels_are_named_by_all_rows_or_none(load: Any) -> None:
    assert channels_of(load({"messages": OTHER})) == ()
    assert channels_of(load(*[{"messages": OTHER, "channel": name} for name in "bab"])) == ("a", "b")
    with pytest.raises(DataError, match=r"rows\.jsonl:2, got no channel where other rows have one; name it, such as a"):
        channels_of(load({"messages": OTHER, "channel": "a"}, {"messages": OTHER}))


def test_evaluation_rows_have_channels_of_the_training_data(load: Any) -> None:
    known = {"messages": OTHER, "channel": "a"}
    load(known, of_evaluation=True, channels=("a", "b"))
    load({"messages": OTHER}, of_evaluation=True)
    for row, got in (({"messages": OTHER}, "no channel"), (known | {"channel": "c"}, "channel c")):
        with pytest.raises(DataError, match=rf"rows\.jsonl:2, got {got}: rows of --prompt-data are of a, b"):
            load(known, row, of_evaluation=True, channels=("a", "b"))


@pytest.mark.parametrize(
    ("entry", "row"),
    [
        ({"input_key": "talk"}, {"talk": OTHER}),
        ({"input_key": "q", "label_key": "a"}, {"q": "1", "a": "2"}),
        ({"apply_chat_template": True}, {"prompt": "1", "completion": "2"}),
        ({"metadata_key": "about"}, {"messages": OTHER, "about": {"id": 1}}),
        ({"tool_key": "uses"}, {"messages": OTHER, "uses": [{"name": "look"}]}),
    ],
)
def test_every_key_of_an_evaluation_changes_its_rows(load: Any, entry: dict[str, Any], row: dict[str, Any]) -> None:
    ((_, groups),) = load(row, of_evaluation=True, entry=entry)
    try:
        ((_, others),) = load(row, of_evaluation=True)
    except DataError:
        return
    assert groups[0][0].to_dict() != others[0][0].to_dict()


@pytest.mark.parametrize("key", ["temperature", "n_samples_per_prompt", "rm_type", "reward_key", "max_response_len"])
def test_keys_of_sampling_and_rewards_are_refused(load: Any, key: str) -> None:
    with pytest.raises(ConfigError, match="--loss-type sft_loss samples and scores nothing; leave it out"):
        load({"messages": OTHER}, of_evaluation=True, entry={key: 1})
    with pytest.raises(ConfigError, match="label_key, got 'x': --loss-type dpo reads the columns chosen and rejected"):
        load({"messages": OTHER}, of_evaluation=True, loss_type="dpo", entry={"label_key": "x"})


def test_margins_are_for_reward_models(load: Any) -> None:
    row = {"prompt": "1", "chosen": "2", "rejected": "3", "margin": 0.5}
    assert load(row, loss_type="rm").prompts[0].metadata == {MARGIN: 0.5}
    assert load(row, loss_type="dpo").prompts[0].metadata == {}


def test_files_without_a_row_that_fits(load: Any) -> None:
    with pytest.raises(DataError, match="all 1 rows are longer than --seq-length"):
        load({"messages": TURNS}, seq_length=8, overlong_rows="drop")
    with pytest.raises(DataError, match=r"evaluation held, got .*: there is no row in it"):
        load(of_evaluation=True)
