"""A generation function of one's own: the model may use a calculator before it answers.

    prompt | calc:12+34?  46⏎  46 <end>
           | trained      not  trained

The model asks by writing `calc:12+34?`; we append the result and let it go on. What the model wrote is trained on; what
the calculator wrote is not. Nothing is tokenized twice: the model's tokens come from the engine, ours are encoded once.
"""

from __future__ import annotations

import ast
import operator
import re
from typing import Any

from miles.rollout.context import current
from miles.rollout.generate import generate
from miles.rollout.trajectory import append_observation
from miles.utils.types import Sample

MAX_CALLS = 3
CALL = re.compile(r"calc:([0-9+\-*() ]{1,32})\?$")

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def calculate(expression: str) -> str:
    """The value of a sum, difference or product of integers; "?" for anything else."""

    def value(node: ast.AST) -> int:
        match node:
            case ast.Expression(body=body):
                return value(body)
            case ast.Constant(value=int(number)):
                return number
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
        raise ValueError(expression)

    try:
        return str(value(ast.parse(expression.strip(), mode="eval")))
    except (ValueError, SyntaxError):
        return "?"


async def with_calculator(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Turns of the model, with results of the calculator between them, until it answers without asking."""
    tokenizer = current().tokenizer
    # The text must be all that the tokens say, the "?" that stops a turn included.
    params = {**sampling_params, "stop": [*sampling_params.get("stop", []), "?"], "no_stop_trim": True}
    for _ in range(MAX_CALLS):
        sample = await generate(args, sample, params)
        call = CALL.search(sample.response)
        if sample.status is not Sample.Status.COMPLETED or call is None:
            return sample
        result = f" {calculate(call[1])}\n"
        append_observation(sample, tokenizer.encode(result, add_special_tokens=False), result)
        sample.metadata["calculator_calls"] = sample.metadata.get("calculator_calls", 0) + 1
    return await generate(args, sample, sampling_params)
