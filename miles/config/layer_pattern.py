"""Which layers have something, as Megatron's flags write it: every N-th, or a list such as `[0]*3+[1]*58`."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from itertools import groupby

#: More layers than any model has.
_MOST = 10_000


def repeated(pattern: Sequence[int]) -> str:
    """[0, 0, 1] -> `[0]*2+[1]*1`"""
    return "+".join(f"[{value}]*{len(list(run))}" for value, run in groupby(pattern))


def listed(text: str) -> list[int] | int:
    """The list, or the number, that `text` writes: numbers, lists, `+` and `*`. Raises ValueError."""
    try:
        found = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("it is neither a number nor a list such as [0]*3+[1]*58") from None
    if isinstance(found, list) and not set(found) <= {0, 1}:
        raise ValueError("a list has a 1 for each layer that has it, and a 0 for others")
    return found


def expanded(text: str, num_layers: int) -> list[int]:
    """[num_layers] as Megatron reads a number for layers of a kind: every N-th, the first among them, has it."""
    found = listed(text)
    return found if isinstance(found, list) else [int(i % max(found, 1) == 0) for i in range(num_layers)]


def linear_layers(text: str, num_layers: int) -> list[int]:
    """[num_layers] the same of linear attention: every N-th layer, the N-th among them, does not have it."""
    found = listed(text)
    return found if isinstance(found, list) else [int((i + 1) % max(found, 1) != 0) for i in range(num_layers)]


def _value(node: ast.expr) -> list[int] | int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        items = [_value(item) for item in node.elts]
        if all(isinstance(item, int) for item in items):
            return [item for item in items if isinstance(item, int)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(left, int):
            left, right = right, left
        if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
            if len(left) * right > _MOST:
                raise ValueError(f"it lists more than {_MOST} layers")
            return left * right
    raise ValueError("it is neither a number nor a list such as [0]*3+[1]*58")
