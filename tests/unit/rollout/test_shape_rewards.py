"""Format, length and repetition; several rewards in one."""

from __future__ import annotations

import math
from typing import Any

import pytest

from miles.config import args_view, make_config
from miles.errors import ConfigError
from miles.rollout import check, label_required
from miles.rollout.rewards import find, registry
from miles.rollout.rewards.scorer import RewardSource, Scorer
from miles.types import Sample, Status


def score(rm_type: str, response: str = "", *, prompt: str = "", label: Any = None, **flags: Any) -> Any:
    """What the rule itself gives."""
    length = flags.pop("length", len(response))
    sample = Sample(prompt=prompt, response=response, response_length=length, label=label)
    args = args_view(make_config(**flags))
    return registry.call(find(rm_type).function, args, sample, **registry.offered(rm_type, sample))


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think>a</think><answer>4</answer>", 1.0),
        ("<think>\na\nb\n</think>\n\n<answer>4</answer>\n", 1.0),
        ("<think>a</think><answer>4</answer> and more", 0.0),
        ("well <think>a</think><answer>4</answer>", 0.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<think>a</think><answer>4", 0.0),
        ("<answer>4</answer>", 0.0),
        ("<think>a<answer>4</answer></think>", 0.0),
        ("<think>a</think><think>b</think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_the_default_format_is_thoughts_then_one_answer(response: str, reward: float) -> None:
    assert score("format", response) == reward


def test_an_opening_that_the_prompt_has_written_belongs_to_the_response() -> None:
    assert score("format", "a</think><answer>4</answer>", prompt="2+2?\n<think>\n") == 1.0
    assert score("format", "a</think><answer>4</answer>", prompt="2+2?") == 0.0


def test_a_format_of_ones_own() -> None:
    assert score("format", " Answer: 4\n", format_pattern=r"Answer: \d+") == 1.0
    assert score("format", "Answer: x", format_pattern=r"Answer: \d+") == 0.0
    with pytest.raises(ConfigError, match="--format-pattern, got \\(: it is no regular expression"):
        make_config(format_pattern="(")


def test_a_megabyte_of_openings_takes_no_time_to_tell() -> None:
    assert score("format", "<think>" * 150_000) == 0.0
    assert score("format", "<think>" + "a" * 1_000_000) == 0.0


LENGTHS = {"cosine_max_len": 100, "label": "4"}


@pytest.mark.parametrize(
    ("length", "correct", "wrong"),
    [(0, 1.0, -0.5), (100, 0.5, 0.0), (50, 0.75, -0.25), (25, 0.75 + 0.25 * math.sqrt(0.5), -0.25 - 0.25 * math.sqrt(0.5)), (300, 0.5, 0.0)],
)  # fmt: skip
def test_cosine_by_hand(length: int, correct: float, wrong: float) -> None:
    assert score("cosine", r"\boxed{4}", length=length, **LENGTHS) == pytest.approx(correct)
    assert score("cosine", r"\boxed{5}", length=length, **LENGTHS) == pytest.approx(wrong)
    assert score("boxed_cosine", r"\boxed{4}", length=length, **LENGTHS) == pytest.approx(correct)


@pytest.mark.parametrize(("kind", "answer"), [("correct", 4), ("wrong", 5)])
def test_cosine_values_are_flags(kind: str, answer: int) -> None:
    ends = {f"cosine_min_len_value_{kind}": 3.0, f"cosine_max_len_value_{kind}": 1.0}
    found = [score("cosine", rf"\boxed{{{answer}}}", length=length, **LENGTHS, **ends) for length in (0, 50, 100)]
    assert found == pytest.approx([3.0, 2.0, 1.0])


def test_a_response_that_cannot_be_checked_is_wrong() -> None:
    timeout_reward = find("cosine").timeout_reward
    assert callable(timeout_reward)
    args = args_view(make_config(cosine_max_len=100))
    assert timeout_reward(args, Sample(response_length=50)) == pytest.approx(-0.25)


def test_tokens_that_are_not_trained_on_have_no_length() -> None:
    flags = {"soft_max_length": 4, "soft_cache_length": 2}
    args = args_view(make_config(**flags))
    sample = Sample(response_length=6, loss_mask=[1, 0, 0, 0, 1, 1])
    assert find("soft_overlong").function(args, sample) == -0.5


@pytest.mark.parametrize(("length", "reward"), [(0, 0), (60, 0), (61, -0.025), (80, -0.5), (100, -1), (200, -1)])
def test_soft_overlong_by_hand(length: int, reward: float) -> None:
    assert score("soft_overlong", length=length, soft_max_length=100, soft_cache_length=40) == pytest.approx(reward)
    assert score("soft_overlong", length=length, rollout_max_response_len=100, soft_cache_length=40) == pytest.approx(
        reward
    )


def test_an_end_at_the_last_allowed_token_is_no_truncation() -> None:
    args = args_view(make_config(soft_max_length=100, soft_cache_length=40))
    rewards = {
        find("soft_overlong").function(args, Sample(response_length=80, status=status))
        for status in (Status.COMPLETED, Status.TRUNCATED)
    }
    assert rewards == {-0.5}


@pytest.mark.parametrize(
    ("response", "n", "reward"),
    [
        ("a b c d", 3, 0.0),
        ("a b", 3, 0.0),
        ("", 3, 0.0),
        ("a b c a b c", 3, -0.25),  # abc bca cab abc
        ("x x x x x", 3, -2 / 3),  # three times xxx
        ("No no NO no no", 3, -2 / 3),
        ("的的的的的", 3, -2 / 3),
        ("a b a b", 2, -1 / 3),
    ],
)
def test_repetition_by_hand(response: str, n: int, reward: float) -> None:
    assert score("repetition", response, repetition_n_grams=n) == pytest.approx(reward)
    assert score("repetition", response, repetition_n_grams=n, repetition_max_penalty=-3.0) == pytest.approx(3 * reward)


def test_a_megabyte_of_one_word_is_repetition() -> None:
    assert score("repetition", "ab " * 350_000) == pytest.approx(-1, abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"repetition_n_grams": 0}, "--repetition-n-grams, got 0: it must be at least 1 and at most 64"),
        ({"repetition_max_penalty": 1.0}, "--repetition-max-penalty, got 1: it must be a finite number of at most 0"),
        ({"cosine_max_len": 0}, "--cosine-max-len, got 0: it must be at least 1"),
        ({"soft_cache_length": 0}, "--soft-cache-length, got 0: it must be at least 1"),
    ],
)
def test_flags_out_of_range(flags: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        make_config(**flags)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"rm_type": "soft_overlong"}, "--soft-cache-length: --rm-type soft_overlong grows over the last tokens; give"),
        ({"rm_type": "soft_overlong", "soft_cache_length": 4}, "--soft-max-length: --rm-type soft_overlong goes by"),
        (
            {"rm_type": "soft_overlong", "soft_cache_length": 4, "soft_max_length": 3},
            "--soft-max-length: --rm-type soft_overlong grows over --soft-cache-length 4 tokens, more than the longest",
        ),
        ({"rm_type": "cosine", "label_key": "l"}, "--cosine-max-len: --rm-type cosine goes by the longest response"),
        ({"rm_type": "math,formt", "label_key": "l"}, "--rm-type, got formt: no reward has this name; did you mean format"),
        ({"rm_type": "math,format"}, "--label-key: --rm-type math compares with a label"),
        ({"rm_type": "random,format"}, "--reward-key: --rm-type random,format has the entries random, format; add"),
        ({"rm_type": "random,format", "reward_weights": {"random": 1, "fmt": 1}}, "--reward-weights, got fmt: --rm-type"),
        ({"rm_type": "random,", "reward_key": "random"}, "--rm-type, got random,: no reward has this name; choose one of"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_at_launch(flags: dict[str, Any], line: str) -> None:
    lines = [str(problem) for problem in check(make_config(**flags))]
    assert any(line in found for found in lines), lines


def test_rows_that_name_rewards_are_checked_like_flags() -> None:
    required = label_required(make_config(rm_type="random"))
    assert required({"rm_type": "format,boxed_exact"}) is True
    assert required({"rm_type": "format,random"}) is False
    with pytest.raises(ConfigError, match="which --soft-cache-length does not say"):
        required({"rm_type": "random,soft_overlong"})


async def test_several_rewards_are_one_dict() -> None:
    config = make_config(soft_max_length=10, soft_cache_length=10)
    weights = {"exact": 1.0, "soft_overlong": 0.5}
    sample = Sample(response="4", label="4", response_length=5, status=Status.COMPLETED, metadata={"kept": 1})
    source = RewardSource("exact,soft_overlong, boxed_exact", reward_weights=weights)
    assert await Scorer(args_view(config), None).score([sample], [0], source) == []
    assert sample.reward == {"exact": 1.0, "soft_overlong": -0.5, "boxed_exact": 0.0}
    assert sample.metadata == {"kept": 1}

    broken = Sample(response="4", response_length=5, status=Status.COMPLETED, metadata={"rm_type": "random,exact"})
    await Scorer(args_view(config), None).score([broken], [0], source)
    assert (broken.status, broken.reward) == (Status.FAILED, None)
    assert "fill the --label-key column" in (broken.error or "")
    assert broken.metadata == {"rm_type": "random,exact"}


async def test_a_dict_without_its_entry_fails_its_sample_alone() -> None:
    rewards = iter([{"acc": 1.0}, {}, {"score": 2.0}])
    registry.register_reward("odd", inline=True, entries=("score",))(lambda args, sample: next(rewards))
    try:
        samples = [Sample(status=Status.COMPLETED) for _ in range(3)]
        source = RewardSource("odd,random", reward_weights={"odd": 1.0})
        tracebacks = await Scorer(args_view(make_config()), None).score(samples, [0, 1, 1], source)
    finally:
        registry._rules.pop("odd")
    assert [sample.reward for sample in samples] == [None, None, {"odd": 2.0, "random": 1.0}]
    assert "keys ['acc']: beside others it counts by its entry 'score'" in (samples[0].error or "")
    assert len(tracebacks) == 2


def test_a_dict_among_several_counts_by_its_first_entry() -> None:
    registry.register_reward("pair", entries=("score", "acc"))(lambda args, sample: {})
    try:
        found = registry.combine({"pair": {"score": -1.0, "acc": 0.0, "pred": "x"}, "format": 1.0})
        assert found == {"pair": -1.0, "pair/acc": 0.0, "pair/pred": "x", "format": 1.0}
        assert registry.entries("pair,format") == ["pair", "pair/acc", "format"]
        assert registry.entries("pair") == ["score", "acc"]
        assert registry.entries("format") == []
    finally:
        registry._rules.pop("pair")
