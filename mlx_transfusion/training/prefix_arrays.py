"""The pictures of a PrefixBatch as mlx arrays, and how a model reads and paints behind their prefixes."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.layers import KeysValues
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.painting import paint_after
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.training.prefix_data import PrefixBatch, Sources
from mlx_transfusion.training.step import clean_patches, noised


class PictureArrays(NamedTuple):
    """The pictures of a PrefixBatch as mlx arrays."""

    ids: mx.array  # int32 [M, S]
    lengths: mx.array  # int32 [M]
    weight: mx.array  # float32 [M]
    x: mx.array  # noisy patches [M, N, P]
    angle: mx.array  # float32 [M]
    sample_velocity: mx.array  # cos(a) times the velocity of the sample itself [M, N, P]
    guidance: mx.array | None = None  # scales [M], where pictures have scales of their own
    sources: tuple[mx.array, ...] | None = None  # a SourceArrays, where some prefixes are edits

    @property
    def prefixes(self) -> tuple[mx.array, ...]:
        """The prefixes, as `Transfusion.read_prefix` takes them."""
        return (self.ids, *(self.sources or ())[:2])

    def first(self, count: int) -> PictureArrays:
        """The first pictures alone."""
        return tree_map(lambda a: None if a is None else a[:count], self)


class SourceArrays(NamedTuple):
    """The Sources of a PrefixBatch as mlx arrays."""

    clean: mx.array  # patches [M, N, P]
    start: mx.array  # int32 [M]
    alone: mx.array  # int32 [M, S]
    alone_lengths: mx.array  # int32 [M]


class TextArrays(NamedTuple):
    """Positions of the language-model loss, [K] each."""

    position: mx.array
    target: mx.array
    weight: mx.array


def arrays_of(batch: PrefixBatch, model: Transfusion) -> tuple[PictureArrays, TextArrays]:
    """Noise the pictures and hand everything but the rest to mlx."""
    x0 = clean_patches(model, batch.pictures.pixels)
    x, angle, _, velocity = noised(x0, batch.pictures, model.config.patch_size)
    pictures = PictureArrays(
        mx.array(batch.ids),
        mx.array(batch.lengths),
        mx.array(batch.weight),
        x,
        angle,
        mx.cos(angle)[:, None, None] * velocity,
        None if batch.guidance is None else mx.array(batch.guidance),
        None if batch.sources is None else _source_arrays(batch.sources, model),
    )
    texts = TextArrays(*(mx.array(t) for t in (batch.text_index, batch.text_target, batch.text_weight)))
    return pictures, texts


def _source_arrays(sources: Sources, model: Transfusion) -> SourceArrays:
    """The sources of edits for mlx."""
    start, alone, lengths = (mx.array(a) for a in sources[1:])
    return SourceArrays(clean_patches(model, sources.pixels), start, alone, lengths)


def without_text(model: Transfusion, p: PictureArrays) -> tuple[list[KeysValues], mx.array]:
    """What guidance leads away from, and its lengths [M]: BOS and BOI, of an edit with the source between them."""
    if p.sources is not None:
        clean, start, alone, lengths = p.sources
        return model.read_prefix(alone, clean, start)[1], lengths
    c, m = model.config, p.x.shape[0]
    _, read = model.read_prefix(mx.array([[c.bos_token_id, c.boi_token_id]]))
    return [(mx.repeat(k, m, 0), mx.repeat(v, m, 0)) for k, v in read], mx.full((m,), 2)


def painted(model: Transfusion, p: PictureArrays, settings: GenerationSettings) -> mx.array:
    """Clean patches [M, N, P] behind each prefix, at the seeds 0 to M - 1."""

    def cache(read: list[KeysValues], lengths: mx.array) -> KVCache:
        out = model.new_cache(len(lengths))
        columns = read[0][0].shape[2]
        out.append(read, np.arange(columns) < np.array(lengths)[:, None])
        return out

    resolved, guide = settings.resolve(), None
    if resolved.guidance != 1 and not model.guidance_condition:
        guide = cache(*without_text(model, p))
    read = cache(model.read_prefix(*p.prefixes)[1], p.lengths)
    return paint_after(model, read, list(range(read.batch)), resolved, guide=guide)
