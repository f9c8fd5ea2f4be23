"""From rows to the arrays of one training step.

A batch is a pure function of (seed, step): which rows, in which order, with which noise and angles. So resuming
needs no data position beyond the step number, and the numbers are the same on any backend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_transfusion import noise, sequence
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.picture_sizes import Size, best, nearest
from mlx_transfusion.sequence import Image, PackedBatch, Segment, Text
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import DataConfig, DiffusionConfig, SourceConfig
from mlx_transfusion.training.latents import LatentFiles, latents_by_size
from mlx_transfusion.training.pixels import BYTES_PER_GIB, PixelCache, image_size
from mlx_transfusion.training.rows import ImageRef, Row, Source, load_rows

TOKEN_MULTIPLE = 256
"""Step of the number of text-loss positions, ROW_MULTIPLE of packed rows, and PICTURE_MULTIPLE of pictures where
their number varies: compiled shapes stay few."""
ROW_MULTIPLE = 4
PICTURE_MULTIPLE = 8


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
    more: tuple[Pictures, ...] = ()
    """The pictures of each further size of the model."""

    @property
    def groups(self) -> tuple[Pictures, ...]:
        """The pictures of each size; in several sizes, black ones without noise fill them up to a round number."""
        return Pictures(self.pixels, self.noise, self.angle), *self.more

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
    sizes: list[Size]
    """(height, width) that each picture is brought to."""


class Share(NamedTuple):
    """Rows that have a fixed share of every batch."""

    rows: list[Row]
    weight: float
    size: Size
    """Of each row's last picture."""


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
        self._pixels = self._open_pictures()
        self._size: dict[ImageRef, Size] = {}
        self._shares = [
            share for s, rows in zip(sources, self.rows, strict=True) for share in self._split(s, rows)
        ]
        self._check_latents()
        self._ids: dict[str, tuple[int, ...]] = {}

    def _check_latents(self) -> None:
        """Raises UserError for pictures without latents, before the run and not when one is drawn."""
        for share in self._shares:
            for row in share.rows:
                images = [s for s in row.segments if isinstance(s, ImageRef)]
                for ref, size in zip(images, self._sizes(images, share.size), strict=True):
                    pictures = self._pixels[size]
                    if isinstance(pictures, LatentFiles):
                        pictures.place(ref, self._data.flip > 0)

    def _open_pictures(self) -> Mapping[Size, LatentFiles | PixelCache]:
        """What gives the pictures of each size. Raises UserError where that is not what the model learns."""
        m, data = self._model, self._data
        if data.latents:
            return latents_by_size(data.latents, m.sizes, m.image_channels)
        if m.image_channels != 3:
            raise UserError(
                f"[model]: image_channels is {m.image_channels}, and pictures have 3: encode them with an "
                "autoencoder, and name the file in data.latents"
            )
        limit = int(data.cache_gib * BYTES_PER_GIB) // len(m.sizes)
        return {size: PixelCache(*size, threads=data.threads, limit_bytes=limit) for size in m.sizes}

    @property
    def latents_of(self) -> str | None:
        """Fingerprint of the autoencoder that made the latents or codes; None of pixels."""
        first = self._pixels[self._model.sizes[0]]
        return first.fingerprint if isinstance(first, LatentFiles) else None

    def _size_of(self, ref: ImageRef) -> Size:
        """(height, width) of a picture's file."""
        if ref not in self._size:
            self._size[ref] = image_size(ref.read(), str(ref))
        return self._size[ref]

    def _split(self, source: SourceConfig, rows: list[Row]) -> list[Share]:
        """The rows of a source by the size of their last picture: every batch then has as many of each size.

        A picture that fits several sizes of one aspect is learnt in each of them.
        """
        own = self._model.sizes[0]
        if len(self._model.sizes) == 1:
            return [Share(rows, source.weight, own)]
        parts: dict[Size, list[Row]] = {size: [] for size in self._model.sizes}
        weights = dict.fromkeys(parts, 0.0)
        for row in rows:
            images = [s for s in row.segments if isinstance(s, ImageRef)]
            tied = nearest(*self._size_of(images[-1]), self._model.sizes) if images else [own]
            for size in tied:
                parts[size].append(row)
                weights[size] += source.weight / len(rows) / len(tied)
        return [Share(part, weights[size], size) for size, part in parts.items() if part]

    @property
    def name_of_latents(self) -> str:
        """Where the latents lie, for messages."""
        return self._data.latents[0]

    def documents(self, step: int, size: int, progress: float = 0.0) -> list[Document]:
        """The `size` documents of a step. `progress` in [0, 1] moves the share of high noise."""
        out: list[Document] = []
        for s, count in enumerate(shares([share.weight for share in self._shares], size)):
            for k in range(count):
                number = step * size + len(out)
                row = self._draw(s, step * count + k)
                out.append(self._document(row, number, progress, self._shares[s].size))
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
        groups = [self.pictures(documents, size) for size in self._model.sizes]
        filled = [
            filled_up(group, count) for group, count in zip(groups, self._stacked(documents), strict=True)
        ]
        return Batch(self.pack(documents), *filled[0], more=tuple(filled[1:]))

    def pack(self, documents: Sequence[Document]) -> PackedBatch:
        """The rows of some documents; nothing of their pictures is read."""
        patches: list[int] = []  # of each stacked picture
        number: dict[tuple[int, int], int] = {}  # (document, picture in it) -> place in the stack
        for size, count in zip(self._model.sizes, self._stacked(documents), strict=True):
            places = [(k, i) for k, d in enumerate(documents) for i, one in enumerate(d.sizes) if one == size]
            number.update({place: len(patches) + n for n, place in enumerate(places)})
            patches += [math.prod(self._model.grid(size))] * count
        return sequence.pack(
            [
                [Image(number[k, s.index], s.patches) if isinstance(s, Image) else s for s in d.segments]
                for k, d in enumerate(documents)
            ],
            self._length,
            pad_id=self._model.pad_token_id,
            row_multiple=ROW_MULTIPLE,
            text_multiple=TOKEN_MULTIPLE,
            patches=patches,
        )

    def _stacked(self, documents: Sequence[Document]) -> list[int]:
        """How many pictures of each size a batch holds: in several sizes, none or a round number."""
        counts = [sum(d.sizes.count(size) for d in documents) for size in self._model.sizes]
        if len(counts) == 1:
            return counts
        return [sequence.bucket(count, PICTURE_MULTIPLE) if count else 0 for count in counts]

    def pictures(self, documents: Sequence[Document], size: Size | None = None) -> Pictures:
        """Load the pictures of that size of some documents, None for the model's own, and draw their noise."""
        size = size or self._model.sizes[0]
        shape = (*size, self._model.image_channels)
        chosen = [(d, i) for d in documents for i, one in enumerate(d.sizes) if one == size]
        noises = [noise.normal(self._seed, (d.number, i), shape, f"{self._stream}/noise") for d, i in chosen]
        return Pictures(
            self._pixels[size].load([d.images[i] for d, i in chosen], [d.flips[i] for d, i in chosen]),
            np.stack(noises) if noises else np.zeros((0, *shape), np.float32),
            np.array([d.angles[i] for d, i in chosen], np.float32),
        )

    def _draw(self, share: int, index: int) -> Row:
        rows = self._shares[share].rows
        epoch, place = divmod(index, len(rows))
        return rows[_order(self._seed, share, epoch, len(rows), self._stream)[place]]

    def _document(self, row: Row, number: int, progress: float, size: Size) -> Document:
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
        sizes = self._sizes(images, size)
        return Document(self._layout(segments, row, sizes), images, flips, angles, number, sizes)

    def _sizes(self, images: Sequence[ImageRef], size: Size) -> list[Size]:
        """What the pictures of a document are brought to: the last one to the size of its row."""
        sizes = [size] * len(images)
        if len(self._model.sizes) > 1 and len(images) > 1:
            sizes[:-1] = [best(*self._size_of(ref), self._model.sizes) for ref in images[:-1]]
        return sizes

    def _edit(self, segments: list[str | ImageRef], u: float) -> list[str | ImageRef]:
        """Source, instruction and target; sometimes less, for the branches of guidance (arXiv 2211.09800, 3.2.1)."""
        source, _, target = segments
        if u < self._data.source_drop:
            return [target]
        return [source, target] if u < self._data.source_drop + self._data.instruction_drop else segments

    def _layout(self, segments: Sequence[str | ImageRef], row: Row, sizes: Sequence[Size]) -> list[Segment]:
        out: list[Segment] = []
        count = 0
        for s in segments:
            if isinstance(s, str):
                out.append(Text(self._encode(s), loss=row.kind != "edit"))  # nobody asks it for instructions
            else:
                out.append(Image(count, math.prod(self._model.grid(sizes[count]))))
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
        raise UserError(
            f"batch_size {size} is too small for {len(weights)} sources, or parts of them by picture size, with "
            f"weights {[round(w, 3) for w in weights]}"
        )
    for i in sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])[: size - sum(counts)]:
        counts[i] += 1
    return counts


def filled_up(pictures: Pictures, count: int) -> Pictures:
    """Black pictures without noise, which no loss counts, behind them up to `count`."""
    missing = count - len(pictures.angle)
    if not missing:
        return pictures
    return Pictures(*(np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for a in pictures))


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
