"""Real SGLang servers as rollout engines: started by `launch_sglang`; what asks them is the client of the embedded engine,
which speaks the same protocol."""

from .launch import launch_sglang
from .server_args import Verdict, ask

__all__ = ["Verdict", "ask", "launch_sglang"]
