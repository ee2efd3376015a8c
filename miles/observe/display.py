"""The terminal: a live line while a step runs, one line per finished step, and the before / after table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text


class Display(Protocol):
    def phase(self, step: int, total_steps: int, name: str) -> None:
        """A phase of `step` begins."""
        ...

    def progress(self, done: int, total: int, tokens: int) -> None:
        """Within the phase: groups done of total, tokens generated."""
        ...

    def step(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """A step is finished."""
        ...

    def note(self, text: str) -> None: ...
    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None: ...
    def close(self) -> None: ...


def make_display(kind: str = "auto") -> Display:
    """`rich`: live; `plain`: one line per step; `none`: notes and tables only; `auto`: live on a terminal, else plain."""
    if kind == "auto":
        kind = "rich" if sys.stdout.isatty() else "plain"
    return RichDisplay() if kind == "rich" else PlainDisplay(steps=kind != "none")


def step_line(step: int, total_steps: int, metrics: Mapping[str, float]) -> str:
    """One finished step in one line; only what is there is shown."""
    parts = [f"step {step}/{total_steps}"]
    for label, key, form in (
        ("reward", "rollout/raw_reward", ".3f"),
        ("loss", "train/loss", "+.4f"),
        ("grad", "train/grad_norm", ".3f"),
        ("|Δlogp|", "train/train_rollout_logprob_abs_diff", ".1e"),
        ("len", "rollout/response_len/mean", ".1f"),
        ("tok/s", "perf/rollout_tokens_per_s", ".0f"),
        ("s", "perf/step_time", ".2f"),
    ):
        value = metrics.get(key)
        if value is not None:
            parts.append(f"{label} {value:{form}}")
    scores = {k: v for k, v in metrics.items() if k.startswith("eval/") and k.count("/") == 1}
    parts += [f"{key} {value:.3f}" for key, value in scores.items()]
    return "  ".join(parts)


class PlainDisplay:
    """For logs and pipes: no escape codes, no partial lines."""

    def __init__(self, *, steps: bool = True):
        self._steps = steps
        # A pipe has no width; wide enough that rich wraps nothing by itself.
        self._console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=True)

    def phase(self, step: int, total_steps: int, name: str) -> None:
        pass

    def progress(self, done: int, total: int, tokens: int) -> None:
        pass

    def step(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        if self._steps:
            self._print(step_line(step, total_steps, metrics))

    def note(self, text: str) -> None:
        self._print(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._console.print(_table(title, columns, rows))
        sys.stdout.flush()

    def close(self) -> None:
        pass

    def _print(self, text: str) -> None:
        self._console.print(Text(text))
        sys.stdout.flush()


class RichDisplay:
    """For people: the running phase on a live line below the finished steps."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, refresh_per_second=8, transient=True, get_renderable=self._status)
        self._step = self._total_steps = 0
        self._phase = "starting"
        self._since = time.monotonic()
        self._done = self._total = self._tokens = 0
        self._live.start()

    def _status(self) -> Text:
        elapsed = time.monotonic() - self._since
        text = f"▸ step {self._step}/{self._total_steps}  {self._phase}  {elapsed:.1f} s"
        if self._total:
            text += f"  {self._done}/{self._total} groups  {self._tokens / max(elapsed, 1e-3):.0f} tok/s"
        return Text(text, style="dim")

    def phase(self, step: int, total_steps: int, name: str) -> None:
        self._step, self._total_steps, self._phase = step, total_steps, name
        self._since = time.monotonic()
        self._done = self._total = self._tokens = 0

    def progress(self, done: int, total: int, tokens: int) -> None:
        self._done, self._total, self._tokens = done, total, tokens

    def step(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        self._console.print(Text(step_line(step, total_steps, metrics)))

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._console.print(_table(title, columns, rows))

    def close(self) -> None:
        self._live.stop()


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table
