"""What a run shows and keeps: the run directory, logs per process, metrics.jsonl, one timer, the terminal display.

driver: Tracker.log(step, metrics) --> metrics.jsonl, sinks, display
driver: driver_log(logs) --> logs/driver.log
every other process: open_process_log(run_dir, "trainer-0") --> logs/trainer-0.log
"""

from .display import Display, make_display
from .logs import driver_log, open_process_log, tail
from .metrics import MetricsFile, Tracker
from .run_dir import RunDir, write_atomic
from .timers import Timers

__all__ = [
    "Display",
    "MetricsFile",
    "RunDir",
    "Timers",
    "Tracker",
    "driver_log",
    "make_display",
    "open_process_log",
    "tail",
    "write_atomic",
]
