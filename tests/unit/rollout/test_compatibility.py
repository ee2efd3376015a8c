"""Names under which modules written for Miles import things."""

from __future__ import annotations

import subprocess
import sys

import miles.interfaces
import miles.types


def test_names() -> None:
    from miles.rollout.filter_hub.base_types import DynamicFilterOutput
    from miles.rollout.filter_hub.dynamic_sampling_filters import check_reward_nonzero_std
    from miles.utils.misc import load_function
    from miles.utils.types import Sample

    assert Sample is miles.types.Sample
    assert DynamicFilterOutput is miles.interfaces.DynamicFilterOutput
    path = "miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    assert load_function(path) is check_reward_nonzero_std


def test_reward_workers_and_checks_import_nothing_heavy() -> None:
    code = (
        "import sys, miles.rollout.rewards.worker, miles.rollout.preflight\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'sympy', 'megatron') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
