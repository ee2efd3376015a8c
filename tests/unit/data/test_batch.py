"""Groups to train batches: denominators and partitions against a plain reference, and each broken sample by name."""

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest

from miles.config import Config, GrpoArgs, PerfArgs, RolloutArgs
from miles.data import build_train_batches, check_sample
from miles.errors import ConfigError, DataError, HookError
from miles.types import Sample, Status, TrainBatch


def make_sample(group: int, index: int, reward, response=4, prompt=3, **changes) -> Sample:
    sample = Sample(
        group_index=group,
        index=index,
        tokens=list(range(10 * index, 10 * index + prompt + response)),
        response_length=response,
        rollout_log_probs=[-0.5 - i for i in range(response)],
        reward=reward,
        status=Status.COMPLETED,
    )
    return replace(sample, **changes)


def make_groups(seed=0, num_groups=6, n=4, **changes) -> list[list[Sample]]:
    rng = np.random.default_rng(seed)
    return [
        [
            make_sample(
                g, g * n + i, float(rng.integers(0, 2)), int(rng.integers(1, 9)), int(rng.integers(1, 5)), **changes
            )
            for i in range(n)
        ]
        for g in range(num_groups)
    ]


def make_config(global_batch_size=None, micro_batch_size=3, grpo=None, perf=None, **rollout) -> Config:
    return Config(
        rollout=RolloutArgs(global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, **rollout),
        grpo=GrpoArgs(**(grpo or {})),
        perf=PerfArgs(**(perf or {})),
    )


def build(groups, config=None, dp_size=1, **options):
    return build_train_batches(groups, config=config or make_config(), rollout_id=7, dp_size=dp_size, **options)


def row_dicts(batch: TrainBatch) -> list[dict]:
    """Rows of one rank with their ragged parts, step and micro-batch."""
    tokens = np.split(batch.ragged["tokens"], np.cumsum(batch.rows["total_lengths"])[:-1])
    bounds = np.cumsum(batch.rows["response_lengths"])[:-1]
    place = {int(i): s for s, step in enumerate(batch.steps) for micro in step for i in micro}
    assert sorted(place) == list(range(batch.num_rows))
    rows = []
    for i in range(batch.num_rows):
        row = {name: column[i].item() for name, column in batch.rows.items()}
        row |= {"tokens": tokens[i].tolist(), "step": place[i]}
        row |= {name: np.split(column, bounds)[i].tolist() for name, column in batch.ragged.items() if name != "tokens"}
        rows.append(row)
    return rows


def union(built) -> list[dict]:
    return sorted((r for b in built.batches for r in row_dicts(b)), key=lambda r: (r["sample_index"], r["tokens"]))


def test_columns():
    groups = [[make_sample(0, 0, 1.0, temperature=0.7), make_sample(0, 1, 0.0, response=2, temperature=0.0)]]
    (batch,) = build(groups).batches
    assert batch.rollout_id == 7
    assert {n: (c.dtype.str[1:], c.tolist()) for n, c in batch.rows.items() if n not in ("rewards", "temperature")} == {
        "total_lengths": ("i8", [7, 5]),
        "response_lengths": ("i8", [4, 2]),
        "raw_rewards": ("f4", [1.0, 0.0]),
        "loss_weight": ("f4", [0.125, 0.25]),
        "sample_index": ("i8", [0, 1]),
        "trajectory_id": ("i8", [0, 1]),
        "group_index": ("i8", [0, 0]),
        "position": ("i8", [0, 1]),
    }
    np.testing.assert_allclose(batch.rows["rewards"], np.array([0.5, -0.5]) / (math.sqrt(0.5) + 1e-6), rtol=1e-6)
    np.testing.assert_allclose(batch.rows["temperature"], [0.7, 1.0])
    assert {n: (c.dtype.str[1:], c.tolist()) for n, c in batch.ragged.items()} == {
        "tokens": ("i8", [*range(7), *range(10, 15)]),
        "loss_mask": ("u1", [1] * 6),
        "rollout_log_probs": ("f4", [-0.5, -1.5, -2.5, -3.5, -0.5, -1.5]),
    }
    assert [[m.tolist() for m in step] for step in batch.steps] == [[[0, 1]]]
    assert dataclasses.asdict(batch.totals[0]) == {
        "num_trajectories": 2,
        "num_tokens": 6,
        "num_rows": 2,
        "num_skipped_rows": 0,
    }


PLANS = {
    "in order": {},
    "balanced": {"balance_data": True},
    "dynamic": {"perf": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 25}},
    "balanced and dynamic": {
        "perf": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 25},
        "balance_data": True,
    },
    "one row a micro-batch": {"micro_batch_size": 1},
}


@pytest.mark.parametrize(("balance", "tokens"), [(False, [40, 20]), (True, [30, 30])])
def test_balance_data_evens_out_the_tokens_of_ranks(balance: bool, tokens: list[int]):
    groups = [[make_sample(0, i, float(i % 2), prompt=n - 4, response=4) for i, n in enumerate((20, 20, 10, 10))]]
    built = build(groups, make_config(4, balance_data=balance), dp_size=2)
    assert [int(batch.rows["total_lengths"].sum()) for batch in built.batches] == tokens


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("dp_size", [1, 2, 3, 30])
@pytest.mark.parametrize("aggregation", ["seq_mean", "token_mean", "constant"])
def test_no_split_changes_a_row_its_weight_or_its_step(plan, dp_size, aggregation):
    grpo = {"loss_aggregation": aggregation, "loss_constant_length": 8}
    whole = build(make_groups(), make_config(8, 99, grpo))
    split = build(make_groups(), make_config(8, grpo=grpo, **plan), dp_size)
    assert len(split.batches) == dp_size
    assert union(split) == union(whole)
    assert split.metrics == whole.metrics
    assert {b.totals for b in split.batches} == {whole.batches[0].totals}
    assert len({tuple(len(step) for step in b.steps) for b in split.batches}) == 1
    for batch in split.batches:  # columns have the same names and types on a rank without rows
        assert {n: c.dtype for n, c in batch.rows.items()} == {n: c.dtype for n, c in whole.batches[0].rows.items()}
        assert {n: c.dtype for n, c in batch.ragged.items()} == {n: c.dtype for n, c in whole.batches[0].ragged.items()}


def test_the_plain_sum_is_the_mean_of_sequence_means_of_each_step():
    groups = make_groups()
    built = build(groups, make_config(8), dp_size=2, score_all=True)
    flat = [s for g in groups for s in g]
    for step in range(3):
        mine = flat[8 * step : 8 * step + 8]
        loss_of = {s.index: np.sin(np.arange(s.response_length) + s.index) for s in mine}
        got = sum(r["loss_weight"] * loss_of[r["sample_index"]].sum() for r in union(built) if r["step"] == step)
        assert got == pytest.approx(np.mean([loss.mean() for loss in loss_of.values()]), rel=1e-6)


def test_order_of_groups_decides_steps_and_nothing_else():
    groups = make_groups()
    one, other = union(build(groups)), union(build(groups[::-1]))
    assert [{**row, "position": None} for row in one] == [{**row, "position": None} for row in other]
    steps = {r["group_index"]: r["step"] for r in union(build(groups[::-1], make_config(12), score_all=True))}
    assert steps == {5: 0, 4: 0, 3: 0, 2: 1, 1: 1, 0: 1}


def with_reward(groups, number, reward):
    return [[replace(s, reward=reward) for s in g] if i == number else g for i, g in enumerate(groups)]


def test_rows_of_zero_advantage_are_skipped_and_still_counted():
    groups = [
        [make_sample(0, 0, 1.0), make_sample(0, 1, 0.0)],
        [make_sample(1, 2, 0.7), make_sample(1, 3, 0.7)],
    ]
    skipped, scored = build(groups), build(groups, score_all=True)
    assert [r["sample_index"] for r in union(skipped)] == [0, 1]
    assert [r["sample_index"] for r in union(scored)] == [0, 1, 2, 3]
    assert union(skipped) == union(scored)[:2]
    (totals,) = skipped.batches[0].totals
    assert (totals.num_trajectories, totals.num_tokens, totals.num_rows, totals.num_skipped_rows) == (4, 16, 4, 2)
    assert skipped.metrics["rollout/rows_skipped"] == 2
    assert scored.metrics["rollout/rows_skipped"] == 0
    assert skipped.metrics["rollout/zero_std_ratio"] == 0.5


@pytest.mark.parametrize(
    "grpo",
    [
        *({"use_kl_loss": True}, {"entropy_coef": 0.01}, {"kl_coef": 0.1}, {"normalize_advantages": True}),
        *({"entropy_quantile": 0.5}, {"loss_type": "custom_loss"}, {"policy_loss": "of_a_plugin"}),
    ],
)
def test_no_row_is_skipped_where_another_term_applies(grpo):
    groups = [[make_sample(0, 0, 1.0), make_sample(0, 1, 1.0)]]
    assert len(union(build(groups, make_config(grpo=grpo)))) == 2
    assert len(union(build(groups))) == 0


def test_all_rows_skipped_still_makes_every_step():
    built = build(with_reward(make_groups(num_groups=2), 0, 1.0), make_config(4), dp_size=2)
    for batch in built.batches:
        assert len(batch.steps) == 2
        assert [m.tolist() for m in batch.steps[0]] == [[]]
    everything = build(with_reward(with_reward(make_groups(num_groups=2), 0, 1.0), 1, 0.0), dp_size=2)
    assert all(b.num_rows == 0 and len(b.steps) == 1 for b in everything.batches)


def test_failed_and_removed_samples():
    groups = [
        [
            make_sample(0, 0, 1.0),
            make_sample(0, 1, 0.0),
            make_sample(0, 2, 0.0, remove_sample=True),
            Sample(group_index=0, index=3, status=Status.FAILED, error="boom"),
        ]
    ]
    built = build(groups)
    rows = union(built)
    assert [r["sample_index"] for r in rows] == [0, 1]
    # the removed one is in the group's statistics, the failed one is not: mean 1/3, std sqrt(1/3)
    assert rows[0]["rewards"] == pytest.approx((2 / 3) / (math.sqrt(1 / 3) + 1e-6), rel=1e-6)
    assert [r["loss_weight"] for r in rows] == [1 / 8, 1 / 8]
    metrics = built.metrics
    assert metrics["rollout/failed_ratio"] == 0.25
    assert metrics["rollout/raw_reward"] == pytest.approx(1 / 3)
    assert metrics["rollout/rows_out_of_loss"] == 2
    (totals,) = built.batches[0].totals
    assert (totals.num_trajectories, totals.num_rows, totals.num_tokens) == (2, 2, 8)


def test_failed_samples_do_not_shift_the_steps_of_others():
    groups = make_groups(num_groups=2)
    groups[0][1] = Sample(group_index=0, index=1, status=Status.FAILED)
    steps = {r["sample_index"]: r["step"] for r in union(build(groups, make_config(4), score_all=True))}
    assert steps == {0: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1, 7: 1}


def test_everything_failed():
    groups = [[Sample(group_index=0, index=i, status=Status.FAILED) for i in range(2)]]
    built = build(groups, dp_size=2)
    assert all(b.num_rows == 0 for b in built.batches)
    assert built.metrics["rollout/failed_ratio"] == 1
    assert "rollout/raw_reward" not in built.metrics


def test_fully_masked_rows_are_out_of_every_denominator():
    groups = make_groups(num_groups=1)
    masked = replace(groups[0][0], loss_mask=[0] * groups[0][0].response_length)
    empty = make_sample(0, 1, groups[0][1].reward, response=0)
    rows = union(build([[masked, empty, *groups[0][2:]]], score_all=True))
    assert [r["sample_index"] for r in rows] == [2, 3]
    for row in rows:
        assert row["loss_weight"] == pytest.approx(1 / (2 * row["response_lengths"]))


def test_rows_of_one_trajectory_count_once():
    """Trajectory 0 in two rows of 4 and 2 trained tokens; its reward is that of its last row."""
    groups = [
        [
            make_sample(0, 0, 0.0, response=4, trajectory_id=0),
            make_sample(0, 0, 1.0, response=3, trajectory_id=0, loss_mask=[1, 0, 1]),
            make_sample(0, 1, 0.0, response=4),
        ],
        [make_sample(1, 2, 1.0), make_sample(1, 3, 0.0)],
    ]
    built = build(groups, make_config(2))
    rows = union(built)
    assert [(r["step"], r["trajectory_id"]) for r in rows] == [(0, 0), (0, 0), (0, 1), (1, 2), (1, 3)]
    assert sorted(r["loss_weight"] for r in rows[:2]) == pytest.approx([1 / 12] * 2)
    assert rows[2]["loss_weight"] == pytest.approx(1 / 8)
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert [r["rewards"] for r in rows] == pytest.approx([expected, expected, -expected, expected, -expected])
    assert [r["raw_rewards"] for r in rows] == [1, 1, 0, 1, 0]
    assert [t.num_trajectories for t in built.batches[0].totals] == [2, 2]
    assert built.metrics["rollout/raw_reward"] == 0.5
    assert built.metrics["rollout/response_len/max"] == 7


def test_a_trajectory_with_a_failed_row_is_out():
    groups = [
        [
            make_sample(0, 0, 0.3, trajectory_id=0),
            make_sample(0, 0, None, trajectory_id=0, status=Status.FAILED),
            make_sample(0, 1, 1.0),
            make_sample(0, 2, 0.0),
        ]
    ]
    built = build(groups)
    assert [r["sample_index"] for r in union(built)] == [1, 2]
    assert built.metrics["rollout/failed_ratio"] == pytest.approx(1 / 3)


def test_normalisation_switches():
    groups = [[make_sample(0, 0, 3.0), make_sample(0, 1, 1.0)]]
    centred = union(build(groups, make_config(grpo={"disable_grpo_std_normalization": True})))
    assert [r["rewards"] for r in centred] == [1, -1]
    raw = union(build(groups, make_config(grpo={"disable_rewards_normalization": True})))
    assert [r["rewards"] for r in raw] == [3, 1]


def test_aggregation_switches():
    groups = [[make_sample(0, 0, 1.0, response=1), make_sample(0, 1, 0.0, response=3)]]

    def weights(**grpo):
        return [r["loss_weight"] for r in union(build(groups, make_config(grpo=grpo, rollout_max_response_len=16)))]

    assert weights() == pytest.approx([1 / 2, 1 / 6])
    assert weights(calculate_per_token_loss=True) == weights(loss_aggregation="token_mean") == [1 / 4] * 2
    assert weights(loss_aggregation="constant", loss_constant_length=4) == [1 / 8] * 2
    assert weights(loss_aggregation="constant") == [1 / 32] * 2


def test_reward_key():
    groups = [[make_sample(0, 0, {"acc": 1.0, "len": 9}), make_sample(0, 1, {"acc": 0.0, "len": 9})]]
    assert [r["raw_rewards"] for r in union(build(groups, make_config(reward_key="acc")))] == [1, 0]
    with pytest.raises(DataError, match=r"reward of sample 0.*--reward-key"):
        build(groups)


WEIGHTS = {"acc": 1.0, "short": 0.5}


def test_several_rewards_count_by_weight():
    groups = [[make_sample(0, 0, {"acc": 1.0, "short": 2.0, "x": 9}), make_sample(0, 1, {"acc": 0.0, "short": 4.0})]]
    built = build(groups, make_config(reward_weights=WEIGHTS, grpo={"disable_grpo_std_normalization": True}))
    assert built.metrics["rollout/raw_reward"] == 2.0
    assert (built.metrics["rollout/reward/acc"], built.metrics["rollout/reward/short"]) == (0.5, 3.0)
    assert len(union(built)) == 0  # 1 + 2/2 is 0 + 4/2: the sum tells nothing
    gdpo = build(groups, make_config(reward_weights={"acc": 1.0, "short": 0.25}, grpo={"advantage_estimator": "gdpo"}))
    one, other = (r["rewards"] for r in union(gdpo))
    assert one == pytest.approx(-other, rel=1e-5)
    assert one > 0


@pytest.mark.parametrize(
    ("reward", "why"),
    [
        (1.0, "--reward-weights names entries of a dict"),
        ({"acc": 1.0}, "names 'short'"),
        ({"acc": 1.0, "short": None}, "got None in 'short'"),
        ({"acc": math.inf, "short": 0.0}, "got inf"),
    ],
)
def test_a_reward_that_lacks_a_part(reward, why):
    with pytest.raises(DataError, match=f"reward of sample 0, .*{why}"):
        build([[make_sample(0, 0, reward)]], make_config(reward_weights=WEIGHTS))


def test_remax_takes_the_greedy_reward_of_the_metadata():
    groups = [[make_sample(0, i, r, metadata={"greedy_reward": 0.25}) for i, r in enumerate((1.0, 0.25, 0.0))]]
    built = build(groups, make_config(grpo={"advantage_estimator": "remax"}))
    assert [r["rewards"] for r in union(built)] == [0.75, -0.25]
    assert built.metrics["rollout/greedy_reward"] == 0.25
    with pytest.raises(DataError, match="was not scored"):
        build([[make_sample(0, 0, 1.0)]], make_config(grpo={"advantage_estimator": "remax"}))


@pytest.mark.parametrize(
    ("k", "success", "failure"), [(1, math.sqrt(2), -math.sqrt(0.5)), (2, math.sqrt(0.5), -math.sqrt(0.125))]
)
def test_pass_at_k_takes_its_k_from_the_flag(k, success, failure):
    """One success in three: of the pairs two thirds pass, so that a success has less to teach."""
    groups = [[make_sample(0, i, r) for i, r in enumerate((1.0, 0.0, 0.0))]]
    rows = union(build(groups, make_config(grpo={"advantage_estimator": "pass_at_k", "pass_at_k": k})))
    assert [r["rewards"] for r in rows] == pytest.approx([success, failure, failure], rel=1e-5)


def test_an_estimator_says_what_it_is_not_defined_for():
    with pytest.raises(DataError, match="--advantage-estimator maxrl: reward of trajectory 1, got -1"):
        build([[make_sample(0, 0, 1.0), make_sample(0, 1, -1.0)]], make_config(grpo={"advantage_estimator": "maxrl"}))


def test_opo_weights_by_trained_tokens():
    mask = {"loss_mask": [1, 0, 0, 0]}
    groups = [[make_sample(0, 0, 1.0, response=4, **mask), make_sample(0, 1, 0.0, response=3)]]
    rows = union(build(groups, make_config(grpo={"advantage_estimator": "opo"})))
    assert [r["rewards"] for r in rows] == [0.75, -0.25]


def test_overlong_filtering_leaves_truncated_answers_in_the_statistics():
    groups = [[make_sample(0, 0, 1.0), make_sample(0, 1, 0.0), make_sample(0, 2, 0.0, status=Status.TRUNCATED)]]
    switches = {"disable_grpo_std_normalization": True}
    rows = union(build(groups, make_config(grpo={"overlong_filtering": True, **switches})))
    assert [r["rewards"] for r in rows] == pytest.approx([2 / 3, -1 / 3])
    assert [r["loss_weight"] for r in rows] == [1 / 8, 1 / 8]
    assert len(union(build(groups, make_config(grpo=switches)))) == 3


@pytest.mark.parametrize("reward", [None, math.nan, math.inf, "good", [1.0]])
def test_reward_that_is_no_number(reward):
    with pytest.raises(DataError, match="reward of sample 1, got"):
        build([[make_sample(0, 0, 1.0), make_sample(0, 1, reward)]])


class TestPostProcessHook:
    groups = make_groups(num_groups=2, n=2)

    def test_replaces_normalisation(self):
        seen = []

        def hook(args, samples):
            seen.append((args.rollout_batch_size, args.eps_clip))
            return [10.0 * s.index for s in samples], [s.index + 0.5 for s in samples]

        built = build(self.groups, reward_post_process=hook)
        assert [r["rewards"] for r in union(built)] == [0.5, 1.5, 2.5, 3.5]
        assert [r["raw_rewards"] for r in union(built)] == [0, 10, 20, 30]
        assert built.metrics["rollout/raw_reward"] == 15
        assert seen == [(None, 0.2)]

    @pytest.mark.parametrize(
        "result", [None, [1.0], ([1.0], [1.0]), ([1.0] * 4, [1.0] * 3), ([math.nan] * 4, [0.0] * 4), ("ab", "cd")]
    )
    def test_wrong_result_is_named(self, result):
        with pytest.raises(HookError, match="reward post-processing hook, got"):
            build(self.groups, reward_post_process=lambda args, samples: result)


class TestRolloutLogProbs:
    def groups(self, lacking=(0,)):
        """The first sample is not the one that decides."""
        groups = make_groups(num_groups=2)
        for i in lacking:
            groups[1][i] = replace(groups[1][i], rollout_log_probs=None)
        return groups

    @pytest.mark.parametrize("flag", ["use_tis", "use_rollout_logprobs"])
    def test_needed_and_missing_in_some(self, flag):
        with pytest.raises(DataError, match=f"1 of 8 rows, first of sample 5: --{flag.replace('_', '-')}"):
            build(self.groups((1,)), make_config(grpo={flag: True}))

    @pytest.mark.parametrize(
        ("grpo", "flag"),
        [
            ({"off_policy_correction": "icepop"}, "--off-policy-correction icepop"),
            ({"policy_loss": "dppo"}, "--policy-loss dppo"),
        ],
    )
    def test_needed_by_other_flags(self, grpo, flag):
        with pytest.raises(DataError, match=f"1 of 8 rows, first of sample 5: {flag}"):
            build(self.groups((1,)), make_config(grpo=grpo))

    def test_not_needed_and_missing_in_some_is_dropped_on_every_rank(self):
        built = build(self.groups(), dp_size=2, score_all=True)
        assert all("rollout_log_probs" not in b.ragged for b in built.batches)

    def test_present_in_all_is_sent_on_every_rank(self):
        built = build(make_groups(num_groups=1), dp_size=9, score_all=True)
        assert all("rollout_log_probs" in b.ragged for b in built.batches)

    def test_a_failed_or_removed_sample_does_not_decide(self):
        groups = self.groups()
        groups[1][0] = replace(groups[1][0], remove_sample=True)
        built = build(groups, make_config(grpo={"use_tis": True}), score_all=True)
        assert "rollout_log_probs" in built.batches[0].ragged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": Status.PENDING}, "status of sample 3, got pending"),
        ({"status": Status.ABORTED}, "status of sample 3, got aborted"),
        ({"tokens": [1, 2, -3, 4, 5, 6, 7]}, "tokens of sample 3"),
        ({"tokens": [1.5] * 7}, "tokens of sample 3"),
        ({"tokens": [None] * 7}, "tokens of sample 3"),
        ({"response_length": 7}, "response_length of sample 3, got 7 with 7 tokens"),
        ({"response_length": -1}, "response_length of sample 3"),
        ({"tokens": [1, 2]}, "response_length of sample 3, got 4 with 2 tokens"),
        ({"loss_mask": [1, 1, 1]}, "loss_mask of sample 3, got 3 entries: the response has 4 tokens"),
        ({"loss_mask": [1, 1, 2, 0]}, "loss_mask of sample 3.*use 0 and 1"),
        ({"loss_mask": [1, 1, None, 0]}, "loss_mask of sample 3"),
        ({"rollout_log_probs": [-1.0] * 3}, "rollout_log_probs of sample 3, got 3 entries"),
        ({"rollout_log_probs": [-1.0, None, -1.0, -1.0]}, "rollout_log_probs of sample 3"),
        ({"rollout_log_probs": [-1.0, -math.inf, -1.0, -1.0]}, "rollout_log_probs of sample 3.*infinity"),
        ({"temperature": -1.0}, "temperature of sample 3"),
        ({"group_index": None}, "index and group_index of sample 3"),
    ],
)
def test_a_broken_sample_is_named(change, message):
    with pytest.raises(DataError, match=message) as error:
        check_sample(replace(make_sample(0, 3, 1.0), **change))
    assert "\n" not in str(error.value)


def test_what_hooks_may_write():
    row = check_sample(
        make_sample(
            0, 0, 1.0, loss_mask=[True, 1.0, np.int8(0), 0], rollout_log_probs=[-1.0, -2.0, math.nan, -math.inf]
        )
    )
    assert row.loss_mask.tolist() == [1, 1, 0, 0]
    assert row.trained_tokens == 2
    assert check_sample(make_sample(0, 0, 1.0, rollout_log_probs=[])).rollout_log_probs is None


def test_steps_must_come_out_even():
    with pytest.raises(DataError, match=r"got 24 trajectories.*--global-batch-size 16"):
        build(make_groups(), make_config(16))
    with pytest.raises(DataError, match="got 0 trajectories"):
        build([])


def test_a_trajectory_in_two_groups_is_refused():
    groups = [[make_sample(0, 0, 1.0, trajectory_id=9)], [make_sample(1, 1, 0.0, trajectory_id=9)]]
    with pytest.raises(DataError, match="trajectory_id of sample 1, got 9 in two groups"):
        build(groups)


def test_dynamic_batches_need_a_budget():
    with pytest.raises(ConfigError, match="--max-tokens-per-gpu"):
        build(make_groups(), make_config(perf={"use_dynamic_batch_size": True}))


def test_metrics_worked_by_hand():
    groups = [
        [make_sample(0, 0, 1.0, response=2, prompt=1), make_sample(0, 1, 0.0, response=4, status=Status.TRUNCATED)],
        [make_sample(1, 2, 1.0, response=6), make_sample(1, 3, 1.0, response=8)],
    ]
    assert build(groups).metrics == pytest.approx(
        {
            "rollout/raw_reward": 0.75,
            # Residuals of the groups: -0.5 and 0.5; their variance over 4 samples: 2 / 1 * 0.5 / 16 = 0.25 ** 2.
            "rollout/raw_reward/ci_low": 0.75 - 1.959964 * 0.25,
            "rollout/raw_reward/ci_high": 0.75 + 1.959964 * 0.25,
            "rollout/reward_std": math.sqrt(3) / 4,
            "rollout/response_len/mean": 5,
            "rollout/response_len/max": 8,
            "rollout/response_len/min": 2,
            "rollout/truncated_ratio": 0.25,
            "rollout/zero_std_ratio": 0.5,
            "rollout/failed_ratio": 0,
            "rollout/total_tokens": 20 + 10,
            "rollout/trained_tokens": 20,
            "rollout/rows": 4,
            "rollout/rows_skipped": 2,
            "rollout/rows_out_of_loss": 0,
        }
    )
