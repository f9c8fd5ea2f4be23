"""Documents -> sequences of one length without a gap.

* A document with pictures stays whole. Each goes, in the input's order, into the first sequence with room for it.
* What is left of these sequences is filled with the input's texts, one behind the other; a text is cut where its
  sequence ends, and goes on in the next one as a document of its own. The texts left then fill further sequences.
* When the texts are used up before a sequence is full, they begin again; where an input has none, its captions do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.sequence import first_fit
from mlx_transfusion.training.image_store import ImageRef
from mlx_transfusion.training.shard_files import TEXT


@dataclass(frozen=True)
class Tokens:
    """One document: its token ids with the pad id at patches, its kind, its pictures, and its row in the input."""

    ids: np.ndarray
    """int32 [length]"""
    kind: int
    pictures: tuple[ImageRef, ...]
    origin: int


@dataclass(frozen=True)
class Packed:
    """Documents and pieces of documents by sequence, and how many positions repeat a text."""

    sequences: list[list[Tokens]]
    repeated: int


class _Texts:
    """Texts one behind the other, without end."""

    def __init__(self, texts: Sequence[Tokens]) -> None:
        self._texts, self._at, self._offset = texts, 0, 0
        self.passes = 0

    def take(self, count: int) -> list[Tokens]:
        """The next `count` positions, as documents and pieces of them."""
        out: list[Tokens] = []
        while count:
            text = self._texts[self._at]
            piece = text.ids[self._offset : self._offset + count]
            out.append(Tokens(piece, TEXT, (), text.origin))
            count -= len(piece)
            self._offset += len(piece)
            if self._offset == len(text.ids):
                self._at, self._offset = (self._at + 1) % len(self._texts), 0
                self.passes += not self._at
        return out


def pack(documents: Sequence[Tokens], captions: Sequence[Tokens], length: int) -> Packed:
    """Sequences of exactly `length` positions that hold every document once.

    captions: what fills up where no document is text. Raises UserError for a document with pictures that is longer,
    and where there is nothing to fill up with.
    """
    whole = [d for d in documents if d.pictures]
    texts = [d for d in documents if not d.pictures]
    fillers = texts or list(captions)
    if not fillers:
        raise UserError("its pictures come without any text, and text has to fill the sequences: add some")
    stream = _Texts(fillers)
    sequences = [
        [whole[i] for i in row] for row in first_fit([len(d.ids) for d in whole], length, longest_first=False)
    ]
    filled = 0
    for sequence in sequences:
        room = length - sum(len(d.ids) for d in sequence)
        sequence += stream.take(room)
        filled += room
    while texts and not stream.passes:
        sequences.append(stream.take(length))
        filled += length
    return Packed(sequences, filled - sum(len(t.ids) for t in texts))
