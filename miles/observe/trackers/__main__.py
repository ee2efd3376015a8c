"""One tracker's worker: python -m miles.observe.trackers NAME RUN_DIRECTORY. See the package's docstring.

Reads config.json of the run directory, keys from the environment. stdin is the driver's pipe: at its end (a word on it says
how the run ended) the worker delivers what is left and ends too.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson

from miles.interfaces import MetricSink
from miles.observe.logs import open_process_log

from .backends import SINKS, Target
from .check import PACKAGES
from .state import TrackerState

logger = logging.getLogger("miles.observe.trackers")

_POLL_S = 0.25
_TIMED_OUT = 3


class Ending:
    """When and how the run ended. `event` is set when stdin reaches its end, and `limit_s` later the process ends, whatever
    it does; without a pipe to the driver (`limit_s` None) the run has ended already."""

    def __init__(self, limit_s: float | None):
        self.event = threading.Event()
        self.outcome = "ok"
        if limit_s is None:
            self.event.set()
        else:
            threading.Thread(target=self._watch, args=(limit_s,), daemon=True).start()

    def _watch(self, limit_s: float) -> None:
        word = b""
        while chunk := os.read(0, 64):
            word += chunk
        self.outcome = word.decode("ascii", "replace") or "killed"
        self.event.set()
        time.sleep(limit_s)
        logger.error("not finished %g s after the end of the run: given up", limit_s)
        os._exit(_TIMED_OUT)


def follow(path: Path, ended: threading.Event) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, metrics) of each line of `path`, as they are written; ends with the last line once `ended` is set."""
    while not path.exists():
        if ended.wait(_POLL_S) and not path.exists():
            return
    with open(path, "rb") as file:
        rest = b""
        while True:
            last = ended.is_set()  # asked before reading, so that the last read sees everything
            chunk = file.read()
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                values = orjson.loads(line)
                step = int(values.pop("step"))
                yield step, {key: math.nan if value is None else value for key, value in values.items()}
            if last:
                return
            if not chunk:
                ended.wait(_POLL_S)


def deliver(
    name: str, run_dir: Path, first_step: int | None, ending: Ending, make: Callable[[Target], MetricSink]
) -> None:
    """Follows the run to its end. `first_step` as in `Trackers`; None delivers what is missing and does nothing again."""
    state = TrackerState.read(run_dir, name)
    config = orjson.loads((run_dir / "config.json").read_bytes())["config"]
    again = first_step if first_step is not None and first_step <= state.delivered else None
    # What starts from nothing is another run than what was here before.
    sink = make(Target(run_dir, config, None if first_step == 0 else state.run_id, again))
    if sink.run_id != state.run_id:
        state = TrackerState(sink.run_id)
    elif sink.run_id is None and again is not None:
        state = TrackerState(None, again)
    state.write(run_dir, name)
    at, line = 0, 0
    for step, metrics in follow(run_dir / "metrics.jsonl", ending.event):
        at, line = step, line + 1 if step == at else 1
        if (step, line) > (state.step, state.lines):
            sink.log(step, metrics)
            state = TrackerState(sink.run_id, step, line)
            state.write(run_dir, name)
    sink.close(ending.outcome)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m miles.observe.trackers", description=__doc__)
    parser.add_argument("name", choices=list(PACKAGES))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--first-step", type=int, help="the driver's; by hand it is left out")
    parser.add_argument("--close-timeout", type=float, default=60.0, metavar="SECONDS", help="the driver's, too")
    args = parser.parse_args(argv)
    run_dir: Path = args.run_dir.resolve()
    if not (run_dir / "config.json").is_file():
        print(f"run directory, got {run_dir}: it has no config.json; name the directory of a run", file=sys.stderr)
        return 2
    by_hand = args.first_step is None
    if not by_hand:
        open_process_log(run_dir / "logs", f"tracker-{args.name}")
        os.nice(10)  # the run goes first
    ending = Ending(None if by_hand else args.close_timeout)
    (run_dir / "trackers").mkdir(exist_ok=True)
    try:
        with open(run_dir / "trackers" / f"{args.name}.lock", "w") as lock:
            # The worker of a driver that was killed may still be delivering.
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if by_hand else 0))
            deliver(args.name, run_dir, args.first_step, ending, SINKS[args.name])
    except BlockingIOError:
        print(f"tracker {args.name}: a process is delivering {run_dir} already; wait for its end", file=sys.stderr)
        return 2
    except Exception as error:
        if not by_hand:
            logger.exception("tracker %s failed", args.name)
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of a tracker's library, or ours on stdin, must not keep the process
