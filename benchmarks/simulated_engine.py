"""An engine that takes a fixed time: a custom generation function for async_overlap.py, which says so in the environment.

Every answer of a rollout comes MILES_SIMULATED_S seconds after it was asked for, and has MILES_SIMULATED_TOKENS tokens; nothing is
computed meanwhile, as on a machine whose engines have devices of their own.
"""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

from miles.rollout.context import current
from miles.types import Sample

SECONDS = float(os.environ["MILES_SIMULATED_S"])
TOKENS = int(os.environ["MILES_SIMULATED_TOKENS"])


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """The sample with random tokens and their log-probs of a uniform policy."""
    tokenizer = current().tokenizer
    await asyncio.sleep(SECONDS)
    draw = random.Random(sample.index)
    made = [draw.randrange(4, 40) for _ in range(TOKENS)]
    sample.tokens = tokenizer.encode(sample.prompt, add_special_tokens=False) + made
    sample.response, sample.response_length = tokenizer.decode(made), TOKENS
    sample.rollout_log_probs = [-4.0] * TOKENS
    sample.status = Sample.Status.COMPLETED
    return sample
