"""Rollout samples on disk: one JSON object a line, to look at, to replay and to compare.

Written to a temporary name and renamed, so a reader never finds half a rollout.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import orjson

from miles.errors import DataError
from miles.types import Sample, SampleGroup


def save_rollout_samples(path: str | Path, groups: Iterable[Sequence[Sample]]) -> None:
    """Writes every sample of `groups` in order, creating the folder. Numpy arrays become lists."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for group in groups:
                for sample in group:
                    file.write(_dump(sample) + b"\n")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_rollout_samples(path: str | Path) -> list[SampleGroup]:
    """Reads such a file; consecutive samples of one `group_index` are a group.

    Raises DataError where the file is missing or empty, or with its line where one is no sample.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"rollout samples, got {str(path)!r}: no such file; write it with --save-debug-rollout-data")
    samples: list[Sample] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                # The standard library's parser keeps integers of any size exact.
                samples.append(Sample.from_dict(json.loads(line)))
            except (ValueError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{path}:{number}, got a line that is no sample ({error}); write the file again"
                ) from error
    if not samples:
        raise DataError(f"rollout samples, got {str(path)!r}: the file is empty; write it again")
    return [list(group) for _, group in groupby(samples, key=lambda sample: sample.group_index)]


def _dump(sample: Sample) -> bytes:
    data = sample.to_dict()
    try:
        return orjson.dumps(data, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    except TypeError:
        # Integers beyond 64 bits are JSON, and orjson refuses them.
        return json.dumps(data, default=_plain).encode()


def _plain(value: Any) -> Any:
    """What hooks leave in metadata: arrays and scalars with `tolist` as numbers, anything else as its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
