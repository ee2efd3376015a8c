"""argv -> values: the words are sorted by flag, then tyro reads each flag's words as its type and prints `--help`.

    --rollout-batch-size 32 --no-swiglu --sglang-mem-fraction-static 0.7
        │ scan: which flag, which words; unknown and unbuilt flags; the last of a repeated flag wins, `unset` takes it back
        ├─ engine and router flags are set aside
        └─ tyro: words -> typed values, grouped help

Sorting first is what gives each value its provenance, `--no-x` for every switch, the nearest name of a misspelt flag,
and a recipe's arguments overridden by those typed after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from .fields import Field, fields, group_types
from .planned import is_so_anyway, planned_choice, planned_flag
from .problem import Problem, raise_if, suggestion

Action = Literal["run", "print-config", "dry-run"]

#: The word that takes a flag back: `--eps-clip-high unset` after a recipe's `--eps-clip-high 0.28`.
UNSET = "unset"

#: What the command does with the configuration; not part of it.
LAUNCH_HELP = {
    "config": "FILE.yaml with the groups below as sections (model, ckpt, rollout, ...); the command line overrides it.",
    "print_config": "Print every value and where it came from, and exit.",
    "dry_run": "Resolve and check everything, print the plan and the placement, start nothing.",
}


@dataclass(frozen=True)
class CommandLine:
    """What was typed."""

    values: Mapping[str, Any]
    """Flat field name -> value, only of the flags that were given."""
    engine: Mapping[str, Any]
    """`--sglang-*` flags that are none of ours, by SGLang's argument name."""
    unset: frozenset[str]
    """Flat field names of flags that were taken back, from the file as well."""
    config_file: str | None
    action: Action


def parse(argv: Sequence[str]) -> CommandLine:
    """Reads a command line. Raises `ConfigError`; `-h` and `--help` print the help and exit 0."""
    if any(word in ("-h", "--help") for word in argv):
        _tyro(["--help"])
    scanned = _scan(argv)
    config_file, action = scanned.config_file, scanned.action
    values = _typed(scanned.words)
    engine = {name: _engine_value(words) for name, words in scanned.engine.items()}
    return CommandLine(values, engine, frozenset(scanned.unset), config_file, action)


# ----------------------------------------------------------------------------------------------------------- sort words


@dataclass
class _Scan:
    words: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    engine: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    unset: set[str] = dataclasses.field(default_factory=set)
    config_file: str | None = None
    action: Action = "run"


def _scan(argv: Sequence[str]) -> _Scan:
    scan, problems = _Scan(), []
    for flag, words in _split(argv):
        problem = _take(scan, flag, words)
        problems += [problem] if problem else []
    raise_if(problems)
    return scan


def _split(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """[(flag as typed without dashes, its words)]. A word that begins with `--` needs the form `--flag=--word`."""
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word[2:].partition("=")
            found.append((flag, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise_if([Problem("command line", repr(word), "a value without a flag", "flags begin with --; see --help")])
    return found


def _take(scan: _Scan, typed: str, words: list[str]) -> Problem | None:
    """Files one flag and its words under its field; returns what is wrong with it."""
    name = typed.replace("-", "_")
    if name in LAUNCH_HELP:
        return _take_launch(scan, name, words)
    field = fields().get(name)
    negated = field is None and name.startswith("no_")
    if negated:
        field = fields().get(name.removeprefix("no_"))
    if field is None or (negated and field.kind != "switch"):
        if name.startswith("sglang_"):
            scan.engine[name.removeprefix("sglang_")] = words
            return None
        return None if is_so_anyway(typed, words) else planned_flag(typed) or _unknown(typed)
    if words == [UNSET]:
        scan.words.pop(field.name, None)
        scan.unset.add(field.name)
        return None
    if field.kind == "switch":
        if words:
            no = "--no-" + field.flag.removeprefix("--")
            return Problem(field.flag, _show(words), "it is a switch and takes no value", f"write {field.flag} or {no}")
        words = ["False" if negated else "True"]
    elif not words:
        return Problem(field.flag, "no value", "it takes one", f"write {field.flag} {_metavar(field)}")
    elif field.kind != "list" and len(words) > 1:
        return Problem(
            field.flag, _show(words), "it takes one value", "quote a value with spaces, give every flag its dashes"
        )
    if field.name == "plugin":
        words = scan.words.get("plugin", []) + words
    scan.words[field.name] = words
    scan.unset.discard(field.name)
    return None


def _take_launch(scan: _Scan, name: str, words: list[str]) -> Problem | None:
    if name == "config":
        if len(words) != 1:
            return Problem("--config", _show(words), "it takes one file", "write --config FILE.yaml")
        scan.config_file = words[0]
    elif words:
        return Problem(
            "--" + name.replace("_", "-"), _show(words), "it is a switch and takes no value", "drop the value"
        )
    else:
        scan.action = "print-config" if name == "print_config" else "dry-run"
    return None


def _unknown(typed: str) -> Problem:
    dashed = typed.replace("_", "-")
    known = [f.flag[2:] for f in fields().values()] + [n.replace("_", "-") for n in LAUNCH_HELP]
    return Problem(
        f"--{dashed}", None, "there is no such flag", suggestion(dashed, known, prefix="--", otherwise="see --help")
    )


def _show(words: Sequence[str]) -> str:
    return repr(" ".join(words)) if words else "no value"


def _engine_value(words: list[str]) -> Any:
    """A switch is True; a word that reads as JSON (a number, true, a list) is that; anything else is text."""
    if not words:
        return True
    values = [_scalar(word) for word in words]
    return values[0] if len(values) == 1 else values


def _scalar(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


# ----------------------------------------------------------------------------------------------------------------- tyro


def _typed(words: Mapping[str, list[str]]) -> dict[str, Any]:
    """The words of each flag as its type. One pass for all of them; flag by flag only to name the one at fault."""
    parsed = _try_tyro(words)
    if parsed is None:
        raise_if(_misread(fields()[name], words[name]) for name in words if _try_tyro({name: words[name]}) is None)
    assert parsed is not None
    return parsed


def _misread(field: Field, words: Sequence[str]) -> Problem:
    if field.choices:
        planned = planned_choice(field.name, field.flag, words[0], field.choices)
        if planned:
            return planned
        fix = suggestion(words[0], field.choices, otherwise=f"choose one of {', '.join(field.choices)}")
        return Problem(field.flag, _show(words), f"it takes one of {', '.join(field.choices)}", fix)
    if field.kind == "json":
        wanted, example = "a JSON object", """'{"key": 1}'"""
    else:
        wanted, example = ("a whole number", "3") if field.item_type is int else ("a number", "0.5 or 1e-6")
        wanted = "whole numbers" if field.kind == "list" else wanted
    return Problem(field.flag, _show(words), f"it takes {wanted}", f"write it like {field.flag} {example}")


def _try_tyro(words: Mapping[str, list[str]]) -> dict[str, Any] | None:
    argv: list[str] = []
    for name, given in words.items():
        field = fields()[name]
        if field.kind == "switch":
            argv.append(field.flag if given == ["True"] else "--no-" + field.flag.removeprefix("--"))
        else:
            # Words of a list travel as one word of JSON: they may begin with a dash.
            argv.append(f"{field.flag}={json.dumps(given) if field.kind == 'list' else given[0]}")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parsed = _tyro(argv)
    except SystemExit:
        return None
    return {name: getattr(getattr(parsed, fields()[name].group.upper()), name) for name in words}


def _tyro(argv: Sequence[str]) -> Any:
    return tyro.cli(
        _view(),
        prog="train.py",
        description="Reinforcement-learning post-training. Flags by group; what is unset is derived, see --print-config; `--flag unset` takes back what came before it.",
        args=list(argv),
        config=(tyro.conf.OmitArgPrefixes,),
    )


@functools.cache
def _view() -> type:
    """The groups as tyro shows and reads them: `| None` taken off, since a flag that is not typed is not read."""
    launch = [
        ("config", Annotated[str, _arg(LAUNCH_HELP["config"], "", "FILE.yaml")], ""),
        ("print_config", Annotated[bool, _arg(LAUNCH_HELP["print_config"], ""), tyro.conf.FlagCreatePairsOff], False),
        ("dry_run", Annotated[bool, _arg(LAUNCH_HELP["dry_run"], ""), tyro.conf.FlagCreatePairsOff], False),
    ]
    sections: list[tuple[str, type]] = [
        ("LAUNCH", _section("LaunchArgs", "LAUNCH: What to do with the configuration.", launch))
    ]
    for group, cls in group_types().items():
        members = [(f.name, _annotated(f), _placeholder(f)) for f in fields().values() if f.group == group]
        sections.append((group.upper(), _section(cls.__name__, cls.__doc__ or "", members)))
    return _section("Flags", "", [(name, cls, dataclasses.field(default_factory=cls)) for name, cls in sections])


def _section(name: str, doc: str, members: Sequence[tuple[str, Any, Any]]) -> type:
    made = dataclasses.make_dataclass(name, [*members], frozen=True)
    made.__doc__ = doc.partition(": ")[2] or doc
    return made


def _arg(text: str, hint: str, metavar: str | None = None) -> Any:
    return tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=hint)


def _annotated(field: Field) -> Any:
    hint = f"(default: {field.default_text})" if field.default is not None else "(unset)"
    markers: list[Any] = [_arg(field.help, hint, _metavar(field))]
    if field.kind == "json":
        markers.append(_spec(dict, _json_object))
    elif field.kind == "list":
        markers.append(_spec(tuple, functools.partial(_json_list, field.item_type)))
    return Annotated[(field.type, *markers)]


def _spec(kind: type, read: Callable[[list[str]], Any]) -> Any:
    """How tyro reads a field that is one word of JSON."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [json.dumps(value)],
    )


def _json_object(words: list[str]) -> dict[str, Any]:
    value = json.loads(words[0])
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _json_list(item_type: type, words: list[str]) -> tuple[Any, ...]:
    return tuple(item_type(word) for word in json.loads(words[0]))


def _metavar(field: Field) -> str | None:
    if field.choices:
        return "{" + ",".join(field.choices) + "}"
    return None if field.kind == "switch" else field.type_text.upper()


def _placeholder(field: Field) -> Any:
    """What tyro holds for a flag that is not typed; it must have the field's type and is never read."""
    if field.kind == "json":
        return dataclasses.field(default_factory=dict)
    if field.kind == "list":
        return ()
    return field.choices[0] if field.choices else field.type()
