"""Log-probs of the reference, computed once for every row of a data set and kept in a directory.

    TrainBatch --missing?--> rows to score --trainers, with the reference--> keep --> part files
    TrainBatch --attach--> the same with the ragged column ref_log_probs

A row is found by its tokens, so other data, another order or another tokenizer can never be given the values of these: their
rows are missing, and are computed. The weights cannot be seen in a row: the directory says which ones it was computed with, and
is refused where they are others. Parts are written whole or not at all, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from miles.config import Config, Problem
from miles.errors import DataError
from miles.types import TrainBatch

_HEADER = "reference.json"
#: Of each file of weights so many pieces of so many bytes, spread evenly, are looked at: all weights of a model change together.
_PIECES, _PIECE_BYTES = 64, 65536


class ReferenceCache:
    """One directory of reference log-probs, held in memory. Raises DataError where it belongs to other weights."""

    def __init__(self, directory: Path, model: str):
        self.directory, self._model = directory, model
        if (problem := stale_cache(directory, model)) is not None:
            raise DataError(str(problem))
        self._found: dict[bytes, np.ndarray] = {}
        for path in sorted(directory.glob("part-*.npz")):
            with np.load(path, allow_pickle=False) as part:
                values = np.split(part["values"], np.cumsum(part["lengths"])[:-1])
                self._found |= zip((key.tobytes() for key in part["keys"]), values, strict=True)

    def __len__(self) -> int:
        return len(self._found)

    def is_missing(self, batch: TrainBatch) -> bool:
        """Whether a row of the batch is not there yet."""
        return any(key not in self._found for key, _ in _rows(batch))

    def keep(self, batches: Sequence[TrainBatch], log_probs: Sequence[np.ndarray]) -> None:
        """Writes a part: `log_probs[i]` are those of the response tokens of `batches[i]`, in its order. float32."""
        new: dict[bytes, np.ndarray] = {}
        for batch, values in zip(batches, log_probs, strict=True):
            new |= {key: values[where] for key, where in _rows(batch)}
        if not new:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        header = self.directory / _HEADER
        if not header.exists():
            _write(header, json.dumps({"model": self._model}).encode())
        number = len(list(self.directory.glob("part-*.npz")))
        temporary = self.directory / f".part-{number:06d}.{os.getpid()}.npz"
        np.savez(
            temporary,
            keys=np.frombuffer(b"".join(new), dtype=np.uint8).reshape(len(new), -1),
            lengths=np.array([len(values) for values in new.values()], dtype=np.int64),
            values=np.concatenate(list(new.values())).astype(np.float32),
        )
        temporary.replace(self.directory / f"part-{number:06d}.npz")
        self._found |= new

    def attach(self, batch: TrainBatch) -> TrainBatch:
        """The batch with `ref_log_probs`. Raises DataError for a row that was never scored."""
        found = [self._found.get(key) for key, _ in _rows(batch)]
        values = [row for row in found if row is not None]
        if len(values) < len(found):
            raise DataError(
                f"{self.directory}, got no reference log-probs for {len(found) - len(values)} of {len(found)} rows: they were "
                "not in the data at launch; leave --precompute-ref-log-probs out"
            )
        column = np.concatenate([np.zeros(0, np.float32), *values])
        return dataclasses.replace(batch, ragged={**batch.ragged, "ref_log_probs": column})


def reference_cache(config: Config, run_dir: Path) -> ReferenceCache | None:
    """That of a run with --precompute-ref-log-probs."""
    if not config.preference.precompute_ref_log_probs:
        return None
    given = config.preference.ref_log_probs_dir
    return ReferenceCache(Path(given) if given else run_dir / "ref_log_probs", model_of(config))


def stale_cache(directory: Path, model: str) -> Problem | None:
    """What is wrong with a directory that was computed with other weights."""
    header = directory / _HEADER
    if not header.is_file():
        return None
    made_with = json.loads(header.read_text())["model"]
    if made_with == model:
        return None
    why = f"it was computed with {made_with}, and the reference is {model}"
    return Problem("--ref-log-probs-dir", directory, why, "remove it, or name another directory")


def model_of(config: Config) -> str:
    """Name and digest of the weights that the reference has."""
    path = Path(config.ckpt.ref_load or config.ckpt.hf_checkpoint or "")
    digest = xxhash.xxh3_64()
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix in (".safetensors", ".bin", ".pt", ".json"):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path)} {size}\n".encode())
            with file.open("rb") as weights:
                for start in np.linspace(0, max(size - _PIECE_BYTES, 0), _PIECES, dtype=np.int64).tolist():
                    weights.seek(start)
                    digest.update(weights.read(_PIECE_BYTES))
    return f"{path.name} ({digest.hexdigest()})"


def _rows(batch: TrainBatch) -> Iterator[tuple[bytes, slice]]:
    """Key of each row, made of its tokens and of which of them are the response, and where its response tokens are."""
    token = response = 0
    totals, responses = batch.rows["total_lengths"].tolist(), batch.rows["response_lengths"].tolist()
    for total, length in zip(totals, responses, strict=True):
        tokens = np.ascontiguousarray(batch.ragged["tokens"][token : token + total], dtype=np.int64)
        yield (
            xxhash.xxh3_128(tokens.tobytes() + length.to_bytes(8, "little")).digest(),
            slice(response, response + length),
        )
        token, response = token + total, response + length


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)
