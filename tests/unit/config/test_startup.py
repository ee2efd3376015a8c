"""`--help` answers at once, since the configuration imports nothing heavy."""

from __future__ import annotations

import resource
import subprocess
import sys

CODE = "import sys; from miles.config import resolve; resolve(['--help'])"
HEAVY = ("torch", "ray", "transformers", "megatron", "numpy", "pyarrow", "aiohttp")


def test_help_answers_within_two_seconds() -> None:
    """Processor time, Python's start included: what it takes when nobody else wants the core (0.5 s where it was written)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert "--rollout-batch-size INT" in done.stdout


def test_importing_the_configuration_is_light() -> None:
    code = f"import sys, miles.config; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
