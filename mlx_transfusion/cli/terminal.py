"""What the verbs share about output: results on stdout, messages and progress bars on stderr, file names."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mlx_transfusion.errors import UserError


def result(value: str | Mapping[str, Any]) -> None:
    """One result line on stdout; a mapping as JSON. Flushed, so that a reader sees it at once."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    print(text, flush=True)


def message(text: str) -> None:
    """One line for people on stderr."""
    print(text, file=sys.stderr, flush=True)


class Bar(Protocol):
    """A progress bar: `update(done, text)`."""

    def update(self, done: float, text: str = "") -> None: ...


class _NoBar:
    def update(self, done: float, text: str = "") -> None:
        pass


class _RichBar:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def update(self, done: float, text: str = "") -> None:
        self._progress.update(self._task, completed=done, text=text)


@contextmanager
def bar(title: str, total: float) -> Iterator[Bar]:
    """A bar on stderr when that is a terminal, else nothing; it leaves no trace on the screen."""
    if not sys.stderr.isatty():
        yield _NoBar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _RichBar(progress, progress.add_task(title, total=total, text=""))


def picture_path(output: Path, default_name: str = "image.png") -> Path:
    """The file that --output means: a folder gets the default name, a name without suffix gets .png.

    Raises UserError for another suffix: the settings are stored in the PNG.
    """
    if output.is_dir() or not output.name:
        return output / default_name
    if not output.suffix:
        return output.with_suffix(".png")
    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: expected a name that ends in .png, or a folder")
    return output
