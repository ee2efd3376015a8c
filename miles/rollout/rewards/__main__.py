"""Tries out a reward on one answer, the way a run would score it.

python -m miles.rollout.rewards --rm-type math --response 'so \\boxed{1/2}' --label 0.5
python -m miles.rollout.rewards --custom-rm-path my_reward.py:score --response 4 --label 4
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

import orjson

from miles.config import args_view, make_config
from miles.errors import MilesError
from miles.rollout.reward_setup import reward_pool
from miles.types import Sample, Status

from . import registry, remote
from .scorer import RewardSource, Scorer


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m miles.rollout.rewards", description="Scores one answer.")
    parser.add_argument("--rm-type", help=f"{', '.join(registry.names())}; or boxed_ and one of these")
    parser.add_argument("--custom-rm-path", help="reward hook: package.module.name or file.py:name")
    parser.add_argument("--group-rm", action="store_true", help="the hook takes and returns lists")
    parser.add_argument("--rm-url", help="service of remote_rm")
    parser.add_argument("--rm-timeout", type=float, default=30.0, help="seconds for the call")
    parser.add_argument("--reward-key", help="entry that counts, when the reward is a dict")
    parser.add_argument("--prompt", default="", help="what was asked")
    parser.add_argument("--response", required=True, help="the answer; - reads it from the standard input")
    parser.add_argument("--label", help="the right answer")
    parser.add_argument("--metadata", default="{}", help="JSON object")
    given = parser.parse_args()
    try:
        return asyncio.run(_try_out(given))
    except (MilesError, orjson.JSONDecodeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


async def _try_out(given: argparse.Namespace) -> int:
    flags = ("rm_type", "custom_rm_path", "group_rm", "rm_url", "rm_timeout", "reward_key")
    config = make_config(**{name: getattr(given, name) for name in flags if getattr(given, name) not in (None, False)})
    response = sys.stdin.read() if given.response == "-" else given.response
    sample = Sample(
        group_index=0,
        index=0,
        prompt=given.prompt,
        response=response,
        label=given.label,
        metadata=orjson.loads(given.metadata),
        status=Status.COMPLETED,
    )
    source = RewardSource(given.rm_type, given.custom_rm_path, given.group_rm, given.reward_key)
    async with reward_pool(config, num_workers=1) as pool:
        started = time.perf_counter()
        tracebacks = await Scorer(args_view(config), pool).score([sample], [0], source)
        seconds = time.perf_counter() - started
    await remote.close()
    if sample.status is Status.FAILED:
        print("\n".join(tracebacks), file=sys.stderr)
        print(f"failed: {sample.error}", file=sys.stderr)
        return 1
    print(f"reward {orjson.dumps(sample.reward).decode()}  ({seconds:.3f} s)")
    if sample.metadata:
        print(f"metadata {orjson.dumps(sample.metadata).decode()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
