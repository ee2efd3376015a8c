"""`args` as user hooks know it: every flag under its own name, flat and read-only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from .fields import flatten
from .groups import Config
from .problem import suggestion

if TYPE_CHECKING:
    from miles.interfaces import Args


class ArgsView:
    """Attributes are the flags; `vars(args)` is a copy of them all and iteration gives their names. Picklable."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]):
        object.__setattr__(self, "_values", dict(values))

    def __getattr__(self, name: str) -> Any:
        values = object.__getattribute__(self, "_values")
        try:
            return values[name]
        except KeyError:
            pass
        # Protocols of Python (copy, pickle, inspect) ask for dunder names; they are no flags.
        if name.startswith("__"):
            raise AttributeError(name)
        fix = suggestion(name, values, prefix="args.", otherwise="docs/flags.md lists them all")
        raise AttributeError(f"args.{name}: there is no such flag; {fix}")

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(
            f"args.{name}: args are read-only; keep what a hook needs in sample.metadata or in its module"
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"args.{name}: args are read-only")

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return dict(self._values)

    def __dir__(self) -> list[str]:
        return sorted(self._values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArgsView) and self._values == other._values

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"args({', '.join(f'{k}={v!r}' for k, v in self._values.items())})"

    def __reduce__(self) -> tuple[type[ArgsView], tuple[dict[str, Any]]]:
        return ArgsView, (self._values,)


def args_view(config: Config, **extra: Any) -> Args:
    """The hooks' `args`: all flags, the engine's as `sglang_<name>`, and `extra` on top."""
    values = flatten(config)
    engine = {f"sglang_{name}": value for name, value in config.sglang.sglang_args.items()}
    return ArgsView({**engine, **values, **extra})
