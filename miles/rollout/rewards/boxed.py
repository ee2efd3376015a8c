r"""The content of the last `\boxed{...}`."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def last_box(text: str) -> str | None:
    r"""What the last `\boxed{` or `\fbox{` holds, braces balanced; None without one, or when the last is not closed.

    >>> last_box(r"so \boxed{\frac{1}{2}}, not \boxed{ 2 }")
    '2'
    >>> last_box(r"\boxed{1} or \boxed{2") is None
    True
    """
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth, i = 1, start
    while i < len(text):
        char = text[i]
        if char == "\\":  # \{ and \} are characters of the answer, not structure
            i += 2
            continue
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[start:i].strip()
        i += 1
    return None
