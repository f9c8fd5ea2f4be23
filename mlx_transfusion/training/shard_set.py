"""Training data from shards: sequences that were tokenised and packed before, drawn as `DataSet` draws documents.

Fixed in the shards: tokens, which documents share a sequence, where long text was cut, pixels or latents of pictures.
Drawn in training, as functions of the seed and the sequence's number in the run: the order of sequences (anew every
epoch), caption before or behind its picture, caption drop, mirroring, angles and noise. None of these changes a
length: a caption that is dropped stays in the sequence as a document of its own, which the picture does not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_transfusion import noise, sequence
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.picture_sizes import named
from mlx_transfusion.sequence import Image, Segment, Text
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training import shard_files
from mlx_transfusion.training.config import DataConfig, DiffusionConfig, SourceConfig
from mlx_transfusion.training.data import TOKEN_MULTIPLE, Batch, DataSet, draw_angle, shares
from mlx_transfusion.training.prefix_data import filled
from mlx_transfusion.training.shard_files import ShardFolder


@dataclass(frozen=True)
class Drawn:
    """One sequence of a step: where it stands, its number in the run, and how far the run is."""

    source: int
    place: int
    number: int
    progress: float


class ShardSet:
    """The sequences of folders of shards, drawn in a fixed share of every batch and a fresh order every epoch."""

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
        """Opens the folders. Raises UserError for shards that were made for another model or tokenizer."""
        self._data, self._diffusion, self._model = data, diffusion, model
        self._seed, self._length, self._stream = seed, sequence_length, stream
        self._weights = [s.weight for s in sources]
        self.folders = [ShardFolder(Path(str(s.shards))) for s in sources]
        self.bad_rows: list[str] = []
        wanted = recipe_of(model, tokenizer, sequence_length)
        first = self.folders[0]
        for folder, source in zip(self.folders, sources, strict=True):
            _check(folder, wanted | {"autoencoder": first.recipe["autoencoder"]}, first)
            if data.flip and folder.recipe["autoencoder"] and folder.recipe["views"] < 2:
                raise UserError(
                    f"{folder.path}: holds no mirrored latents: build with --flips, or set data.flip = 0"
                )
            if source.pictures is False and folder.table[:, 1].any():
                raise UserError(f"{folder.path}: holds pictures, and the config says pictures = false")

    @property
    def latents_of(self) -> str | None:
        """Fingerprint of the autoencoder that made the latents; None of pixels."""
        found = self.folders[0].recipe["autoencoder"]
        return None if found is None else str(found)

    @property
    def name_of_latents(self) -> str:
        """Where the latents lie, for messages."""
        return str(self.folders[0].path)

    def documents(self, step: int, size: int, progress: float = 0.0) -> list[Drawn]:
        """The `size` sequences of a step; none is read yet. `progress` in [0, 1] moves the share of high noise."""
        out: list[Drawn] = []
        for s, count in enumerate(shares(self._weights, size)):
            n = len(self.folders[s])
            epochs, index = np.divmod(np.arange(step * count, (step + 1) * count), n)
            for epoch in np.unique(epochs).tolist():
                now = index[epochs == epoch]
                places = noise.place(self._seed, (epoch, s), n, now, f"{self._stream}/sequences")
                out += [
                    Drawn(s, p, step * size + len(out) + i, progress) for i, p in enumerate(places.tolist())
                ]
        return out

    def count(self, drawn: Drawn) -> tuple[int, int]:
        """(text-loss tokens, images in the loss) of a sequence, from the table alone."""
        targets, pictures, pairs = (int(x) for x in self.folders[drawn.source].table[drawn.place])
        return targets - int(self._orders(drawn, pairs)[1].sum()), pictures

    def batch(self, drawn: Sequence[Drawn]) -> Batch:
        """Read sequences, each a row of its own, and make their draws. Raises UserError for damaged shards."""
        documents: list[list[Segment]] = []
        rows: list[range] = []
        pictures: list[np.ndarray] = []
        noises: list[np.ndarray] = []
        angles: list[float] = []
        m = self._model
        shape = (m.image_height, m.image_width, m.image_channels)
        for one in drawn:
            found = self.folders[one.source].sequence(one.place)
            laid = self._documents(one, found, len(angles))
            rows.append(range(len(documents), len(documents) + len(laid)))
            documents += laid
            draws = noise.uniform(self._seed, one.number, (len(found.pictures), 4), f"{self._stream}/image")
            pictures += [self._view(p, d[3]) for p, d in zip(found.pictures, draws, strict=True)]
            angles += self._angles(laid, draws, one.progress)
            noises += [
                noise.normal(self._seed, (one.number, i), shape, f"{self._stream}/noise")
                for i in range(len(found.pictures))
            ]
        packed = sequence.lay_out(
            documents, rows, self._length, pad_id=m.pad_token_id, text_multiple=TOKEN_MULTIPLE
        )
        dtype = np.float32 if self.latents_of else np.uint8
        return filled(
            Batch(
                packed,
                np.stack(pictures) if pictures else np.zeros((0, *shape), dtype),
                np.stack(noises) if noises else np.zeros((0, *shape), np.float32),
                np.array(angles, np.float32),
            )
        )

    def _orders(self, drawn: Drawn, pairs: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each pair of a sequence: whether its picture comes first, and whether its caption is dropped."""
        u = noise.uniform(self._seed, drawn.number, (pairs, 2), f"{self._stream}/order")
        picture_first = u[:, 0] >= self._data.caption_first
        return picture_first, ~picture_first & (u[:, 1] < self._data.caption_drop)

    def _documents(self, drawn: Drawn, found: shard_files.PackedSequence, first: int) -> list[list[Segment]]:
        """The documents of a sequence as segments; its pictures are numbered from `first`."""
        kinds, m = found.kinds.tolist(), self._model
        picture_first, dropped = self._orders(drawn, kinds.count(shard_files.PAIR))
        out: list[list[Segment]] = []
        at = pair = 0
        for kind, length in zip(kinds, found.lengths.tolist(), strict=True):
            ids = tuple(found.tokens[at : at + length].tolist())
            at += length
            if kind == shard_files.TEXT:
                out.append([Text(ids)])
                continue
            if kind == shard_files.SEGMENTS:
                out.append(self._segments(ids, first))
                first += sum(isinstance(s, Image) for s in out[-1])
                continue
            caption, picture = Text(ids[1 : -m.patches_per_image - 3]), Image(first, m.patches_per_image)
            first += 1
            if dropped[pair]:
                out += [[caption], sequence.document([picture], m)]
            else:
                order: list[Segment] = [caption, picture]
                out.append(sequence.document(order[::-1] if picture_first[pair] else order, m))
            pair += 1
        return out

    def _segments(self, ids: tuple[int, ...], first: int) -> list[Segment]:
        """A document whose pictures stand behind its BOI tokens."""
        out: list[Segment] = []
        begin, m = 0, self._model
        while m.boi_token_id in ids[begin:]:
            end = ids.index(m.boi_token_id, begin) + 1
            out += [Text(ids[begin:end]), Image(first, m.patches_per_image)]
            first, begin = first + 1, end + m.patches_per_image
        return [*out, Text(ids[begin:])]

    def _angles(
        self, documents: Sequence[Sequence[Segment]], draws: np.ndarray, progress: float
    ) -> list[float]:
        out: list[float] = []
        m = self._model
        for d in documents:
            for i, s in enumerate(d):
                if isinstance(s, Image):
                    later = {t for s in d[i + 1 :] if isinstance(s, Text) for t in s.ids}
                    text_follows = bool(later - {m.boi_token_id, m.eoi_token_id, m.eos_token_id})
                    out.append(draw_angle(self._diffusion, draws[len(out)], text_follows, progress))
        return out

    def _view(self, picture: np.ndarray, u: float) -> np.ndarray:
        """[V, h, w, C] -> one of its views [h, w, C], latents as float32."""
        mirrored = u < self._data.flip
        if picture.dtype != np.uint8:
            return picture[int(mirrored)].astype(np.float32)
        return picture[0, :, ::-1] if mirrored else picture[0]


def recipe_of(model: ModelConfig, tokenizer: Tokenizer, sequence_length: int) -> dict[str, Any]:
    """What shards for a model have in their recipe: they are read by no other.

    Raises UserError for a model of several picture sizes, of which they hold one.
    """
    if len(model.sizes) > 1:
        raise UserError(
            f"shards hold pictures of one size, and the model learns {named(model.sizes)}: train on rows instead"
        )
    return {
        "tokenizer": tokenizer.fingerprint,
        "sequence_length": sequence_length,
        "picture": [model.image_height, model.image_width, model.image_channels],
        "patch_size": model.patch_size,
        "special": [getattr(model, f"{name}_token_id") for name in ("pad", "bos", "eos", "boi", "eoi")],
    }


def _check(folder: ShardFolder, wanted: dict[str, Any], first: ShardFolder) -> None:
    for key, value in wanted.items():
        if (found := folder.recipe.get(key)) != value:
            where = f"{first.path} has" if key == "autoencoder" else "the run needs"
            raise UserError(f"{folder.path}: was built with {key} {found}, {where} {value}: build it again")


def open_data(sources: Sequence[SourceConfig], *arguments: Any, **keywords: Any) -> DataSet | ShardSet:
    """The training data that the sources name, rows or shards; all other arguments are theirs. Raises UserError."""
    kind: Any = ShardSet if sources[0].shards is not None else DataSet
    opened: DataSet | ShardSet = kind(sources, *arguments, **keywords)
    return opened
