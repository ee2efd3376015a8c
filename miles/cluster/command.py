"""The command line of `train.py` and `train_async.py`: resolve, check, build, run; every outcome one exit status and one clear message."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from miles.config import Resolution, resolve
from miles.errors import MilesError, UserError
from miles.observe import Display, driver_log, make_display

from .app import App
from .ray_cluster import secure_environment
from .resume import find_run_before

if TYPE_CHECKING:
    from .preflight import Prepared


def run(train: Callable[[App], None], argv: Sequence[str] | None = None, *, rollouts_ahead: int = 0) -> int:
    """The command: resolves the configuration, checks it, builds the application, runs the loop. Returns the exit status.

    `rollouts_ahead` is what the loop does: how many rollouts it begins before the one in training is trained.

    2 for wrong input, in one clear line each; 1 for a failed run, with the log's place; 130 after Ctrl-C or SIGTERM.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    app: App | None = None
    try:
        resolution = resolve(argv, rollouts_ahead=rollouts_ahead)
        if resolution.action == "print-config":
            print(resolution.describe())
            return 0
        secure_environment()
        from .preflight import preflight  # ray, torch and transformers: not needed for --help

        prepared = preflight(resolution.config)
        display = make_display(prepared.config.tracking.progress)
        try:
            show_plan(display, prepared, resolution)
            if resolution.action == "dry-run":
                for note in prepared.resume(find_run_before(prepared.config)).notes:
                    display.note(note)
                return 0
            app = App(prepared, resolution, display)
            with driver_log(app.run_dir.logs), app:
                train(app)
                app.summary()
        finally:
            display.close()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MilesError as error:
        where = f"\nlogs: {app.run_dir.logs}" if app is not None else ""
        print(f"error: {type(error).__name__}: {error}{where}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: every process of the run was stopped", file=sys.stderr)
        return 130
    return 0


def show_plan(display: Display, prepared: Prepared, resolution: Resolution) -> None:
    """The table of prompts / samples / tokens / optimizer steps, the placement, and what the machine ignores."""
    layout = prepared.layout
    placement = [
        ("trainer ranks", str(len(layout.actor_bundles))),
        ("engines", f"{len(layout.engine_bundles)}{' (colocated)' if layout.colocate else ''}"),
        ("bundles", f"{layout.num_bundles} x {'1 GPU' if resolution.has_gpu else 'a share of a CPU'}"),
    ]
    display.table("plan", ("what", "value"), [*prepared.table, *placement])
    for text in resolution.warnings:
        display.note(f"warning: {text}")
    if resolution.not_in_effect:
        where = "gpu" if resolution.has_gpu else "cpu"
        display.note(f"not in effect on {where}: " + ", ".join(str(item) for item in resolution.not_in_effect))


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
