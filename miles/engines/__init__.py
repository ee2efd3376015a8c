"""Rollout engines: servers that speak SGLang's HTTP protocol, how they are started, and the clients that talk to them.

launch_embedded --> embedded/ (a process) <--HTTP-- EngineClient <-- EnginePool <-- rollout
                                                         ^---------- weights.publish <-- trainers

Importing the package imports none of them: the embedded engine starts through it and must be quick.
"""

from .requirements import check

__all__ = ["check"]
