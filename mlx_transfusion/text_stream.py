"""Token ids that arrive one by one -> text that never changes again once it is given out."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_transfusion.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"


class TextStream:
    """Decodes a growing run of text tokens.

    Held back are bytes that do not make a character yet, and an end that may become a stop text.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        """before: ids of the text that the run continues; it decides whether a space comes first."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids = list(before)
        self._given = self._start = len(tokenizer.decode(self._ids))
        self._new: list[int] = []
        self.stopped = False
        """Whether a stop text has come; it and all behind it are left out."""

    def push(self, token: int) -> tuple[str, tuple[int, ...]]:
        """Add a token; returns the text that is certain now and the ids it came from, ("", ()) for none."""
        self._ids.append(token)
        self._new.append(token)
        text = self._tokenizer.decode(self._ids)
        cuts = [at for stop in self._stop if (at := text.find(stop, self._start)) >= 0]
        if cuts:
            self.stopped = True
            return self._give(text, min(cuts))
        return self._give(text, len(text) - self._held(text))

    def flush(self) -> tuple[str, tuple[int, ...]]:
        """The rest, when no more tokens come."""
        text = self._tokenizer.decode(self._ids)
        return ("", ()) if self.stopped else self._give(text, len(text))

    def _give(self, text: str, end: int) -> tuple[str, tuple[int, ...]]:
        new = text[self._given : end]
        if not new:
            return "", ()
        self._given = end
        ids, self._new = tuple(self._new), []
        return new, ids

    def _held(self, text: str) -> int:
        """How many characters at the end may still change or become a stop text."""
        solid = text.rstrip(_UNFINISHED)
        held = len(text) - len(solid)
        for stop in self._stop:
            for n in range(min(len(stop) - 1, len(solid) - self._start), 0, -1):
                if solid.endswith(stop[:n]):
                    held = max(held, len(text) - len(solid) + n)
                    break
        return held
