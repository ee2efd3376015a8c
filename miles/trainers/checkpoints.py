"""A series of checkpoints on disk, each whole or not there at all. Imports no torch: the driver reads them before it
starts a process.

    DIR/iter_0000008.tmp/     being written; never looked at
    DIR/iter_0000007/         whole: manifest.json lists size and checksum of every other file and was written last
    DIR/iter_0000006.torn/    refused at a start-up and put aside, for a post-mortem
    DIR/iter_0000006.superseded/    of a run that another one went back behind
    DIR/latest_checkpointed_iteration.txt     the one to continue from

    finish -> prune                     the writer
    choose -> put_aside, remove_partial the next run

Iteration `i` is the state after `i` training rollouts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from miles.errors import CheckpointError

LATEST = "latest_checkpointed_iteration.txt"
STATE = "trainer.json"
_MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 24
#: Beside the current one, how many are kept whatever --save-retain-interval says: what a torn current one falls back to.
_SPARE = 1


def iteration_directory(directory: str | Path, iteration: int) -> Path:
    return Path(directory) / f"iter_{iteration:07d}"


def partial_directory(directory: str | Path, iteration: int) -> Path:
    """Where a checkpoint is written until it is whole; the caller may put files of its own there before `finish`."""
    return Path(directory) / f"iter_{iteration:07d}.tmp"


# ----------------------------------------------------------------------------------------------------------------- write


def finish(directory: str | Path, iteration: int) -> Path:
    """Makes the partial checkpoint current: manifest, flush, rename, then the latest-iteration file. One process calls it.

    Checkpoints between the current one and this are of a run that was gone back behind: they are put aside, since a torn
    one of ours must not fall back to them. Killed anywhere in between, the previous checkpoint stays current and whole.
    Returns the final directory.
    """
    partial, final = partial_directory(directory, iteration), iteration_directory(directory, iteration)
    if not partial.is_dir():
        raise CheckpointError(
            f"checkpoint {partial}, got no such directory: save was not called; call it on every rank"
        )
    files = {str(file.relative_to(partial)): _fingerprint(file) for file in _files(partial)}
    for file in _files(partial):
        fsync(file)
    write_durably(partial / _MANIFEST, _manifest(iteration, files))
    for superseded in _superseded(Path(directory), iteration):
        superseded.rename(_free_name(superseded.with_name(f"{superseded.name}.superseded")))
    replace_directory(partial, final)
    set_latest(directory, iteration)
    return final


def _superseded(root: Path, iteration: int) -> list[Path]:
    """Checkpoints beyond the current one that the next one, `iteration`, leaves behind it."""
    try:
        current = latest_iteration(root)
    except CheckpointError:
        return []
    return [iteration_directory(root, i) for i in _iterations(root) if current < i < iteration]


def set_latest(directory: str | Path, iteration: int) -> None:
    """Makes a whole checkpoint the one to continue from."""
    write_durably(Path(directory) / LATEST, f"{iteration}\n")


def prune(directory: str | Path, retain_interval: int) -> None:
    """Removes older checkpoints but every `retain_interval`-th: never the current one, nor the one before it."""
    root = Path(directory)
    current = latest_iteration(root)
    older = sorted((i for i in _iterations(root) if i < current), reverse=True)
    for iteration in older[_SPARE:]:
        if iteration % retain_interval:
            # Renamed first: killed in between, no directory of a checkpoint's name lacks files.
            doomed = iteration_directory(root, iteration).rename(root / f"iter_{iteration:07d}.old")
            shutil.rmtree(doomed, ignore_errors=True)


def _manifest(iteration: int, files: dict[str, dict[str, Any]]) -> str:
    """One text for one content, with a checksum of its own: a manifest with any byte changed is not one of ours."""
    content = {"iteration": iteration, "files": files}
    digest = xxhash.xxh3_64(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "xxh3_64": digest}, indent=1) + "\n"


def _files(directory: Path) -> Iterator[Path]:
    yield from sorted(file for file in directory.rglob("*") if file.is_file() and file.name != _MANIFEST)


def _fingerprint(file: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_64()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return {"bytes": file.stat().st_size, "xxh3_64": digest.hexdigest()}


# ------------------------------------------------------------------------------------------------------------------ read


def holds_checkpoints(path: str | Path) -> bool:
    """Whether `path` is a series of checkpoints, or a checkpoint: whole or torn."""
    root = Path(path)
    if not root.is_dir():
        return False
    return is_checkpoint(root) or (root / LATEST).exists() or any(True for _ in _iterations(root))


def newest(directory: str | Path) -> int | None:
    """The highest iteration among the checkpoints of a series, whole or torn; None where it has none."""
    root = Path(directory)
    return max(_iterations(root), default=None) if root.is_dir() else None


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is one checkpoint itself, perhaps a torn one, rather than a series of them."""
    root = Path(path)
    return root.is_dir() and (_number(root.name) is not None or (root / _MANIFEST).exists() or (root / STATE).exists())


def latest_iteration(directory: str | Path) -> int:
    """The iteration that latest_checkpointed_iteration.txt names. Raises CheckpointError where it names none."""
    file = Path(directory) / LATEST
    try:
        text = file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{file}, got no such file ({error.strerror}): write the number of a checkpoint beside it into it"
        ) from error
    if not re.fullmatch(rb"[0-9]{1,12}\n?", text):
        raise CheckpointError(
            f"{file}, got {text[:40]!r}: it names no iteration; write the number of a checkpoint there"
        )
    return int(text)


def verify(checkpoint: Path) -> None:
    """Compares every file with the manifest. Raises CheckpointError naming the first that is missing or differs."""
    for name, fingerprint in _read_manifest(checkpoint)["files"].items():
        file = checkpoint / name
        try:
            size = file.stat().st_size
            if size != fingerprint["bytes"]:
                raise CheckpointError(f"{file}, got {size} bytes: the manifest says {fingerprint['bytes']}, it is torn")
            if _fingerprint(file) != fingerprint:
                raise CheckpointError(f"{file}, got other contents than the manifest's checksum: it is damaged")
        except FileNotFoundError as error:
            raise CheckpointError(f"checkpoint {checkpoint}, got no {name}: the manifest lists it") from error
        except OSError as error:
            raise CheckpointError(f"{file}, got {error.strerror}: it cannot be read") from error


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / _MANIFEST
    try:
        text = file.read_bytes().decode()  # as it is: reading text would turn a \r into a \n
        manifest: dict[str, Any] = json.loads(text)
        is_ours = text == _manifest(manifest["iteration"], manifest["files"])
    except OSError as error:
        why = "it was not written to its end" if checkpoint.is_dir() else "there is no such directory"
        raise CheckpointError(f"checkpoint {checkpoint}, got no {_MANIFEST}: {why}") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        is_ours, manifest = False, {}
    if not is_ours:
        raise CheckpointError(f"{file}, got other contents than were written: it is damaged")
    number = _number(checkpoint.name)
    if number is not None and number != manifest["iteration"]:
        raise CheckpointError(
            f"checkpoint {checkpoint}, got a manifest of iteration {manifest['iteration']}: it was renamed"
        )
    return manifest


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON that the trainer was given to save, with `iteration` and `extra`, the caller's part of it."""
    file = checkpoint / STATE
    try:
        state: dict[str, Any] = json.loads(file.read_text())
        is_ours = isinstance(state["iteration"], int) and isinstance(state["extra"], dict)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}, got {error!r}: it is no checkpoint of Miles; check the path") from error
    if not is_ours:
        raise CheckpointError(f"{file}, got another iteration or extra than Miles writes: check the path")
    return state


def check_kind(
    checkpoint: Path, state: dict[str, Any], *, optimizer: str, with_critic: bool, distributed: bool = False
) -> None:
    """Raises CheckpointError where `state`, the checkpoint's, is of a run that another kind of run cannot continue."""
    saved = state.get("optimizer")
    if saved is not None and saved != optimizer:
        raise CheckpointError(
            f"--optimizer, got {optimizer}: checkpoint {checkpoint} holds the state of {saved}; "
            f"take --optimizer {saved}, or start from its weights with --ref-load"
        )
    if saved is not None and bool(state.get("distributed_optimizer")) != distributed:
        had = "has" if state.get("distributed_optimizer") else "has not"
        mend = "leave it out" if distributed else "add it"
        raise CheckpointError(
            f"--use-distributed-optimizer, got {'true' if distributed else 'false'}: the state in checkpoint {checkpoint} {had} "
            f"the layout of one; {mend}, or start from its weights with --ref-load"
        )
    if with_critic and state.get("critic_steps") is None:
        raise CheckpointError(
            f"checkpoint {checkpoint}, got no critic: a run without one wrote it; start from its weights with --ref-load"
        )


def find(directory: str | Path) -> Path:
    """The current checkpoint of a series, or `directory` itself where it is one. Verified.

    For weights that must be those which were meant: where that one is missing or torn, raises CheckpointError, with the
    newest whole one before it.
    """
    chosen = choose(directory)
    if chosen is None:
        raise CheckpointError(f"checkpoint, got {directory}: there is none; name a directory with {LATEST}")
    if chosen.refused:
        raise CheckpointError(
            f"{chosen.refused[0].why}; the newest whole one before it is {chosen.iteration}: "
            f"name {chosen.checkpoint} to take that"
        )
    return chosen.checkpoint


# ---------------------------------------------------------------------------------------------------------------- choose


@dataclass(frozen=True)
class Refused:
    """Something that should have been continued from and cannot be."""

    path: Path
    """A checkpoint's directory, or the latest-iteration file."""
    why: str


@dataclass(frozen=True)
class Choice:
    """The checkpoint to continue from, verified, and what was refused on the way to it."""

    checkpoint: Path
    iteration: int
    refused: tuple[Refused, ...]


def choose(directory: str | Path) -> Choice | None:
    """The newest whole checkpoint that is not newer than latest_checkpointed_iteration.txt says; any, where that says
    nothing. None where there never was one: neither a checkpoint, nor that file.

    A checkpoint newer than the file is not looked at: going back is done by writing an older number there. Raises
    CheckpointError where there are checkpoints and none is whole. Changes nothing.
    """
    root = Path(directory)
    if is_checkpoint(root):
        verify(root)
        return Choice(root, read_state(root)["iteration"], ())
    if not holds_checkpoints(root):
        return None
    refused: list[Refused] = []
    iterations = set(_iterations(root))
    try:
        latest = latest_iteration(root)
        iterations = {i for i in iterations if i < latest} | {latest}
    except CheckpointError as error:
        refused.append(Refused(root / LATEST, str(error)))
    for iteration in sorted(iterations, reverse=True):
        checkpoint = iteration_directory(root, iteration)
        try:
            verify(checkpoint)
        except CheckpointError as error:
            refused.append(Refused(checkpoint, str(error)))
        else:
            return Choice(checkpoint, iteration, tuple(refused))
    reasons = "; and ".join(r.why for r in refused)
    raise CheckpointError(f"{reasons}; no checkpoint in {root} is whole: start afresh with another --load and --save")


def put_aside(choice: Choice) -> list[Path]:
    """Makes the chosen checkpoint the current one of its series and renames what was refused to *.torn, where it then is."""
    if not choice.refused:
        return []
    set_latest(choice.checkpoint.parent, choice.iteration)
    torn = [r.path for r in choice.refused if r.path.is_dir()]
    return [path.rename(_free_name(path.with_name(f"{path.name}.torn"))) for path in torn]


def remove_partial(directory: str | Path) -> list[Path]:
    """Removes what killed runs left half-written or half-removed; returns what it was."""
    found = [p for p in sorted(Path(directory).glob("iter_*")) if p.suffix in (".tmp", ".old") and p.is_dir()]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return found


def _free_name(path: Path) -> Path:
    names = (path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 1000)))
    return next(name for name in names if not name.exists())


def _iterations(root: Path) -> Iterator[int]:
    for entry in root.iterdir():
        if (number := _number(entry.name)) is not None:
            yield number


def _number(name: str) -> int | None:
    match = re.fullmatch(r"iter_([0-9]{7,12})", name)
    return int(match[1]) if match else None


# --------------------------------------------------------------------------------------------------------------- on disk


def write_durably(path: Path, text: str) -> None:
    """Replaces a file, on disk when it returns."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    fsync(temporary)
    temporary.rename(path)
    fsync(path.parent)


def replace_directory(partial: Path, path: Path) -> None:
    """Renames `partial` to `path`; what was at `path` goes. On disk when it returns."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    fsync(partial)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def fsync(path: Path) -> None:
    """Waits until a file, or a directory's list of names, is on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
