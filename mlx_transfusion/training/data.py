"""From rows to the arrays of one training step.

A batch is a pure function of (seed, step): which rows, in which order, with which noise and angles. So resuming
needs no data position beyond the step number, and the numbers are the same on any backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_transfusion import noise, sequence
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.sequence import Image, PackedBatch, Segment, Text
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import DataConfig, DiffusionConfig, SourceConfig
from mlx_transfusion.training.latents import LatentFiles
from mlx_transfusion.training.pixels import BYTES_PER_GIB, PixelCache
from mlx_transfusion.training.rows import ImageRef, Row, Source, load_rows

TOKEN_MULTIPLE = 256
"""Step of the number of text-loss positions, and ROW_MULTIPLE of packed rows: compiled shapes stay few."""
ROW_MULTIPLE = 4


@dataclass(frozen=True)
class Batch:
    """One packed batch with its pictures, noise and angles (all numpy)."""

    packed: PackedBatch
    pixels: np.ndarray
    """uint8 [M, H, W, C], or float32 latents"""
    noise: np.ndarray
    """float32 [M, H, W, C], added before patchifying"""
    angle: np.ndarray
    """float32 [M], radians"""

    @property
    def text_targets(self) -> int:
        """Number of tokens in the language-model loss."""
        return int(self.packed.text_weight.sum())

    @property
    def tokens(self) -> int:
        """Number of positions that are not padding."""
        return self.packed.tokens


class Pictures(NamedTuple):
    """The pictures of some documents, in order, with their noise and angles."""

    pixels: np.ndarray
    """uint8 [M, H, W, C], or float32 latents"""
    noise: np.ndarray
    """float32 [M, H, W, C]"""
    angle: np.ndarray
    """float32 [M], radians"""


@dataclass(frozen=True)
class Document:
    """One row made ready: its segments (images numbered inside the document), pictures and draws."""

    segments: list[Segment]
    images: list[ImageRef]
    flips: list[bool]
    angles: list[float]
    number: int
    """The document's number in the whole run: the address of its random draws."""


class DataSet:
    """The rows of some sources, drawn in a fixed share of every batch and a fresh order every epoch."""

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        data: DataConfig,
        diffusion: DiffusionConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        *,
        seed: int,
        sequence_length: int,
        stream: str = "train",
    ) -> None:
        """Reads all rows (not the pictures). Raises UserError for bad files and rows."""
        self._data, self._diffusion, self._model, self._tokenizer = data, diffusion, model, tokenizer
        self._seed, self._length, self._stream = seed, sequence_length, stream
        self.rows: list[list[Row]] = []
        self.bad_rows: list[str] = []
        for s in sources:
            loaded = load_rows(
                rows_of(s),
                skip_bad_rows=data.skip_bad_rows,
                check_images=data.check_images,
            )
            self.rows.append(loaded.rows)
            self.bad_rows += loaded.bad_rows
        self._weights = [s.weight for s in sources]
        self._pixels = self._open_pictures()
        self._ids: dict[str, tuple[int, ...]] = {}

    def _open_pictures(self) -> LatentFiles | PixelCache:
        """What gives the pictures. Raises UserError where that is not what the model learns."""
        m, data = self._model, self._data
        if data.latents:
            shape = (m.image_height, m.image_width, m.image_channels)
            return LatentFiles(data.latents, shape)
        if m.image_channels != 3:
            raise UserError(
                f"[model]: image_channels is {m.image_channels}, and pictures have 3: encode them with an "
                "autoencoder, and name the file in data.latents"
            )
        limit = int(data.cache_gib * BYTES_PER_GIB)
        return PixelCache(m.image_height, m.image_width, threads=data.threads, limit_bytes=limit)

    @property
    def latents_of(self) -> str | None:
        """Fingerprint of the autoencoder that made the latents or codes; None of pixels."""
        return self._pixels.fingerprint if isinstance(self._pixels, LatentFiles) else None

    @property
    def name_of_latents(self) -> str:
        """Where the latents lie, for messages."""
        return self._data.latents[0]

    def documents(self, step: int, size: int, progress: float = 0.0) -> list[Document]:
        """The `size` documents of a step. `progress` in [0, 1] moves the share of high noise."""
        out: list[Document] = []
        for s, count in enumerate(shares(self._weights, size)):
            for k in range(count):
                number = step * size + len(out)
                row = self._draw(s, step * count + k)
                out.append(self._document(row, number, progress))
        return out

    def count(self, document: Document) -> tuple[int, int]:
        """(text-loss tokens, images in the loss) of a document: its part of the step's totals."""
        previous_is_text, tokens = False, 0
        for s in document.segments:
            if isinstance(s, Text):
                tokens += (len(s.ids) - (not previous_is_text)) * s.loss
            previous_is_text = isinstance(s, Text)
        return tokens, sum(angle > 0 for angle in document.angles)

    def batch(self, documents: Sequence[Document]) -> Batch:
        """Pack documents and load their pictures."""
        return Batch(self.pack(documents), *self.pictures(documents))

    def pack(self, documents: Sequence[Document]) -> PackedBatch:
        """The rows of some documents; nothing of their pictures is read."""
        packed: list[list[Segment]] = []
        first = 0
        for d in documents:
            packed.append(
                [Image(first + s.index, s.patches) if isinstance(s, Image) else s for s in d.segments]
            )
            first += len(d.images)
        return sequence.pack(
            packed,
            self._length,
            pad_id=self._model.pad_token_id,
            row_multiple=ROW_MULTIPLE,
            text_multiple=TOKEN_MULTIPLE,
        )

    def pictures(self, documents: Sequence[Document]) -> Pictures:
        """Load the pictures of some documents and draw their noise."""
        m = self._model
        shape = (m.image_height, m.image_width, m.image_channels)
        noises = [
            noise.normal(self._seed, (d.number, i), shape, f"{self._stream}/noise")
            for d in documents
            for i in range(len(d.images))
        ]
        refs = [ref for d in documents for ref in d.images]
        flips = [one for d in documents for one in d.flips]
        return Pictures(
            self._pixels.load(refs, flips),
            np.stack(noises) if noises else np.zeros((0, *shape), np.float32),
            np.array([a for d in documents for a in d.angles], np.float32),
        )

    def _draw(self, source: int, index: int) -> Row:
        rows = self.rows[source]
        epoch, place = divmod(index, len(rows))
        return rows[_order(self._seed, source, epoch, len(rows), self._stream)[place]]

    def _document(self, row: Row, number: int, progress: float) -> Document:
        u = noise.uniform(self._seed, number, (2,), f"{self._stream}/order")
        segments: list[str | ImageRef] = list(row.segments)
        if row.kind == "pair":
            if u[0] >= self._data.caption_first:
                segments.reverse()
            elif u[1] < self._data.caption_drop:
                segments = [s for s in segments if isinstance(s, ImageRef)]
        elif row.kind == "edit":
            segments = self._edit(segments, float(u[0]))
        images = [s for s in segments if isinstance(s, ImageRef)]
        draws = noise.uniform(self._seed, number, (len(images), 4), f"{self._stream}/image")
        angles: list[float] = []
        for i, s in enumerate(segments):
            if isinstance(s, ImageRef):
                text_follows = any(isinstance(later, str) for later in segments[i + 1 :])
                angles.append(draw_angle(self._diffusion, draws[len(angles)], text_follows, progress))
        flips = [bool(d[3] < self._data.flip) for d in draws]
        if row.kind == "edit":
            angles[:-1] = [0.0] * (len(images) - 1)  # the source is given, not learned: it stays clean
            flips = flips[:1] * len(images)
        return Document(self._layout(segments, row), images, flips, angles, number)

    def _edit(self, segments: list[str | ImageRef], u: float) -> list[str | ImageRef]:
        """Source, instruction and target; sometimes less, for the branches of guidance (arXiv 2211.09800, 3.2.1)."""
        source, _, target = segments
        if u < self._data.source_drop:
            return [target]
        return [source, target] if u < self._data.source_drop + self._data.instruction_drop else segments

    def _layout(self, segments: Sequence[str | ImageRef], row: Row) -> list[Segment]:
        out: list[Segment] = []
        count = 0
        for s in segments:
            if isinstance(s, str):
                out.append(Text(self._encode(s), loss=row.kind != "edit"))  # nobody asks it for instructions
            else:
                out.append(Image(count, self._model.patches_per_image))
                count += 1
        whole = sequence.document(out, self._model)
        excess = sequence.length(whole) - self._length
        if excess > 0 and not count:
            # Long text alone is cut: the loss of what is left is still right. EOS goes with the cut part.
            ids = [i for s in whole if isinstance(s, Text) for i in s.ids]
            return [Text(tuple(ids[: self._length]))]
        if excess > 0:
            raise UserError(
                f"{row.origin[0]}:{row.origin[1]}: {sequence.length(whole)} tokens do not fit "
                f"sequence_length {self._length}; raise it or shorten the text"
            )
        return whole

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = self._ids.get(text)
        if ids is None:
            ids = self._ids[text] = tuple(self._tokenizer.encode(text))
        return ids


def rows_of(source: SourceConfig) -> Source:
    """The file of rows that a source names. Raises UserError when it names shards."""
    if source.rows is None:
        raise UserError(f"{source.shards}: shards are read in training of whole models alone: give rows here")
    return Source(Path(source.rows), Path(source.images) if source.images else None, source.weight)


def shares(weights: Sequence[float], size: int) -> list[int]:
    """Whole numbers in proportion to `weights` that sum to `size` (largest remainders); each source gets one."""
    total = sum(weights)
    exact = [w / total * size for w in weights]
    counts = [max(1, int(x)) for x in exact]
    if sum(counts) > size:
        raise UserError(f"batch_size {size} is too small for {len(weights)} sources with weights {weights}")
    for i in sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])[: size - sum(counts)]:
        counts[i] += 1
    return counts


def draw_angle(config: DiffusionConfig, u: np.ndarray, text_follows: bool, progress: float = 0.0) -> float:
    """One noise angle in radians from uniform numbers u [>= 3].

    A picture that text follows is kept below `image_first_limit` (arXiv 2408.11039, table 8): the text that
    describes it reads the noised picture.
    """
    if text_follows:
        return float(u[0] * config.image_first_limit)
    first, last = config.high_noise_share
    if u[2] < first + (last - first) * progress:
        return float(config.high_noise_from + u[0] * (math.pi / 2 - config.high_noise_from))
    if config.distribution == "uniform":
        return float(u[0] * math.pi / 2)
    normal = math.sqrt(-2 * math.log1p(-float(u[0]))) * math.cos(2 * math.pi * float(u[1]))  # Box-Muller
    return math.atan(math.exp(config.mean + config.std * normal))


@lru_cache(maxsize=16)
def _order(seed: int, source: int, epoch: int, n: int, stream: str) -> np.ndarray:
    return noise.permutation(seed, (epoch, source), n, f"{stream}/rows")
