"""A configuration that is refused, in the one form that problems have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from miles.config import make_config
from miles.errors import ConfigError


def refused(flags: Mapping[str, Any], line: str) -> None:
    """`flags` have one problem, whose line begins with `line` and says how to mend it."""
    with pytest.raises(ConfigError) as caught:
        make_config(**flags)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(line)
    assert "; " in lines[0], "it says how to mend it"
