"""A plugin for tests: a reward of its own, and a mark for each process that imported it."""

import os
from pathlib import Path

from miles.rollout.rewards.registry import register_reward

if directory := os.environ.get("PLUGIN_MARKS"):
    # Ray names a worker after the actor's class that runs in it.
    command = Path("/proc/self/cmdline").read_bytes().replace(b"\0", b" ")
    Path(directory, str(os.getpid())).write_bytes(command)


@register_reward("digits", needs_label=True)
def digits(args, sample, *, response):
    """Share of the label's digits in place."""
    hits = [a == b for a, b in zip(response.strip(), str(sample.label), strict=False)]
    return sum(hits) / len(str(sample.label))
