"""What a tracker's worker remembers from one process to the next."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import orjson

from miles.observe.run_dir import write_atomic


@dataclass(frozen=True)
class TrackerState:
    """`trackers/<name>.json` of a run directory."""

    run_id: str | None = None
    step: int = 0
    """Of earlier steps the tracker took every line,"""
    lines: int = 0
    """of this one so many: metrics.jsonl has a second line for a step with a checkpoint."""

    @property
    def delivered(self) -> int:
        """The last step of which the tracker took something; -1 before the first."""
        return self.step if self.lines else self.step - 1

    @classmethod
    def read(cls, run_dir: Path, name: str) -> TrackerState:
        """The state, or that of a new run where there is none that can be read."""
        try:
            document = orjson.loads(_path(run_dir, name).read_bytes())
            return cls(document["run_id"], int(document["step"]), int(document["lines"]))
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            return cls()

    def write(self, run_dir: Path, name: str) -> None:
        path = _path(run_dir, name)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, orjson.dumps(dataclasses.asdict(self)) + b"\n")


def _path(run_dir: Path, name: str) -> Path:
    return run_dir / "trackers" / f"{name}.json"
