"""reward_model in a real worker: equal scores to transformers', batched or alone, and what preflight refuses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Qwen3Config, Qwen3ForSequenceClassification

from miles.config import make_config
from miles.errors import ConfigError
from miles.rollout import check
from miles.rollout.rewards.reward_model import RewardModel, wrong_model
from miles.types import Sample, Status

from .test_reward_pool import bench

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
TEXTS = [[5, 7, 9], [1, 0, 0], [4] * 20, [3], [8, 6, 7, 5, 3, 0, 9]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rm")
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, num_labels=1)
    Qwen3ForSequenceClassification(config).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def samples() -> list[Sample]:
    return [
        Sample(index=i, tokens=tokens, response_length=1, response="x", status=Status.COMPLETED)
        for i, tokens in enumerate(TEXTS)
    ]


async def test_a_worker_scores_as_transformers_does(model: Path) -> None:
    hf = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.no_grad():
        expected = [hf(torch.tensor([tokens])).logits.item() for tokens in TEXTS]
    async with bench(rm_type="reward_model", rm_model=str(model)) as b:
        groups = await asyncio.gather(*(b.score(samples()) for _ in range(3)))
    for scores in groups:
        assert scores == pytest.approx(expected, abs=1e-6)


async def test_what_waits_is_scored_together_within_the_budget(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles.rollout.rewards.reward_model._BATCH_TOKENS", 21)
    served = RewardModel(str(model))
    batches: list[list[int]] = []
    forward = served.forward
    monkeypatch.setattr(served, "forward", lambda texts: batches.append([len(t) for t in texts]) or forward(texts))
    together = await asyncio.gather(*(served.score(tokens) for tokens in TEXTS))
    assert batches == [[20], [7, 3, 3], [1]]
    assert together == pytest.approx([forward([tokens])[0] for tokens in TEXTS], abs=1e-6)
    with pytest.raises(ValueError, match="got no tokens"):
        await served.score([])
    with pytest.raises(IndexError):
        await served.score([10**6])
    assert await served.score(TEXTS[0]) == pytest.approx(together[0], abs=1e-6)  # an error ends its own batch alone


def test_what_is_no_reward_model_is_refused(model: Path, tmp_path: Path) -> None:
    assert wrong_model(model, None) is None
    assert wrong_model(model, str(model)) is None
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "tokenizer.json").write_text('{"other": 1}')
    assert "is not that of --hf-checkpoint" in (wrong_model(model, str(policy)) or ("",))[0]
    config = json.loads((model / "config.json").read_text())
    for change, why in (
        ({"architectures": ["Qwen3ForCausalLM"]}, "it is a Qwen3ForCausalLM, which has no score"),
        ({"id2label": {"0": "a", "1": "b"}}, "it has 2 labels"),
    ):
        (policy / "config.json").write_text(json.dumps({**config, **change}))
        assert why in (wrong_model(policy, None) or ("",))[0]
        problems = check(make_config(rm_type="reward_model", rm_model=str(policy)))
        assert any(why in str(problem) for problem in problems)


def test_the_flag_needs_its_reward() -> None:
    with pytest.raises(
        ConfigError, match=r"--rm-model, got .*: --rm-type math asks no model; take --rm-type reward_model"
    ):
        make_config(rm_type="math", rm_model="dir")
