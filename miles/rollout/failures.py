"""How much may fail before a run stops: the policy of one rollout or evaluation."""

from __future__ import annotations

import traceback
from pathlib import Path

from miles.errors import MilesError, TooManyFailures

_PACKAGE = Path(__file__).parents[1]

#: A group is begun this many times at most before its failure stops the run.
MAX_GROUP_ATTEMPTS = 3
#: Aborts (a pause, a shutdown) are nobody's failure, but a group that is aborted this often will never finish.
MAX_GROUP_ABORTS = 10


def explain(error: BaseException) -> str:
    """What a user needs of `error`: the line of an error that is raised on purpose; of any other the traceback from
    where the user's code begins, or all of it where that is never entered."""
    if isinstance(error, MilesError):
        return f"{type(error).__name__}: {error}"
    whole = traceback.TracebackException.from_exception(error)
    theirs = next((i for i, f in enumerate(whole.stack) if _PACKAGE not in Path(f.filename).parents), 0)
    whole.stack = traceback.StackSummary.from_list(whole.stack[theirs:])
    return "".join(whole.format())


class FailureLedger:
    """Counts what failed in one rollout and stops it when the policy says so.

    Counted are FAILED samples, also those of groups that were begun again, against `max_fraction` of the samples that
    the rollout is to deliver.
    """

    def __init__(self, what: str, num_samples: int, max_fraction: float):
        self._what = what
        self._num_samples = num_samples
        self._max_fraction = max_fraction
        self.failed_samples = 0
        self.retried_groups = 0
        self.aborted_groups = 0
        self.first: str | None = None
        """The first failure's traceback, or its text where there is none."""

    def note(self, failed_samples: int, tracebacks: list[str], fallback: str) -> None:
        """Counts failures. Raises `TooManyFailures` beyond the fraction."""
        if not failed_samples:
            return
        self.failed_samples += failed_samples
        if self.first is None:
            self.first = (tracebacks or [fallback])[0].strip()
        if self.failed_samples > self._max_fraction * self._num_samples:
            raise TooManyFailures(
                f"{self._what}, got {self.failed_samples} failed samples of {self._num_samples}: more than "
                f"--max-failed-sample-fraction {self._max_fraction:g}; mend the first failure:\n{self.first}"
            )

    def retry(self, group_index: int, failures: int) -> None:
        """A whole group failed for the `failures`-th time. Raises `TooManyFailures` when that was the last attempt."""
        if failures >= MAX_GROUP_ATTEMPTS:
            raise TooManyFailures(
                f"{self._what}, got group {group_index} failed {failures} times: it was begun as often as is allowed; "
                f"mend the first failure:\n{self.first}"
            )
        self.retried_groups += 1

    def abort(self, group_index: int, aborts: int) -> None:
        """A group was aborted for the `aborts`-th time. Raises `TooManyFailures` when it will be so for ever."""
        self.aborted_groups += 1
        if aborts >= MAX_GROUP_ABORTS:
            raise TooManyFailures(
                f"{self._what}, got group {group_index} aborted {aborts} times: the engines end it before it is done; "
                "look for what aborts them"
            )

    def metrics(self) -> dict[str, float]:
        return {
            "rollout/failed_samples": float(self.failed_samples),
            "rollout/retried_groups": float(self.retried_groups),
            "rollout/aborted_groups": float(self.aborted_groups),
        }
