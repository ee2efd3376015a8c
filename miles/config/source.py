"""Where a value came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Source:
    """`kind` ranks: command line over file over config.json; what none of them gives is derived or a default."""

    kind: Literal["command line", "file", "config.json", "derived", "default"]
    detail: str = ""
    """The file and section, the checkpoint, or what it was derived from."""

    @property
    def explicit(self) -> bool:
        """The user said so."""
        return self.kind in ("command line", "file")

    def __str__(self) -> str:
        if self.kind in ("file", "config.json"):
            return self.detail
        return f"{self.kind} from {self.detail}" if self.detail else self.kind


COMMAND_LINE = Source("command line")
DEFAULT = Source("default")
