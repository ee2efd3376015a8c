from __future__ import annotations

import hashlib
import struct

from hypothesis import given
from hypothesis import strategies as st

from miles.config import eval_datasets, make_config
from miles.rollout.sampling import Sampling
from miles.rollout.seeds import sample_seed

ids = st.integers(0, 2**40)


def test_the_seed_is_what_the_docstring_says() -> None:
    packed = struct.pack("<6q", 42, 3, 17, 1, 2, 0) + b"reward"
    digest = hashlib.blake2b(packed, digest_size=8, person=b"miles-sample-v1").digest()
    assert sample_seed(42, 3, 17, 1, 2, 0, stream="reward") == int.from_bytes(digest, "little") // 2


@given(st.lists(ids, min_size=6, max_size=6), st.integers(0, 5))
def test_every_part_matters(integers: list[int], changed: int) -> None:
    other = list(integers)
    other[changed] += 1
    assert 0 <= sample_seed(*integers) < 2**63
    assert sample_seed(*integers) != sample_seed(*other)
    assert sample_seed(*integers) != sample_seed(*integers, stream="reward")


def test_a_rollout_has_no_seed_twice() -> None:
    seeds = {sample_seed(1, r, g, s, a) for r in range(5) for g in range(50) for s in range(8) for a in range(2)}
    assert len(seeds) == 5 * 50 * 8 * 2


def test_params_and_the_context_limit() -> None:
    sampling = Sampling(0.7, 0.9, 20, 100, 128, stop=("x",), stop_token_ids=(5,))
    params = sampling.params(11)
    assert params == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "skip_special_tokens": False,
        "sampling_seed": 11,
        "max_new_tokens": 100,
        "stop": ["x"],
        "stop_token_ids": [5],
    }
    assert sampling.fit(params, 10)["max_new_tokens"] == 100
    assert sampling.fit(params, 100)["max_new_tokens"] == 28
    assert sampling.fit(params, 500)["max_new_tokens"] == 0
    assert Sampling(1, 1, -1, None, 50).fit({}, 20)["max_new_tokens"] == 30
    assert "max_new_tokens" not in Sampling(1, 1, -1, None, None).fit({}, 20)


def test_every_sampling_flag_reaches_the_request() -> None:
    config = make_config(
        rollout_temperature=0.7,
        rollout_top_p=0.9,
        rollout_top_k=20,
        rollout_max_response_len=9,
        rollout_skip_special_tokens=True,
        rollout_stop=["x"],
        rollout_stop_token_ids=[5],
        eval_interval=1,
        eval_prompt_data=["a", "a.jsonl"],
        eval_temperature=0.1,
        eval_top_p=0.5,
        eval_top_k=3,
        eval_max_response_len=4,
        num_rollout=1,
        rollout_batch_size=1,
    )
    train = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "max_new_tokens": 9,
        "skip_special_tokens": True,
        "stop": ["x"],
        "stop_token_ids": [5],
        "sampling_seed": 1,
    }
    assert Sampling.for_training(config).params(1) == train
    (dataset,) = eval_datasets(config)
    changed = {"temperature": 0.1, "top_p": 0.5, "top_k": 3, "max_new_tokens": 4}
    assert Sampling.for_evaluation(config, dataset).params(1) == {**train, **changed}
