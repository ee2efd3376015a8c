"""Every error that Miles raises on purpose.

Each also inherits the standard exception that a caller would reach for, so `except ValueError` keeps working. The text
follows one form: "<what>, got <value>: <why>; <how to mend it>", on one line. `train.py` prints that line and exits 2
for a `UserError`; anything else is our own fault and keeps its traceback.
"""


class MilesError(Exception):
    """Root of the hierarchy."""


class UserError(MilesError, ValueError):
    """The input (flag, file, hook, row) is wrong; the one-line text says how to mend it."""


class ConfigError(UserError):
    """A flag or a combination of flags cannot work."""


class DataError(UserError):
    """A row of a prompt file or a sample breaks its contract; the text names file and line, or the sample's index."""


class CheckpointError(UserError):
    """A checkpoint is missing, torn, or does not fit the configuration."""


class HookError(UserError):
    """A user hook could not be found, has the wrong signature, or returned what its contract forbids."""


class PlacementError(MilesError, RuntimeError):
    """The cluster cannot satisfy the placement; the text prints asked and available."""


class WaitTimeout(MilesError, TimeoutError):
    """A named wait across processes ran out; the text says who waited, for what, since when."""


class EngineError(MilesError, RuntimeError):
    """An engine answered with an error, died, or does not answer; the text names the engine."""


class EngineRequestError(EngineError):
    """The engine refused a request as wrong (HTTP 4xx); sending it again cannot help."""


class EngineUnreachable(EngineError):
    """No connection to the engine, or it broke off: the process died or its host is out of reach."""


class EngineTimeout(EngineError, WaitTimeout):
    """The engine took a request and did not answer within its limit."""


class WeightUpdateError(EngineError):
    """A weight update failed; the engine stays paused and answers no generation until a whole update succeeds."""


class TooManyFailures(MilesError, RuntimeError):
    """The failure policy stopped the run; `__cause__` and the text carry the first failure."""


class NonFiniteError(MilesError, ArithmeticError):
    """A NaN or an infinity in loss or gradient; the batch was saved and the weights were not touched."""


class ProcessDied(MilesError, RuntimeError):
    """A process of the run ended while it was needed; the text names it, what it was doing, and its last log lines."""
