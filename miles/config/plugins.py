"""`--plugin MODULE_OR_FILE`: modules that register losses, rewards or models, imported in every process."""

from __future__ import annotations

from types import ModuleType

from .groups import Config
from .hooks import load_module


def import_plugins(config: Config) -> tuple[ModuleType, ...]:
    """Imports every --plugin in order; importing one again does nothing. Raises `HookError` naming the plugin."""
    return tuple(load_module(path, flag="--plugin") for path in config.cluster.plugin)
