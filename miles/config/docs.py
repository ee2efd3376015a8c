"""docs/flags.md, written from the flags themselves: `python -m miles.config.docs`."""

from __future__ import annotations

import sys
from pathlib import Path

from .fields import fields, group_types

HEADER = """\
# Flags

Written by `python -m miles.config.docs` from `miles/config/groups.py`; do not edit. Flags take `_` for `-` and `--flag=value`; every switch
has a `--no-` form; of a flag that is given twice the last counts (`--plugin` adds up), and `--flag unset` takes back what a recipe or a file gave. The same names are keys in `--config FILE.yaml`,
below the section named in each heading. *unset* means derived: from config.json, another flag, or the machine; `--print-config` shows each
value with where it came from. `--config`, `--print-config`, `--dry-run` and `--help` are of the command itself.
"""


def flags_markdown() -> str:
    """The whole page: one table per group."""
    parts = [HEADER]
    for group, cls in group_types().items():
        title, _, text = (cls.__doc__ or "").partition(": ")
        rows = [
            f"| `{f.flag}` | {_cell(f.type_text or 'switch')} | {_cell(f.default_text)} | {_cell(f.help)} |"
            for f in fields().values()
            if f.group == group
        ]
        parts.append(
            "\n".join(
                [
                    f"## {title} (`{group}:`)",
                    "",
                    text,
                    "",
                    "| flag | type | default | meaning |",
                    "|---|---|---|---|",
                    *rows,
                    "",
                ]
            )
        )
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(path: str = "docs/flags.md") -> None:
    Path(path).write_text(flags_markdown(), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
