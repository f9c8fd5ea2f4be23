"""Training data of a converted model: pictures behind their prompts, as its family reads them, and texts alone.

Shapes: M pictures of N patches of P numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mlx_transfusion import noise, sequence
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.family import PictureFamily
from mlx_transfusion.picture_sizes import Size
from mlx_transfusion.sequence import Image, Segment, Text
from mlx_transfusion.training.config import SourceConfig
from mlx_transfusion.training.data import DataSet, Document, Pictures
from mlx_transfusion.training.encoded import EncodedPictures, Name
from mlx_transfusion.training.pixels import load_pixels
from mlx_transfusion.training.rows import ImageRef, Row


class PictureSize(NamedTuple):
    """What reading pictures needs to know of a model."""

    image_height: int
    image_width: int
    image_channels: int = 3

    @property
    def sizes(self) -> tuple[Size, ...]:
        """(height, width) of all pictures that the model learns: one size."""
        return ((self.image_height, self.image_width),)


@dataclass(frozen=True)
class FamilyBatch:
    """One part of a step."""

    prefixes: list[list[int]]
    """Token ids before each picture."""
    prompted: list[bool]
    """Whether the picture's prompt is read, or what guidance puts in its place."""
    names: list[tuple[ImageRef, bool]]
    """Which picture it is, and whether it is mirrored."""
    pictures: Pictures
    """Pixels uint8 [M, H, W, 3], or latents float32 [M, N, P] where they were encoded before; noise [M, N, P], angles
    [M]."""
    texts: list[list[int]]
    """Token ids of texts alone."""

    @property
    def tokens(self) -> int:
        """Number of positions that are read."""
        m, n = self.pictures.noise.shape[:2]
        return sum(map(len, self.prefixes)) + m * n + sum(map(len, self.texts))


class FamilyData(DataSet):
    """Rows as a converted model reads them: a caption is a prompt of `generate`, and no text is learned from it."""

    def __init__(self, sources: Sequence[SourceConfig], *, family: PictureFamily, **keywords: Any) -> None:
        """As DataSet. Raises UserError for a model whose latents are no pictures."""
        if family.picture_channels != 3:
            raise UserError(
                f"a {family.config.model_type} model of {family.picture_channels} channels makes no pictures that it "
                "could learn from"
            )
        self._family = family
        super().__init__(sources, model=PictureSize(*family.picture_size), **keywords)  # type: ignore[arg-type]

    def pictures(self, documents: Sequence[Document], size: Size | None = None) -> Pictures:
        """Load the pictures of some documents and draw noise for their latents."""
        shape = self._family.latent_shape
        drawn = [
            noise.normal(self._seed, (d.number, 0), shape, f"{self._stream}/noise")
            for d in documents
            if d.images
        ]
        refs = [ref for d in documents for ref in d.images]
        flips = [one for d in documents for one in d.flips]
        return Pictures(
            self._pixels[self._model.sizes[0]].load(refs, flips),
            np.stack(drawn) if drawn else np.zeros((0, *shape), np.float32),
            np.array([a for d in documents for a in d.angles], np.float32),
        )

    def names(self) -> list[Name]:
        """All pictures of the rows, mirrored too where some are to be."""
        refs = (s for rows in self.rows for row in rows for s in row.segments if isinstance(s, ImageRef))
        flips = (False, True) if self._data.flip else (False,)
        return [(ref, flip) for ref in dict.fromkeys(refs) for flip in flips]

    def pixels(self, name: Name) -> np.ndarray:
        """One picture, uint8 [1, H, W, 3], which is not kept. Raises UserError when it cannot be read."""
        return load_pixels([name[0]], *self._model.sizes[0], flips=[name[1]])

    def use(self, encoded: EncodedPictures) -> None:
        """From now on give latents in the place of pixels."""
        self._pixels = {self._model.sizes[0]: encoded}  # type: ignore[dict-item]

    @property
    def has_text(self) -> bool:
        """Whether there are rows of text alone."""
        return any(row.kind == "text" for rows in self.rows for row in rows)

    def _layout(self, segments: Sequence[str | ImageRef], row: Row, sizes: Sequence[Size]) -> list[Segment]:
        """The prompt and the picture, or a text alone. A prompt that was dropped is marked by `loss=False`."""
        where = f"{row.origin[0]}:{row.origin[1]}"
        captions = [s for s in row.segments if isinstance(s, str)]
        images = sum(isinstance(s, ImageRef) for s in segments)
        last = isinstance(segments[-1], ImageRef)
        if row.kind not in ("pair", "text") or images > 1 or (images and not last):
            raise UserError(
                f"{where}: a converted model learns from a caption and the picture behind it, or from a text alone; "
                "set data.caption_first = 1"
            )
        layout = self._family.config.layout
        if images:
            ids = self._family.image_prefix(self._encode(self._family.prompt_text(captions[0])))
            out: list[Segment] = [
                Text(tuple(ids), loss=len(segments) > 1),
                Image(0, self._family.latent_shape[0]),
            ]
        else:
            ends = [[i for i in (layout.bos,) if i is not None], list(layout.eos[:1])]
            out = [Text((*ends[0], *self._encode(captions[0]), *ends[1]))]
        if (tokens := sequence.length(out)) > self._length:
            raise UserError(
                f"{where}: {tokens} tokens do not fit sequence_length {self._length}; raise it or shorten the text"
            )
        return out

    def count(self, document: Document) -> tuple[int, int]:
        """(text-loss tokens, pictures) of a document."""
        if document.images:
            return 0, 1
        return sequence.length(document.segments) - 1, 0


def family_batch(data: DataSet, documents: Sequence[Document]) -> FamilyBatch:
    """Split documents into pictures behind their prompts and texts, and load everything (numpy only)."""
    painted = [d for d in documents if d.images]
    before = [d.segments[0] for d in painted]
    return FamilyBatch(
        [list(s.ids) for s in before if isinstance(s, Text)],
        [s.loss for s in before if isinstance(s, Text)],
        [(d.images[0], d.flips[0]) for d in painted],
        data.pictures(painted),
        [list(s.ids) for d in documents if not d.images for s in d.segments if isinstance(s, Text)],
    )
