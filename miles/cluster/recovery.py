"""Engines that die are replaced while the run goes on; any other process that dies ends it.

    look (in every wait of the driver)
      lost? --> taken out of rotation --> another server, paused --> weights of the current version --> in rotation
                                                                       ^ when the trainers are idle: at once while the
                                                                         driver waits for samples, else with the next
                                                                         publication, which goes to all engines

No server serves before it holds the version that the others serve. Its requests are sent again by the pool, seeds included,
so that under --deterministic-mode nothing but time differs from a run whose engines lived.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence

from miles.errors import EngineError, ProcessDied
from miles.types import WeightVersion
from miles.weights import PublishStats

from .engine_group import EngineAddress, EngineGroup
from .rollout_manager import RolloutManager
from .supervision import Lost, Supervisor
from .trainer_group import TrainerGroup
from .waits import Process

logger = logging.getLogger(__name__)

#: --max-engine-restarts counts those of one engine within so many seconds.
WINDOW_S = 3600.0


class EngineRecovery:
    """The life of the engines in a running run. Its `look` methods are for the waits of the driver."""

    def __init__(
        self,
        supervisor: Supervisor,
        engines: EngineGroup,
        manager: RolloutManager,
        trainers: TrainerGroup | None,
        *,
        max_restarts: int,
        note: Callable[[str], None],
    ):
        """`max_restarts` of one engine within `WINDOW_S`."""
        self._supervisor, self._engines, self._manager, self._trainers = supervisor, engines, manager, trainers
        self._max_restarts, self._note = max_restarts, note
        self._version: WeightVersion | None = None
        """Of the last publication."""
        self._trained: WeightVersion | None = None
        """What the trainers hold, where that is newer: engines work ahead under weights that are nowhere else any more."""
        self._waiting: dict[int, float] = {}
        """Engines out of rotation, by number, and since when (monotonic)."""
        self._restarted_at: dict[int, list[float]] = {}
        self._told: set[Process] = set()
        """Lost ones whose server was killed, so that nobody waits for its answer."""
        self._at_work = False
        self._restarts, self._down_s = 0, 0.0
        for process in engines.processes:
            supervisor.watch(process)

    def take_metrics(self) -> dict[str, float]:
        """Since the last call."""
        metrics = {"perf/engine_restarts": float(self._restarts), "perf/engine_down_time": self._down_s}
        self._restarts, self._down_s = 0, 0.0
        return metrics

    # --------------------------------------------------------------------------------------------------------- waits

    def look(self, what: str, since: float) -> bool:
        """For waits in which the trainers work."""
        return self._look(what, since, trainers_idle=False)

    def look_idle(self, what: str, since: float) -> bool:
        """For waits in which the trainers do nothing, and can give an engine its weights."""
        return self._look(what, since, trainers_idle=True)

    def _look(self, what: str, since: float, *, trainers_idle: bool) -> bool:
        self._supervisor.look(what, since)
        lost = self._supervisor.lost()
        if self._at_work:
            for process in lost.keys() - self._told:
                self._told.add(process)
                self._engines.end_server(process)
                self._supervisor.end_server_of(process)
            return False
        if not lost and not (trainers_idle and self._waiting and self._can_enter()):
            return False
        with self._working():
            self._restart_lost(what)
            if trainers_idle and self._can_enter():
                if self._trained is not None and self._trained != self._version:
                    self._say(
                        f"no engine is left that serves version {self._version}: the rest of {what} is made by {self._trained}"
                    )
                    self._version = self._trained
                if self._trainers is not None and self._version is not None:
                    self._publish(lambda: [self._engines.addresses[number] for number in self._waiting])
                self._enter_rotation()
        return True

    def _can_enter(self) -> bool:
        """Whether the trainers have what the engines in rotation serve; where they are further, whether no engine serves."""
        return self._trained in (None, self._version) or len(self._waiting) == len(self._engines.processes)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """A wait in here looks, and leaves what it finds to us."""
        self._at_work = True
        try:
            yield
        finally:
            self._at_work = False

    # ------------------------------------------------------------------------------------------------------- weights

    def trained(self, version: WeightVersion) -> None:
        """The trainers hold `version` from now on."""
        self._trained = version

    def publish(self, version: WeightVersion) -> PublishStats:
        """All engines serve `version` once this returns. A publication that an engine's end broke off is repeated."""
        with self._working():
            self._version = version
            stats = self._publish(lambda: self._engines.addresses)
            self._enter_rotation()
        return stats

    def _publish(self, targets: Callable[[], Sequence[EngineAddress]]) -> PublishStats:
        assert self._trainers is not None
        assert self._version is not None
        while True:
            try:
                return self._trainers.publish(targets(), self._version)
            except EngineError:
                # The end that it tells of may be younger than the last sign of life.
                self._supervisor.ask_now(self._engines.processes)
                if not self._supervisor.lost():
                    raise
            self._restart_lost(f"weights of version {self._version} to the engines")

    def _enter_rotation(self) -> None:
        sent_again = self._manager.use_engines(self._engines.addresses, self._version)
        for number, since in self._waiting.items():
            name, down_s = self._engines.processes[number].name, time.monotonic() - since
            serves = "the checkpoint's weights" if self._version is None else f"weights of version {self._version}"
            self._say(
                f"{name} is replaced: it serves {serves} {down_s:.1f} s after it was found lost; "
                f"{sent_again.get(name, 0)} samples that it was working on are generated again"
            )
            self._down_s += down_s
        self._waiting.clear()

    # ------------------------------------------------------------------------------------------------------ restarts

    def _restart_lost(self, what: str) -> None:
        while lost := self._supervisor.lost():
            for process, found in lost.items():
                self._restart(process, found, what)

    def _restart(self, process: Process, found: Lost, what: str) -> None:
        """Another server in place of the lost one, out of rotation as yet. Raises where too many were needed."""
        number = self._engines.processes.index(process)
        self._waiting.setdefault(number, time.monotonic())
        self._manager.take_out_engine(process.name, str(found.error))
        if self._trainers is not None:
            self._trainers.engine_replaced()
        self._supervisor.end_server_of(process)
        self._supervisor.forget(process)
        self._told.discard(process)
        while True:
            self._allow(number, process.name, found)
            self._say(f"{process.name} is lost while the run waits for {what}, and is started again", str(found.error))
            try:
                self._engines.restart(number, new_actor=found.whole)
                break
            except (EngineError, ProcessDied) as error:
                found = Lost(error, whole=isinstance(error, ProcessDied))
        self._restarts += 1
        self._supervisor.watch(self._engines.processes[number])

    def _allow(self, number: int, name: str, found: Lost) -> None:
        now = time.monotonic()
        recent = [at for at in self._restarted_at.get(number, []) if now - at < WINDOW_S]
        if len(recent) >= self._max_restarts:
            raise EngineError(
                f"{name}, got its end after {len(recent)} restarts within {WINDOW_S / 60:.0f} minutes: --max-engine-restarts "
                f"{self._max_restarts} allows no other; {found.error}"
            ) from found.error
        self._restarted_at[number] = [*recent, now]

    def _say(self, text: str, reason: str = "") -> None:
        """The end of a log that the reason may carry goes to the driver's log only."""
        logger.warning("%s: %s" if reason else "%s%s", text, reason)
        first = reason.partition("\n")[0].removesuffix(" ends in:").removesuffix(", which")
        self._note(f"warning: {text}: {first}" if first else f"warning: {text}")
