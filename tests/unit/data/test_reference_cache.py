"""Reference log-probs on disk: found by a row's tokens, continued after a stop, refused for other weights."""

import numpy as np
import pytest

from miles.config import make_config
from miles.data import ReferenceCache, check, reference_cache
from miles.errors import DataError
from miles.types import TrainBatch


def batch(*rows):
    """Rows of (tokens, response length)."""
    return TrainBatch(
        rollout_id=0,
        rows={
            "total_lengths": np.array([len(tokens) for tokens, _ in rows], dtype=np.int64),
            "response_lengths": np.array([length for _, length in rows], dtype=np.int64),
        },
        ragged={"tokens": np.concatenate([np.array(tokens) for tokens, _ in rows] or [np.zeros(0)]).astype(np.int64)},
        steps=(),
        totals=(),
    )


A, B, C = ([1, 2, 3], 2), ([1, 2, 3], 1), ([4, 5], 1)


def test_rows_are_found_by_their_tokens_in_any_batch_and_order(tmp_path):
    cache = ReferenceCache(tmp_path / "cache", "model")
    assert cache.is_missing(batch(A))
    cache.keep([batch(A, B), batch(C), batch()], [np.array([-1.0, -2.0, -3.0]), np.array([-4.0]), np.zeros(0)])
    for found in (cache, ReferenceCache(tmp_path / "cache", "model")):
        assert not found.is_missing(batch(C, B, A))
        assert found.attach(batch(C, B, A)).ragged["ref_log_probs"].tolist() == [-4, -3, -1, -2]
        assert found.attach(batch()).ragged["ref_log_probs"].dtype == np.float32
        assert len(found) == 3


def test_a_stopped_run_goes_on_with_the_rows_that_are_missing(tmp_path):
    ReferenceCache(tmp_path, "model").keep([batch(A)], [np.array([-1.0, -2.0])])
    (tmp_path / ".part-000001.7.npz").write_bytes(b"torn")
    again = ReferenceCache(tmp_path, "model")
    assert [again.is_missing(batch(row)) for row in (A, B)] == [False, True]
    again.keep([batch(B)], [np.array([-3.0])])
    assert ReferenceCache(tmp_path, "model").attach(batch(A, B)).ragged["ref_log_probs"].tolist() == [-1, -2, -3]
    with pytest.raises(DataError, match="no reference log-probs for 1 of 2 rows"):
        again.attach(batch(A, C))


def test_other_weights_are_refused_by_name(tmp_path):
    ReferenceCache(tmp_path, "Qwen3-4B (aa)").keep([batch(A)], [np.array([-1.0, -2.0])])
    with pytest.raises(
        DataError, match=r"computed with Qwen3-4B \(aa\), and the reference is Qwen3-4B \(bb\); remove it"
    ):
        ReferenceCache(tmp_path, "Qwen3-4B (bb)")


def test_the_flags_choose_directory_and_weights(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode() * 100_000)

    def config(weights="one", **flags):
        return make_config(
            loss_type="dpo",
            rollout_batch_size=2,
            precompute_ref_log_probs=True,
            ref_load=str(tmp_path / weights),
            **flags,
        )

    assert reference_cache(make_config(loss_type="dpo", rollout_batch_size=2), tmp_path) is None
    cache = reference_cache(config(), tmp_path / "run")
    assert cache.directory == tmp_path / "run" / "ref_log_probs"
    kept = config(ref_log_probs_dir=str(tmp_path / "kept"))
    reference_cache(kept, tmp_path / "run").keep([batch(A)], [np.array([-1.0, -2.0])])
    assert not reference_cache(kept, tmp_path / "other").is_missing(batch(A))
    moved = config("two", ref_log_probs_dir=str(tmp_path / "kept"))
    assert any("--ref-log-probs-dir" in str(problem) and "one (" in str(problem) for problem in check(moved))
    assert not any("--ref-log-probs-dir" in str(problem) for problem in check(kept))
