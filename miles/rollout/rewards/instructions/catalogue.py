"""The instructions by their ids, and the rows that name them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from miles.errors import DataError

Check: TypeAlias = Callable[..., bool]
OneWord: TypeAlias = str
"""A word that some tables keep as a list of one."""

_KINDS: Mapping[str, str] = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "OneWord": "a word",
    "list[str]": "a list of words",
}

checks: dict[str, Check] = {}


def instruction(*names: str) -> Callable[[Check], Check]:
    """Decorator: the function checks the instruction of these names."""

    def register(check: Check) -> Check:
        for name in names:
            assert name not in checks, name
            checks[name] = check
        return check

    return register


def compare(count: int, relation: str, threshold: float) -> bool:
    if relation == "at least":
        return count >= threshold
    if relation == "less than":
        return count < threshold
    raise ValueError(f"relation {relation!r} is neither 'at least' nor 'less than'")


def bound_checks(metadata: Mapping[str, Any]) -> list[tuple[str, Callable[[str], bool]]]:
    """(id, check of a response) for each instruction of a row. Raises `DataError` for what cannot be checked."""
    ids = metadata.get("instruction_id_list")
    if not isinstance(ids, list) or not ids:
        raise DataError(
            f"metadata instruction_id_list, got {ids!r}: it must be a list of ids; fill the --metadata-key column"
        )
    given = metadata.get("kwargs") or [{}] * len(ids)
    if not isinstance(given, list) or len(given) != len(ids):
        raise DataError(f"metadata kwargs, got {given!r}: it must be a list with a dict for each instruction; mend it")
    return [(name, _bound(name, kwargs)) for name, kwargs in zip(ids, given, strict=True)]


def _bound(name: Any, kwargs: Any) -> Callable[[str], bool]:
    check = checks.get(name) if isinstance(name, str) else None
    if check is None:
        near = difflib.get_close_matches(str(name), checks, n=1)
        fix = f"did you mean {near[0]}?" if near else "leave the row out; docs/rewards.md lists the ids"
        raise DataError(f"instruction, got {name!r}: none of the {len(checks)} instructions has this id; {fix}")
    if not isinstance(kwargs, dict | None):
        raise DataError(f"arguments of instruction {name}, got {kwargs!r}: they must be a dict; mend metadata kwargs")
    # Tables hold a column for every argument of any instruction, null where it does not apply.
    arguments = {key: value for key, value in (kwargs or {}).items() if value is not None}
    try:
        signature = inspect.signature(check)
        signature.bind("", **arguments)
        arguments = {
            key: _coerced(key, value, signature.parameters[key].annotation) for key, value in arguments.items()
        }
        check("An example.", **arguments)
    except (TypeError, ValueError) as error:
        raise DataError(f"arguments of instruction {name}, got {arguments!r}: {error}; mend metadata kwargs") from None
    return lambda text: check(text, **arguments)


def _coerced(key: str, value: Any, kind: str) -> Any:
    """The value as the annotation says; tables keep whole numbers as floats. Raises `TypeError`."""
    match kind, value:
        case ("int", int() | float()) if not isinstance(value, bool) and float(value).is_integer() and value >= 0:
            return int(value)
        case ("float", int() | float()) if not isinstance(value, bool):
            return value
        case ("str" | "OneWord", str()) | ("list[str]", list()):
            return value
        case "OneWord", [str() as word]:
            return word
    raise TypeError(f"{key} must be {_KINDS.get(kind, kind)}")
