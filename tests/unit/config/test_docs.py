"""docs/flags.md and the help texts are those of the fields."""

from __future__ import annotations

from pathlib import Path

from miles.config.docs import flags_markdown
from miles.config.fields import fields, group_types

ROOT = Path(__file__).parents[3]


def test_flags_md_is_up_to_date() -> None:
    written = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert written == flags_markdown(), "run `python -m miles.config.docs`"


def test_every_flag_has_help_and_every_group_a_title() -> None:
    for field in fields().values():
        assert field.help.endswith((".", ")")), field.flag
    for group, cls in group_types().items():
        assert (cls.__doc__ or "").startswith(f"{group.upper()}: "), group
