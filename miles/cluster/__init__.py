"""The only room that imports ray: placement, trainer group, rollout manager, engines, supervision, and `App`."""

from .app import App
from .command import run

__all__ = ["App", "run"]
