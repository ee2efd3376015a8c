"""A table of named parts: how losses, estimators and corrections are added and chosen.

surrogates = Registry[Surrogate]("policy loss")

@surrogates.register("ppo_clip")
def ppo_clip(tokens, spec): ...

surrogates.get("ppo_clip")
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from miles.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to parts, in the order of registration. `what` names the kind of part in error texts."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._parts: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator that enters a part under each of `names`; ValueError where a name is taken."""

        def enter(part: T) -> T:
            for name in names:
                if name in self._parts:
                    raise ValueError(f"{self.what} {name!r}, got a second one: names are unique; choose another name")
                self._parts[name] = part
            return part

        return enter

    def get(self, name: str) -> T:
        """The part of that name; ConfigError with the nearest name where there is none."""
        if name not in self._parts:
            nearest = difflib.get_close_matches(name, self._parts, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"take one of {', '.join(self._parts)}"
            raise ConfigError(f"{self.what}, got {name!r}: no such name is registered; {hint}")
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __contains__(self, name: object) -> bool:
        return name in self._parts
