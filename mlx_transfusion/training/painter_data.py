"""Training data of a language model that learns to paint: rows as turns of its chat.

A pair is a user's sentence and the picture that answers it; a text alone is a user's turn that words should answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_transfusion import sequence
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.llama_painter_config import LlamaPainterConfig
from mlx_transfusion.picture_sizes import Size
from mlx_transfusion.sequence import Image, Segment, Text
from mlx_transfusion.training.config import SourceConfig
from mlx_transfusion.training.data import DataSet, Document
from mlx_transfusion.training.prefix_data import (
    PrefixBatch,
    padded_prefixes,
    prefix_batch,
    prefix_of,
)
from mlx_transfusion.training.rows import ImageRef, Row


class PainterData(DataSet):
    """Rows whose texts are turns of a user."""

    def __init__(
        self, sources: Sequence[SourceConfig], *, config: LlamaPainterConfig, **keywords: Any
    ) -> None:
        """As DataSet; config: of the model, which knows the tokens around a turn."""
        super().__init__(sources, model=config.pictures, **keywords)
        self._config = config

    def _layout(self, segments: Sequence[str | ImageRef], row: Row, sizes: Sequence[Size]) -> list[Segment]:
        """A turn, and the picture behind it if there is one; a pair whose text was dropped has an empty turn."""
        texts = [s for s in segments if isinstance(s, str)]
        images = len(segments) - len(texts)
        where, c = f"{row.origin[0]}:{row.origin[1]}", self._config
        if len(texts) > 1 or images > 1 or (images and texts and isinstance(segments[0], ImageRef)):
            raise UserError(
                f"{where}: a language model learns to paint from a text and the picture behind it, or a text alone; "
                "set data.caption_first = 1"
            )
        said = self._encode(texts[0]) if texts else ()
        out: list[Segment] = [Text((*c.prompt_before, *said, *c.prompt_after))]
        if images:
            patches = math.prod(c.pictures.grid(sizes[0]))
            out += [Text((c.boi_token_id,)), Image(0, patches), Text((c.eoi_token_id, *c.eos_token_id[:1]))]
        if (tokens := sequence.length(out)) > self._length:
            raise UserError(
                f"{where}: {tokens} tokens do not fit sequence_length {self._length}; raise it or shorten the text"
            )
        return out


@dataclass(frozen=True)
class PainterBatch:
    """Pictures behind their turns, and K turns that words answer; padded rows have weight 0."""

    painted: PrefixBatch
    asked: np.ndarray
    """1 for a picture that somebody asked for, 0 for padding and for an empty turn. float32 [M]"""
    ids: np.ndarray
    """Turns without a picture, padded on the right. int32 [K, S]"""
    lengths: np.ndarray
    """int32 [K]"""
    weight: np.ndarray
    """float32 [K]"""

    @property
    def tokens(self) -> int:
        """Number of positions that are not padding."""
        return self.painted.tokens + int((self.lengths * self.weight).sum())


def painter_batch(data: DataSet, documents: Sequence[Document], config: LlamaPainterConfig) -> PainterBatch:
    """Split documents into pictures and turns without one, and load everything (numpy only)."""
    pictures = [d for d in documents if d.images]
    turns = [turn_of(d) for d in documents if not d.images]
    painted = prefix_batch(data, pictures, config.pictures.pad_token_id)
    asked = np.zeros(len(painted.ids), np.float32)
    asked[: len(pictures)] = [wishes(d, config) for d in pictures]
    ids, lengths = padded_prefixes(turns, config.pictures.pad_token_id)
    if not turns:
        ids, lengths = ids[:0], lengths[:0]
    weight = (np.arange(len(ids)) < len(turns)).astype(np.float32)
    return PainterBatch(painted, asked, ids, lengths, weight)


def turn_of(document: Document) -> list[int]:
    """The tokens of a document without its picture and what stands behind that."""
    found = prefix_of(document) if document.images else None
    return (
        found if found is not None else [i for s in document.segments if isinstance(s, Text) for i in s.ids]
    )


def wishes(document: Document, config: LlamaPainterConfig) -> int:
    """1 where a turn says anything, so that it can be told whether it asks for a picture; else 0."""
    empty = len(config.prompt_before) + len(config.prompt_after) + len(document.images)
    return int(bool(config.prompt_after) and len(turn_of(document)) > empty)
