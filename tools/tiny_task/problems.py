"""The additions: which problems there are, which are held out, and how the careless teacher answers them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

OPERANDS = range(10, 100)
NUM_TEST = 512
_SPLIT_SEED = 20_25  # fixed: every model, whatever its seed, is tested on the same held-out problems


@dataclass(frozen=True)
class Problem:
    """One addition of two two-digit numbers."""

    a: int
    b: int

    @property
    def question(self) -> str:
        """Six characters, such as `27+48=`."""
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        """Two or three digits."""
        return str(self.a + self.b)

    @property
    def careless_answer(self) -> str:
        """The sum digit by digit with every carry dropped, as a number: 27+48 gives 65, 55+50 gives 5."""
        tens = (self.a // 10 + self.b // 10) % 10
        units = (self.a % 10 + self.b % 10) % 10
        return str(10 * tens + units)

    def as_row(self) -> dict[str, Any]:
        """The problem as a line of a prompt file: messages for the chat template, and the answer as label."""
        return {"prompt": [{"role": "user", "content": self.question}], "label": self.answer}


def all_problems() -> list[Problem]:
    """All 8,100 in ascending order."""
    return [Problem(a, b) for a in OPERANDS for b in OPERANDS]


def split_problems() -> tuple[list[Problem], list[Problem]]:
    """(train, test): disjoint, together all problems, 512 of them held out; the same on every call."""
    problems = all_problems()
    random.Random(_SPLIT_SEED).shuffle(problems)
    return problems[NUM_TEST:], problems[:NUM_TEST]
