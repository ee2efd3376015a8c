"""What a teacher on engines said of the samples, as ragged columns of a `TrainBatch`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles.errors import DataError
from miles.types import Sample


def teacher_columns(samples: Sequence[Sample], positions: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of the rows at `positions` among `samples`, in that order; `R` response tokens of all of them.

    `teacher_log_probs` f32 [R], of the response tokens; `teacher_top_ids` i32 and `teacher_top_log_probs` f32 [R, K], of the
    likeliest tokens, where the teacher was asked for them. Raises DataError where the teacher was not asked.
    """
    if (missing := next((s for s in samples if s.teacher is None and s.response_length), None)) is not None:
        raise DataError(
            f"sample {missing.index}, got no log-probs of the teacher: --teacher-urls was not asked about it; keep the "
            "samples that the rollout made"
        )
    scores = [s.teacher for s in (samples[p] for p in positions.tolist()) if s.teacher is not None]
    num_top = next((s.teacher.top_ids.shape[1] for s in samples if s.teacher is not None), 0)
    columns = {"teacher_log_probs": np.concatenate([np.zeros(0, np.float32), *(s.log_probs for s in scores)])}
    if num_top:
        columns["teacher_top_ids"] = np.concatenate([np.zeros((0, num_top), np.int32), *(s.top_ids for s in scores)])
        nothing = np.zeros((0, num_top), np.float32)
        columns["teacher_top_log_probs"] = np.concatenate([nothing, *(s.top_log_probs for s in scores)])
    return columns
