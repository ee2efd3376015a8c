"""How a generation hook reaches the engines: `miles.rollout.context.current()`.

    from miles.rollout.context import current

    async def my_generate(args, sample, sampling_params):
        context = current()
        context.tokenizer, context.pool, context.rollout_id, context.evaluation, context.next_seed()

The context belongs to one trajectory (one call of the hook) and is found through a `ContextVar`: it is there in the
hook, in whatever the hook awaits, and in tasks that the hook starts; not in threads, to which a hook hands it over.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.errors import HookError
from miles.interfaces import Args

from .sampling import Sampling
from .seeds import sample_seed

if TYPE_CHECKING:
    from miles.config import Config
    from miles.engines.pool import EnginePool

    from .teacher import TeacherEngines


@dataclass(frozen=True)
class Runtime:
    """What one rollout manager has: shared by all trajectories."""

    config: Config
    args: Args
    pool: EnginePool | None
    """The run's engines; None where they answer nothing."""
    tokenizer: Any
    """A transformers tokenizer."""
    eos_token_ids: frozenset[int] = frozenset()
    """Tokens that end an answer by themselves."""
    teacher: TeacherEngines | None = None
    """Scores every answer of a training rollout, and makes some."""


@dataclass
class GenerationContext:
    """One trajectory's surroundings."""

    runtime: Runtime
    sampling: Sampling
    rollout_id: int
    group_index: int
    position: int
    """Which sample of its group, from 0."""
    attempt: int = 0
    """How often the group was begun anew in this rollout."""
    evaluation: str | None = None
    """Name of the evaluation data set; None while training."""
    by_teacher: bool = False
    """The teacher's engines answer."""
    _turn: int = field(default=0, repr=False)

    @property
    def args(self) -> Args:
        return self.runtime.args

    @property
    def pool(self) -> EnginePool:
        """`await pool.generate(payload)` sends any /generate request; prefer `miles.rollout.generate.generate`."""
        pool = self.runtime.teacher.pool if self.by_teacher and self.runtime.teacher else self.runtime.pool
        assert pool is not None, "rows that nobody answers are not generated"
        return pool

    @property
    def tokenizer(self) -> Any:
        return self.runtime.tokenizer

    def seed(self, turn: int = 0) -> int:
        """The `sampling_seed` of this trajectory's request number `turn`."""
        return sample_seed(
            self.runtime.config.rollout.rollout_seed,
            self.rollout_id,
            self.group_index,
            self.position,
            turn,
            self.attempt,
            stream=f"eval/{self.evaluation}" if self.evaluation else "",
        )

    def request_id(self) -> str:
        """A name for this trajectory's next request: in engines' logs, in errors, and to abort it by."""
        phase = f"eval-{self.evaluation}" if self.evaluation else "rollout"
        where = f"{self.rollout_id}-g{self.group_index}-s{self.position}-t{self._turn}-a{self.attempt}"
        return f"{phase}-{where}-{uuid.uuid4().hex[:8]}"

    def next_seed(self) -> int:
        """The seed of the next request: another one at each call, the same ones in a repeated run."""
        self._turn += 1
        return self.seed(self._turn - 1)


_current: ContextVar[GenerationContext] = ContextVar("miles_generation_context")


def current() -> GenerationContext:
    """The context of the trajectory that is being generated. Raises `HookError` outside of one."""
    try:
        return _current.get()
    except LookupError:
        raise HookError(
            "miles.rollout.context.current(), got no trajectory: it was called outside a generation hook, or in a thread; "
            "call it in the hook's coroutine and hand the object on"
        ) from None


@contextmanager
def installed(context: GenerationContext) -> Iterator[GenerationContext]:
    """Makes `context` the current one for the code below it and the tasks started there."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


def find_eos_token_ids(tokenizer: Any, hf_checkpoint: str | None) -> frozenset[int]:
    """End tokens as an engine sees them: the tokenizer's, config.json's and generation_config.json's."""
    found: set[int] = set()
    values = [getattr(tokenizer, "eos_token_id", None)]
    if hf_checkpoint is not None:
        for name in ("config.json", "generation_config.json"):
            path = Path(hf_checkpoint) / name
            if path.is_file():
                values.append(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
    for value in values:
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)
