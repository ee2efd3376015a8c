"""How much of a step its devices stand idle.

engines work while they generate and evaluate, trainers while they run passes of the model
idle share of either = 1 - its working seconds / the step's seconds
bubble = the idle share of all devices; devices that engines and trainers share are idle when neither works
"""

from __future__ import annotations

from collections.abc import Mapping

_ENGINES = ("perf/generate_time", "perf/eval_time")
_TRAINERS = (
    *("perf/actor_train_time", "perf/ref_log_probs_time", "perf/old_log_probs_time"),
    "perf/teacher_log_probs_time",
    *("perf/critic_train_time", "perf/values_time"),
)


def bubble_metrics(step: Mapping[str, float], *, engines: int, trainers: int, shared: bool) -> dict[str, float]:
    """`perf/engine_idle_fraction`, `perf/trainer_idle_fraction` and `perf/bubble_fraction`, each in [0, 1], from a step's times.

    engines and trainers count devices (ranks, without a GPU); what the run does not have is left out. `shared`: the same
    devices do both. Empty for a line that is not of a training step.
    """
    whole_s = step.get("perf/step_time", 0.0)
    if whole_s <= 0 or "perf/generate_time" not in step:
        return {}
    working = {
        "engine": (engines, sum(step.get(key, 0.0) for key in _ENGINES)),
        "trainer": (trainers, sum(step.get(key, 0.0) for key in _TRAINERS)),
    }
    working = {name: (devices, seconds) for name, (devices, seconds) in working.items() if devices}
    metrics = {f"perf/{name}_idle_fraction": _idle(seconds, whole_s) for name, (_, seconds) in working.items()}
    if shared:
        bubble = _idle(sum(seconds for _, seconds in working.values()), whole_s)
    else:
        total = sum(devices for devices, _ in working.values())
        bubble = (
            sum(devices * _idle(seconds, whole_s) for devices, seconds in working.values()) / total if total else 0.0
        )
    return {**metrics, "perf/bubble_fraction": bubble}


def _idle(working_s: float, whole_s: float) -> float:
    return min(1.0, max(0.0, 1.0 - working_s / whole_s))
