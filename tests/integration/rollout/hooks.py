"""Reward hooks for the tests, as users write them: good ones and bad ones."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

from miles.utils.types import Sample


async def length(args, sample: Sample, **kwargs):
    await asyncio.sleep(0.2)
    return len(sample.response) / args.rollout_temperature


def sync(args, sample):
    print("a print of a hook must not break anything")
    sys.stdout.write("nor may this\n")
    os.write(1, b"nor this\n")
    assert sys.stdin.read() == ""
    sample.metadata["seen"] = sample.label
    sample.metadata["nested"]["deep"].append(3)
    return {"score": 1, "by": "sync"}


async def group(args, samples, **kwargs):
    return [len(samples) + s.index for s in samples]


async def short_group(args, samples):
    return [1.0]


def by_response(args, sample):
    """Does what the response says."""
    return _obey(sample)


async def by_response_async(args, sample):
    await asyncio.sleep(0.01)
    if sample.response == "wait":
        await asyncio.sleep(60)
    return _obey(sample)


def _obey(sample):
    match sample.response:
        case "block":
            time.sleep(60)
        case "raise":
            raise ValueError("cannot grade this")
        case "exit":
            os._exit(3)
        case "compute":
            return 9**9**9**9 > 0
        case "none":
            return None
        case "nan":
            return float("nan")
        case "rewrite":
            sample.tokens.append(1)
        case "child":
            child = subprocess.Popen(["sleep", "300"])
            Path(sample.metadata["pid_file"]).write_text(str(child.pid))
            time.sleep(60)
        case "flaky":
            counter = Path(sample.metadata["counter"])
            tries = int(counter.read_text()) if counter.exists() else 0
            counter.write_text(str(tries + 1))
            if tries < 2:
                raise ConnectionError("judge is busy")
    return 1.0


def keep_some(args, samples, **kwargs):
    """A filter that drops about a third of the groups, by what was generated."""
    return sum(len(sample.tokens) for sample in samples) % 3 != 0
