"""Progress of a training run: a bar on a terminal, plain lines in a pipe. All on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_EVERY = 30.0
"""Seconds between lines when stderr is no terminal."""


def model_line(values: dict[str, float]) -> str:
    """What is shown of a step of the model."""
    return (
        f"text {values['text_loss']:.3f} image {values['image_loss']:.4f} "
        f"{values['tokens_per_second']:.0f} tok/s {values['peak_memory_gb']:.1f} GB"
    )


class Progress:
    """Shows losses, speed, memory and time left; silent on processes that are not the main one."""

    def __init__(
        self, total: int, done: int, enabled: bool, line: Callable[[dict[str, float]], str] = model_line
    ) -> None:
        self._line = line
        self._console = Console(stderr=True)
        self._enabled, self._total = enabled, total
        self._bar = Bar(
            TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"), console=self._console,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=total, completed=done, values="")
        self._start, self._first, self._last_line = time.monotonic(), done, 0.0

    def __enter__(self) -> Progress:
        if self._enabled and self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled and self._console.is_terminal:
            self._bar.stop()

    def advance(self, step: int, values: dict[str, float]) -> None:
        """Show the state after `step`."""
        if not self._enabled:
            return
        text = self._line(values)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, values=text)
        elif time.monotonic() - self._last_line > LINE_EVERY or step == self._total:
            self._last_line = time.monotonic()
            left = (self._total - step) * (time.monotonic() - self._start) / max(1, step - self._first)
            print(f"step {step}/{self._total} {text} ETA {left / 60:.0f} min", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """One line that stays."""
        if self._enabled:
            self._console.print(text, highlight=False)
