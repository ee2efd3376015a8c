"""A plugin for tests: SIGKILLs one process of the run at one exact point, once, from inside the process that is there.

KILL = "victim:phase" and KILL_DIR, a directory for the mark and the driver's pid. The point lies in rollout 1 (the second):
    generation   the manager has two groups of four from the engine
    reward       a reward worker scores the first sample of the third group
    training     trainer rank 0 is between two optimizer steps
    weight_sync  the engine holds the first bucket of version 2 and not the second
    saving       rank 0 writes checkpoint 2: between its files, before the manifest, or before it becomes current,
                 a different one of these for each victim
"""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import psutil

from miles.rollout.rewards.registry import register_reward

ROLLOUT, GROUPS, STEPS_PER_ROLLOUT = 1, 4, 2
VICTIM, PHASE = os.environ.get("KILL", ":").split(":")
DIRECTORY = Path(os.environ["KILL_DIR"])
TITLES = {
    "trainer": "ray::TrainerActor",
    "rollout_manager": "ray::RolloutManagerActor",
    "engine": "miles.engines.embedded",
}
#: Where in a save each victim ends: (module of miles.trainers, function before which it does).
SAVING = {
    "driver": ("checkpoints", "set_latest"),
    "trainer": ("megatron.rng", "save"),
    "rollout_manager": ("checkpoints", "replace_directory"),
    "engine": ("megatron.rng", "save"),
}


def kill(where: str) -> None:
    """Ends the victim, where no process did so before; of the trainers the second, which is not where the point is."""
    try:
        (DIRECTORY / "killed").touch(exist_ok=False)
    except FileExistsError:
        return
    driver = psutil.Process(int((DIRECTORY / "driver").read_text()))
    if VICTIM == "driver":
        victim = driver
    else:
        found = [p for p in driver.children(recursive=True) if TITLES[VICTIM] in " ".join(p.cmdline())]
        others = [p for p in found if p.pid != os.getpid()]
        victim = (others or found)[0]
    (DIRECTORY / "killed").write_text(f"{where}: {VICTIM} {victim.pid}")
    victim.send_signal(signal.SIGKILL)


def wrap(owner: Any, name: str, make: Any) -> None:
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))


def in_generation() -> None:
    from miles.engines.client import EngineClient

    replies = 0

    def make(original):
        async def generate(self, payload):
            nonlocal replies
            reply = await original(self, payload)
            replies += 1
            if replies == ROLLOUT * GROUPS + 2:
                kill("after two of four replies")
            return reply

        return generate

    wrap(EngineClient, "generate", make)


def in_training() -> None:
    from miles.trainers.megatron.learner import Learner

    def make(original):
        def step(self, *args):
            if (self.steps, self._parallel.rank) == (STEPS_PER_ROLLOUT * ROLLOUT + 1, 0):
                kill("between two optimizer steps")
            return original(self, *args)

        return step

    wrap(Learner, "step", make)


def in_weight_sync() -> None:
    from miles.cluster import trainer_group
    from miles.weights import SharedMemoryTransport

    version = ""
    sent = 0

    def make_publish(original):
        def publish(weights, clients, transport, to_version, *rest, **kwargs):
            nonlocal version, sent
            version, sent = to_version, 0
            return original(weights, clients, transport, to_version, *rest, **kwargs)

        return publish

    def make_send(original):
        async def send(self, *args):
            nonlocal sent
            receipt = await original(self, *args)
            sent += 1
            if (version, sent) == (str(ROLLOUT + 1), 1):
                kill("after the first bucket")
            return receipt

        return send

    wrap(trainer_group, "publish", make_publish)
    wrap(SharedMemoryTransport, "send", make_send)


def in_saving() -> None:
    import importlib

    from miles.trainers.megatron import MegatronTrainer

    saving = 0

    def make_save(original):
        def save(self, directory, iteration, *rest):
            nonlocal saving
            saving = iteration if self.parallel.rank == 0 else 0
            return original(self, directory, iteration, *rest)

        return save

    wrap(MegatronTrainer, "save", make_save)
    module, name = SAVING[VICTIM]

    def make(original):
        def function(*args):
            if saving == ROLLOUT + 1:
                kill(f"before {module}.{name}")
            return original(*args)

        return function

    wrap(importlib.import_module(f"miles.trainers.{module}"), name, make)


@register_reward("exact_in_worker", needs_label=True)
def exact_in_worker(args, sample, *, response):
    if VICTIM and PHASE == "reward" and sample.index == (ROLLOUT * GROUPS + 2) * args.n_samples_per_prompt:
        kill("scoring the first sample of the third group")
    return float(response.strip() == str(sample.label))


title = Path("/proc/self/cmdline").read_bytes().decode()
if "train.py" in title or "train_async.py" in title:
    (DIRECTORY / "driver").write_text(str(os.getpid()))
elif "TrainerActor" in title and PHASE in ("training", "weight_sync", "saving"):
    {"training": in_training, "weight_sync": in_weight_sync, "saving": in_saving}[PHASE]()
elif "RolloutManagerActor" in title and PHASE == "generation":
    in_generation()
