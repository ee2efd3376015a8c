"""The rollout room: prompts in, scored groups out.

    DataSource --groups--> GroupRollout --samples--> engines --text, tokens, log-probs--> rewards --> filter --> RolloutOutput

`Rollout` is what the cluster builds, or `DatasetRollout` where the answers are there already; `check`, `label_required` and
the `load_...` functions serve the preflight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answers import training_channels
    from .dataset import DatasetRollout, channels_of, load_eval_rows, load_rows
    from .eval_prompts import load_eval_prompts
    from .evaluate import EvalOutput
    from .log_hooks import LogHooks
    from .preflight import check, label_required
    from .rollout import Rollout

__all__ = [
    "DatasetRollout",
    "EvalOutput",
    "LogHooks",
    "Rollout",
    "channels_of",
    "check",
    "label_required",
    "load_eval_prompts",
    "load_eval_rows",
    "load_rows",
    "training_channels",
]

# Reward workers import this package too and must start quickly, so the parts are loaded when they are asked for.
_HOMES = {
    "DatasetRollout": "dataset",
    "Rollout": "rollout",
    "EvalOutput": "evaluate",
    "LogHooks": "log_hooks",
    "check": "preflight",
    "label_required": "preflight",
    "channels_of": "dataset",
    "load_eval_prompts": "eval_prompts",
    "load_eval_rows": "dataset",
    "load_rows": "dataset",
    "training_channels": "answers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
