"""What a start finds on disk, and where it goes on. Read by the driver before it starts a process.

checkpoints of --load, state.json of the run before  ->  look  ->  Resume: what to load, and what to say
                                                         tidy  ->  torn checkpoints aside, half-written ones away
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.config import Config
from miles.errors import CheckpointError, UserError
from miles.observe import RunState, read_run_state, run_lock
from miles.trainers import checkpoints
from miles.trainers.checkpoints import Choice

#: Phases of `App`, as a sentence wants them; the step goes in as {step}, its rollout as {rollout}.
_DOING = {
    "start": "starting",
    "rollout": "generating rollout {rollout}",
    "rollout_ahead": "generating rollout {rollout}, ahead of time",
    "train": "training rollout {rollout}",
    "update_weights": "handing the weights of step {step} to the engines",
    "evaluate": "evaluating step {step}",
    "save": "saving checkpoint {step}",
    "save_hf": "exporting step {step}",
}
#: Reading a checkpoint to check it takes time where it is large; from here on start-up says how much.
_SLOW_S = 5.0


@dataclass(frozen=True)
class Resume:
    """Where the run begins."""

    choice: Choice | None
    """The checkpoint that is continued, verified; None for a run that begins at rollout 0."""
    start: int
    """The rollout to begin with."""
    data_state: dict[str, Any]
    """The rollout manager's part of the checkpoint; empty for a run that begins at rollout 0."""
    notes: tuple[str, ...]
    """What start-up says, one line each."""

    @property
    def checkpoint(self) -> Path | None:
        return None if self.choice is None else self.choice.checkpoint


def look(config: Config, *, num_rollout: int, has_prompts: bool, before: tuple[Path, RunState] | None) -> Resume:
    """Finds and verifies the checkpoint to continue; changes nothing. `before` is the run that was here.

    Raises `CheckpointError` where there are checkpoints and none can be continued, or where those of another run are in
    --save; `UserError` where there is nothing left to train.
    """
    load = config.ckpt.load
    started = time.monotonic()
    choice = checkpoints.choose(load) if load is not None else None
    seconds = time.monotonic() - started
    if config.ckpt.save is not None:
        _refuse_to_mix(Path(config.ckpt.save), choice, load)
    notes = list(_found(before))
    if choice is None:
        if before is not None or load is not None:
            where = f"no checkpoint in {load}" if load is not None else "no --load"
            notes.append(f"{where}: beginning with rollout 0 from {config.ckpt.ref_load or config.ckpt.hf_checkpoint}")
        return Resume(None, 0, {}, tuple(notes))
    if seconds > _SLOW_S:
        notes.append(f"checking {choice.checkpoint} took {seconds:.0f} s")
    notes += [f"warning: not used: {refused.why}" for refused in choice.refused]
    start = choice.iteration
    if start >= num_rollout:
        raise UserError(
            f"--num-rollout, got {num_rollout}: the checkpoint in --load has {start} rollouts already, "
            f"so there is nothing to train; raise --num-rollout or choose another --load"
        )
    saved = checkpoints.read_state(choice.checkpoint)
    checkpoints.check_kind(
        choice.checkpoint,
        saved,
        optimizer=config.optimizer.optimizer,
        with_critic=config.grpo.advantage_estimator == "ppo",
        distributed=config.perf.use_distributed_optimizer,
    )
    state = data_state_of(saved["extra"], start=start, has_prompts=has_prompts)
    notes.append(
        f"continuing with rollout {start} (step {start + 1} of {num_rollout}) from {choice.checkpoint}"
        f"{_again(start, before)}"
    )
    return Resume(choice, start, state, tuple(notes))


def _refuse_to_mix(save: Path, choice: Choice | None, load: str | None) -> None:
    """Raises where --save holds checkpoints that the run does not continue: a torn one of its own would fall back to them,
    and whichever has the same number would be written over.
    """
    newest = checkpoints.newest(save)
    if newest is None or (choice is not None and choice.checkpoint.resolve().parent == save.resolve()):
        return
    begins = "there is no --load" if load is None else f"--load is {load}"
    raise CheckpointError(
        f"--save, got {save}: it holds checkpoints up to iteration {newest}, which this run does not continue ({begins}) "
        f"and would mix with its own; add --load {save} to continue them, or name another directory"
    )


def data_state_of(extra: dict[str, Any], *, start: int, has_prompts: bool) -> dict[str, Any]:
    """The rollout manager's part of a checkpoint's `extra`.

    Raises `CheckpointError` where a run that reads prompts would continue without knowing how far they were read.
    """
    state: dict[str, Any] = extra.get("rollout", {})
    if start and has_prompts and not state:
        raise CheckpointError(
            f"--load, got a checkpoint of {start} rollouts without a data state: a replay (--load-debug-rollout-data) saved "
            f"it, so going on would begin the prompts anew; name it as --ref-load to start a new run from its weights"
        )
    return state


def tidy(config: Config, resume: Resume) -> Iterator[str]:
    """Clears the way in --save, which this run has locked: half-written checkpoints go, and where it is also --load, torn
    ones are put aside. Yields what was done, one line each; a --load that is only read stays as it is.
    """
    save, load = config.ckpt.save, config.ckpt.load
    if save is None:
        return
    if load is not None and resume.choice is not None and Path(load).resolve() == Path(save).resolve():
        for path in checkpoints.put_aside(resume.choice):
            yield f"put aside: {path}"
    if removed := checkpoints.remove_partial(save):
        yield f"removed from {save}, never finished: {', '.join(path.name for path in removed)}"


def run_before(directories: Iterable[Path], *, locked: Collection[Path] = ()) -> tuple[Path, RunState] | None:
    """The first of `directories` that a run was in, with its state.

    `locked` are those whose lock the caller holds: a run that is still "running" there was killed.
    """
    for directory in directories:
        if (state := read_run_state(directory)) is not None:
            if state.outcome == "running" and directory in locked:
                state = dataclasses.replace(state, outcome="killed")
            return directory, state
    return None


def find_run_before(config: Config) -> tuple[Path, RunState] | None:
    """The run that the configuration would follow, for a look without locks."""
    directories = [Path(config.cluster.run_dir)] if config.cluster.run_dir else []
    if config.ckpt.save is not None and (owner := run_lock.owner(Path(config.ckpt.save))) is not None:
        directories.append(Path(owner.run_dir))
    return run_before(directories)


def _found(before: tuple[Path, RunState] | None) -> Iterator[str]:
    if before is None:
        return
    directory, state = before
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.updated))
    error = state.error.split("; see ")[0]  # the log's end did not fit on the line
    doing = _DOING.get(state.phase, state.phase).format(step=state.step, rollout=state.step - 1)
    ended = {
        "running": f"which is running: {doing}, begun at {at}",
        "finished": f"which finished at {at}, after step {state.step} of {state.num_rollout}",
        "killed": f"which was killed while {doing}, begun at {at}",
        "interrupted": f"which was interrupted at {at} while {doing}",
        "failed": f"which failed at {at} while {doing}: {error}",
    }
    yield f"found a run in {directory}, {ended[state.outcome]}"


def _again(start: int, before: tuple[Path, RunState] | None) -> str:
    """Which rollouts were begun and are not in the checkpoint."""
    if before is None or before[1].outcome == "finished":
        return ""
    last = before[1].step - 1
    if last < start:
        return ""
    return f"; rollout {start} is done again" if last == start else f"; rollouts {start} to {last} are done again"
