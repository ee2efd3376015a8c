"""What all benchmarks share: one thread on chosen cores, interleaved repeats, medians, the machine, one report.

    pin([1])                     first thing in main: this process and everything that it starts
    times = interleave({"ours": run_ours, "peer": run_peer}, repeats=7)
    report("generate", rows, settings={...}, json_path=args.json)

A benchmark's side is a function without arguments that does the work once. Sides take turns, so that a slow minute of the
machine falls on all of them; the first `warm_up` turns do not count. Ratios are ratios of medians.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: Each names a library's own thread pool, read when the library loads.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PACKAGES = ("torch", "transformers", "megatron-core", "ray", "trl", "numpy")


def pin(cores: Sequence[int] | None = None) -> list[int]:
    """Binds this process and its later children to `cores` (default: the last one it may use), a thread for each core.

    Call it before torch is imported. Raises `ValueError` for a core that this process may not use.
    """
    allowed = sorted(os.sched_getaffinity(0))
    chosen = sorted(set(cores or allowed[-1:]))
    if unknown := set(chosen) - set(allowed):
        raise ValueError(f"--cores, got {chosen}: {sorted(unknown)} may not be used; choose from {allowed}")
    if "torch" in sys.modules:
        raise RuntimeError("pin was called after torch was imported: its thread pool has been made; call it first")
    os.sched_setaffinity(0, chosen)
    for name in THREAD_VARIABLES:
        os.environ[name] = str(len(chosen))
    return chosen


def interleave(
    sides: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Runs the sides in turns; returns the `repeats` counted times of each, in seconds of `clock`.

    A side that times itself (to leave preparation out) returns its seconds as a float; any other result is ignored.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + repeats):
        for name, side in sides.items():
            began = clock()
            own = side()
            seconds = own if isinstance(own, float) else clock() - began
            if turn >= warm_up:
                times[name].append(seconds)
    return times


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time that these processes have used, all threads together.

    On one core that nobody else uses it is the wall time less waiting; on a shared one it leaves the others' turns out.
    """
    # Linux's number for the CPU clock of a whole process: MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED).
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def median(values: Sequence[float]) -> float:
    """The middle one: on a shared machine a mean is the neighbours'."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """Half the distance between the quartiles, in percent of the median, as text: `±3%`."""
    if len(values) < 2:
        return ""
    low, _, high = statistics.quantiles(values, n=4)
    return f"±{50 * (high - low) / median(values):.0f}%"


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code: processor, memory, versions, commit."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores_of_machine": os.cpu_count(),
        "cores_used": sorted(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "load_1min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: found for name in _PACKAGES if (found := _version(name))},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """A table whose columns are the keys of the first row; floats with three significant digits."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([_cell(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(
    name: str,
    rows: Sequence[Mapping[str, object]],
    *,
    settings: Mapping[str, object],
    json_path: str | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Prints settings, machine and table; writes the same to `json_path`, rows unrounded."""
    about = machine()
    print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    print(markdown(rows))
    print("".join(f"\n{note}" for note in notes), flush=True)
    if json_path:
        content = {"benchmark": name, "settings": settings, "machine": about, "rows": rows, "notes": notes}
        Path(json_path).write_text(json.dumps(content, indent=1, default=str) + "\n")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "--", "miles", "benchmarks") else ""
    )
