"""Rows of a prompt file: JSON lines or parquet, whole or a slice.

    "math.jsonl@[1000:-500]" --read_rows--> Row(line, values), Row(line, values), ...

A slice counts rows with Python's semantics; rows outside it are not parsed. Blank lines of a JSONL file are no rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from miles.errors import DataError

_SLICE = re.compile(r"^(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]$")


@dataclass(frozen=True, slots=True)
class Row:
    """One parsed row; `line` is its line (JSONL) or row number (parquet) in the file, from 1."""

    line: int
    values: dict[str, Any]


def split_slice(spec: str) -> tuple[Path, slice]:
    """`path@[a:b]` as path and slice; a plain path takes all rows. DataError for a slice that cannot be read."""
    match = _SLICE.match(spec)
    if match:
        try:
            start, stop = (int(match[key]) if match[key] else None for key in ("start", "stop"))
        except ValueError:  # a lone "-"
            pass
        else:
            return Path(match["path"]), slice(start, stop)
    elif "@[" not in spec:
        return Path(spec), slice(None)
    raise DataError(f"prompt data, got {spec!r}: the slice cannot be read; write path@[start:stop] with whole numbers")


def read_rows(spec: str) -> Iterator[Row]:
    """Rows of the file or slice, in order.

    Raises DataError where the file is missing or of an unknown kind, and with file, line and reason for a row that cannot
    be parsed.
    """
    path, rows = split_slice(spec)
    if not path.is_file():
        raise DataError(
            f"prompt data, got {spec!r}: no such file; check the path (slices are written path@[start:stop])"
        )
    if path.suffix not in _READERS:
        raise DataError(f"prompt data, got {spec!r}: unknown kind of file; use {' or '.join(PROMPT_FILE_KINDS)}")
    return _READERS[path.suffix](path, rows)


def _read_jsonl(path: Path, rows: slice) -> Iterator[Row]:
    with path.open("rb") as file:
        lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    for number, line in lines[rows]:
        try:
            # The standard library's parser keeps integers of any size exact, which labels rely on.
            values = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
            raise DataError(
                f"{path}:{number}, got {_shown(line)}: not valid JSON ({error}); mend or drop the line"
            ) from error
        if not isinstance(values, dict):
            raise DataError(
                f"{path}:{number}, got {_shown(line)}: a row must be a JSON object, one a line; wrap it in {{...}}"
            )
        yield Row(number, values)


def _read_parquet(path: Path, rows: slice) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        start, stop, _ = rows.indices(file.metadata.num_rows)
        number = 0
        for batch in file.iter_batches(batch_size=4096):
            first, last = max(start - number, 0), min(stop - number, batch.num_rows)
            if first < last:
                for offset, values in enumerate(batch.slice(first, last - first).to_pylist()):
                    yield Row(number + first + offset + 1, {k: _without_gaps(v) for k, v in values.items()})
            number += batch.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is no UTF-8
        raise DataError(f"{path}, got an unreadable parquet file: {_one_line(error)}; write it again") from error


def _without_gaps(value: Any) -> Any:
    """Parquet gives every object the union of all objects' fields, with None for those it did not have."""
    if isinstance(value, dict):
        return {k: _without_gaps(v) for k, v in value.items() if v is not None}
    return [_without_gaps(item) for item in value] if isinstance(value, list) else value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _shown(line: bytes, limit: int = 60) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= limit else text[:limit] + "...")


_READERS: dict[str, Callable[[Path, slice], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}

#: Suffixes that `read_rows` knows.
PROMPT_FILE_KINDS = tuple(_READERS)
