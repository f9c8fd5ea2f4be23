"""Ctrl-C between two steps, so that what is saved is one whole step."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class Interrupt:
    """Notes the first Ctrl-C in `requested` instead of raising it; the second raises KeyboardInterrupt.

    A KeyboardInterrupt in the middle of a step would find the optimiser one step ahead of the weights. Only the
    main thread can watch for it, and only where nobody else does: elsewhere this changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._watching = False

    def __enter__(self) -> Interrupt:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._watching = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watching:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)


@contextmanager
def terminated(interrupt: Interrupt) -> Iterator[None]:
    """SIGTERM, which Slurm and torchrun send before they kill, asks for a last checkpoint as Ctrl-C does."""

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.requested = True

    try:
        before = signal.signal(signal.SIGTERM, note)
    except ValueError:  # not the main thread: nobody asks
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
