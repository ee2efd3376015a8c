"""One seed per request, from what the request is: the heart of reproducible rollouts.

The seed depends on nothing that timing could change (no clock, no counter, no order of arrival), so a run that is
repeated or resumed draws the same numbers for the same sample.
"""

from __future__ import annotations

import hashlib
import struct


def sample_seed(
    seed: int,
    rollout_id: int,
    group_index: int,
    sample_index: int,
    turn: int = 0,
    attempt: int = 0,
    *,
    stream: str = "",
) -> int:
    """63-bit seed = first 8 bytes of BLAKE2b over the six integers (little-endian int64) and `stream`, shifted by one.

    Args:
        seed: the run's --rollout-seed.
        rollout_id: which rollout, or which evaluation, asks.
        group_index: the prompt group; in an evaluation, the prompt's number in its data set.
        sample_index: position in the group, 0 .. n_samples_per_prompt - 1.
        turn: the how-manieth generation of this trajectory.
        attempt: how often the group was begun anew in this rollout, after an abort or a failure.
        stream: keeps uses apart that share the integers: "" samples training text, "reward" draws random rewards,
            "eval/<name>" samples an evaluation.

    63 bits, not 64: engines keep the seed in a signed int64.
    """
    packed = struct.pack("<6q", seed, rollout_id, group_index, sample_index, turn, attempt)
    digest = hashlib.blake2b(packed + stream.encode(), digest_size=8, person=b"miles-sample-v1").digest()
    return int.from_bytes(digest, "little") >> 1
