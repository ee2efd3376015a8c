"""What the machine of the driver offers, found without torch: only what defaults depend on."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Platform:
    """Where the run will be: defaults such as vocabulary padding and rank counts follow from it."""

    device: Literal["cpu", "cuda"] = "cpu"
    num_gpus: int = 0
    """GPUs of this node."""

    @property
    def has_gpu(self) -> bool:
        return self.device == "cuda"


def detect_platform() -> Platform:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves of the node's device files; a node without any is a CPU machine."""
    present = len([p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [part for part in visible.split(",") if part.strip() not in ("", "-1")]
        present = min(present, len(named))
    return Platform("cuda", present) if present else Platform()
