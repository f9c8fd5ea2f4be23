"""The batch of a distillation step: pictures behind their prefixes, and all other documents packed as in training.

A document that ends with its only picture is split there. The prefix (BOS, caption, BOI) cannot see the picture,
so its keys and values are read once and serve the teacher's and the student's passes over the picture's own tokens.
So is an edit, whose prefix (BOS, source, instruction, BOI) holds a clean picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from mlx_transfusion import noise, sequence
from mlx_transfusion.picture_sizes import Size
from mlx_transfusion.sequence import Image, Text
from mlx_transfusion.training.data import (
    PICTURE_MULTIPLE,
    TOKEN_MULTIPLE,
    Batch,
    DataSet,
    Document,
    Pictures,
    filled_up,
)

COLUMN_MULTIPLE = 4
"""Step of prefix lengths, as PICTURE_MULTIPLE is of the number of pictures: compiled shapes stay few."""
PLACE = -1
"""What stands for a patch in a prefix's tokens."""
GUIDANCE_STREAM = "train/guidance"
"""The draw of a document's guidance scale, at its number (noise.py)."""


class Sources(NamedTuple):
    """The clean pictures in the prefixes of edits."""

    pixels: np.ndarray
    """uint8 [M, H, W, C], or float32 latents; zeros for a prefix without one"""
    start: np.ndarray
    """Column of the first patch; -1 for a prefix without one. int32 [M]"""
    alone: np.ndarray
    """The prefixes without caption or instruction, which guidance leads away from. int32 [M, S]"""
    alone_lengths: np.ndarray
    """int32 [M]"""


@dataclass(frozen=True)
class PrefixBatch:
    """M pictures, each behind its own prefix; padded rows have weight 0."""

    ids: np.ndarray
    """Prefix tokens, padded on the right. int32 [M, S]"""
    lengths: np.ndarray
    """int32 [M]"""
    weight: np.ndarray
    """1 for a real picture, 0 for padding. float32 [M]"""
    pictures: Pictures
    text_index: np.ndarray
    """Flat prefix positions whose next token is predicted; padded by 0. int32 [K]"""
    text_target: np.ndarray
    """int32 [K]"""
    text_weight: np.ndarray
    """float32 [K]"""
    patches: int
    """Tokens of one picture."""
    rest: Batch | None
    """The other documents: text alone, text behind a picture, several pictures."""
    size: Size | None = None
    """(height, width) of the pictures, in elements; None of the model's own."""
    guidance: np.ndarray | None = None
    """Guidance scale of each picture, where they have scales of their own. float32 [M]"""
    sources: Sources | None = None
    """What stands in the prefixes of edits, where there are any."""
    more: tuple[PrefixBatch, ...] = ()
    """The pictures of the model's further sizes; `rest` stands here alone."""

    @property
    def groups(self) -> tuple[PrefixBatch, ...]:
        """The pictures of each size."""
        return self, *self.more

    @property
    def text_targets(self) -> int:
        """Number of tokens in the language-model loss."""
        more = sum(batch.text_targets for batch in self.more)
        return int(self.text_weight.sum()) + (self.rest.text_targets if self.rest else 0) + more

    @property
    def tokens(self) -> int:
        """Number of positions that are not padding."""
        real = int(self.weight.sum())
        own = int(self.lengths[:real].sum()) + real * self.patches
        return own + (self.rest.tokens if self.rest else 0) + sum(batch.tokens for batch in self.more)


def prefix_of(document: Document, edits: bool = False) -> list[int] | None:
    """The tokens before the picture of a document that ends with its only picture; None for any other.

    edits: also those before an edit's new picture, with PLACE for each patch of the source.
    """
    places = [i for i, s in enumerate(document.segments) if isinstance(s, Image)]
    if not places or sequence.length(document.segments[places[-1] + 1 :]) != 2:  # EOI, EOS
        return None
    if len(places) > 1 and not (edits and _is_edit(document)):
        return None
    before = document.segments[: places[-1]]
    return [i for s in before for i in (s.ids if isinstance(s, Text) else [PLACE] * s.patches)]


def _is_edit(document: Document) -> bool:
    """Whether the document is a clean picture and another one of its size."""
    return len(document.images) == 2 and document.angles[0] == 0 and len(set(document.sizes)) == 1


def count(data: DataSet, document: Document, edits: bool = False) -> tuple[int, int]:
    """(text-loss tokens, pictures with a consistency loss) of a document; arguments as of `prefix_of`."""
    prefix = prefix_of(document, edits)
    if prefix is None:
        return data.count(document)[0], 0
    return _learned(document, prefix), 1


def _learned(document: Document, prefix: list[int]) -> int:
    """How many tokens of a prefix are predicted: none of an edit, whose instruction comes from the user."""
    return len(prefix) - 1 if len(document.images) == 1 else 0


def prefix_batch(
    data: DataSet,
    documents: Sequence[Document],
    pad_id: int = 0,
    sizes: Sequence[Size | None] = (None,),
    edits: bool = False,
) -> PrefixBatch:
    """Split documents into pictures behind prefixes and the rest, and load everything.

    sizes: all that the model learns, where they are several. edits: as of `prefix_of`.
    """
    prefixes = [prefix_of(d, edits) for d in documents]
    painted = [(d, p) for d, p in zip(documents, prefixes, strict=True) if p is not None]
    rest = [d for d, p in zip(documents, prefixes, strict=True) if p is None]
    groups = [
        _painted(data, [(d, p) for d, p in painted if of_size([d], size)], pad_id, size) for size in sizes
    ]
    return replace(groups[0], rest=filled(data.batch(rest)) if rest else None, more=tuple(groups[1:]))


def _painted(
    data: DataSet, painted: Sequence[tuple[Document, list[int]]], pad_id: int, size: Size | None
) -> PrefixBatch:
    """The pictures of one size behind their prefixes."""
    ids, lengths = padded_prefixes([p for _, p in painted], pad_id)
    rows, columns = ids.shape
    learned = [_learned(d, p) for d, p in painted]
    at = [row * columns + i for row, n in enumerate(learned) for i in range(n)]
    tokens = sequence.bucket(len(at), TOKEN_MULTIPLE)
    index = np.pad(np.array(at, np.int32), (0, tokens - len(at)))
    patches = next((s.patches for d, _ in painted for s in d.segments if isinstance(s, Image)), 0)
    every = data.pictures([d for d, _ in painted], size)
    last = np.cumsum([len(d.images) for d, _ in painted], dtype=int) - 1
    return PrefixBatch(
        ids,
        lengths,
        (np.arange(rows) < len(painted)).astype(np.float32),
        filled_up(Pictures(*(values[last] for values in every)), rows),
        index,
        ids.reshape(-1)[np.minimum(index + 1, ids.size - 1)],
        (np.arange(tokens) < len(at)).astype(np.float32),
        patches,
        None,
        size,
        sources=_sources(painted, every.pixels, pad_id),
    )


def padded_prefixes(prefixes: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Prefixes in rows and columns of round numbers: ids int32 [M, S], lengths int32 [M] (1 for a row too many)."""
    rows = sequence.bucket(len(prefixes), PICTURE_MULTIPLE)
    columns = sequence.bucket(max((len(p) for p in prefixes), default=1), COLUMN_MULTIPLE)
    ids = np.full((rows, columns), pad_id, np.int32)
    lengths = np.ones(rows, np.int32)
    for row, prefix in enumerate(prefixes):
        ids[row, : len(prefix)] = prefix
        lengths[row] = len(prefix)
    ids[ids == PLACE] = pad_id
    return ids, lengths


def _sources(
    painted: Sequence[tuple[Document, list[int]]], pixels: np.ndarray, pad_id: int
) -> Sources | None:
    """The sources of the edits among documents with their prefixes; None without any.

    pixels: all pictures of these documents in order.
    """
    if all(len(d.images) == 1 for d, _ in painted):
        return None
    rows = sequence.bucket(len(painted), PICTURE_MULTIPLE)
    start = np.full(rows, -1, np.int32)
    clean = np.zeros((rows, *pixels.shape[1:]), pixels.dtype)
    alone, first = [], 0
    for row, (d, prefix) in enumerate(painted):
        seen = 1  # BOS
        if len(d.images) > 1:
            start[row], clean[row] = prefix.index(PLACE), pixels[first]
            seen = len(prefix) - prefix[::-1].index(PLACE) + 1  # up to EOI
        alone.append([*prefix[:seen], prefix[-1]])
        first += len(d.images)
    return Sources(clean, start, *padded_prefixes(alone, pad_id))


def of_size(documents: Sequence[Document], size: Size | None) -> list[Document]:
    """The documents with a picture of that size; None: all."""
    return [d for d in documents if size in (None, *d.sizes)]


def guidance_scales(
    documents: Sequence[Document], rows: int, low: float, high: float, seed: int
) -> np.ndarray:
    """The scale of each picture of `prefix_batch`, uniform in [low, high): float32 [rows], padding has `low`.

    It depends on the document's number alone, as all its draws do: resuming and other splits change nothing.
    """
    numbers = [d.number for d in documents if prefix_of(d) is not None]
    out = np.full(rows, low, np.float32)
    for row, number in enumerate(numbers):
        out[row] = low + (high - low) * float(noise.uniform(seed, number, (), GUIDANCE_STREAM))
    return out


def filled(batch: Batch) -> Batch:
    """A batch with unused pictures that fill up their number, which would otherwise differ from step to step."""
    count = len(batch.angle)
    if not count or batch.more:  # pictures of several sizes are filled up already
        return batch
    wanted = sequence.bucket(count, PICTURE_MULTIPLE)
    packed = batch.packed
    patches = len(packed.patch_index) // count
    index = np.pad(packed.patch_index, (0, (wanted - count) * patches))
    filled = filled_up(batch.groups[0], wanted)
    return Batch(replace(packed, patch_index=index), *filled)
