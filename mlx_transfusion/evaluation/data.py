"""The data that a model is measured on: captioned pictures with their variants, and texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_transfusion import noise
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation.config import EvaluationConfig, PairFiles
from mlx_transfusion.evaluation.retrieval import families
from mlx_transfusion.training.pixels import load_pixels
from mlx_transfusion.training.rows import ImageRef, Source, load_rows


@dataclass(frozen=True)
class Pairs:
    """R captioned pictures at the model's size."""

    names: list[str]
    captions: list[str]
    bases: list[str | None]
    """The picture that a picture is a variant of."""
    pixels: np.ndarray
    """uint8 [R, H, W, 3]"""

    def __len__(self) -> int:
        return len(self.names)

    def __add__(self, other: Pairs) -> Pairs:
        """Both sets, this one first."""
        return Pairs(
            self.names + other.names,
            self.captions + other.captions,
            self.bases + other.bases,
            np.concatenate([self.pixels, other.pixels]),
        )

    @property
    def family(self) -> np.ndarray:
        """Family number of each picture. int [R]"""
        return families(self.names, self.bases)


def load_pairs(config: EvaluationConfig, files: PairFiles, model: ModelConfig) -> Pairs:
    """As `read_pairs`, at the size of a model of pixels. Raises UserError for a model that is not RGB."""
    if model.image_channels != 3:
        raise UserError(f"the model's image_channels is {model.image_channels}; pictures need 3")
    return read_pairs(config, files, model.image_height, model.image_width)


def read_pairs(config: EvaluationConfig, files: PairFiles, height: int, width: int) -> Pairs:
    """Read captioned pictures, brought to a size. Raises UserError for bad rows and images."""
    images = None if files.images is None else config.path(files.images)
    rows = load_rows(Source(config.path(files.rows), images), check_images=False).rows
    refs: list[ImageRef] = []
    captions: list[str] = []
    for row in rows:
        if row.kind != "pair":
            raise UserError(f'{row.origin[0]}:{row.origin[1]}: expected {{"image", "text"}} rows')
        for segment in row.segments:
            if isinstance(segment, str):
                captions.append(segment)
            else:
                refs.append(segment)
    bases = [row.meta.get("base") for row in rows]
    pixels = load_pixels(refs, height, width, threads=2)
    return Pairs([ref.name for ref in refs], captions, bases, pixels)


def load_texts(config: EvaluationConfig, name: str, limit: int) -> list[str]:
    """The first `limit` texts of a jsonl of {"text"} rows. Raises UserError for bad rows."""
    texts: list[str] = []
    for row in load_rows(Source(config.path(name))).rows[:limit]:
        text = row.segments[0]
        if row.kind != "text" or not isinstance(text, str):
            raise UserError(f'{row.origin[0]}:{row.origin[1]}: expected {{"text"}} rows')
        texts.append(text)
    return texts


def shuffled(total: int, seed: int, purpose: str) -> np.ndarray:
    """0..total-1 in an order that depends on the seed and the purpose. int [total]"""
    return noise.permutation(seed, 0, total, f"evaluation/{purpose}")


def choose(total: int, count: int, seed: int, purpose: str) -> np.ndarray:
    """`count` of 0..total-1 (all of them if there are fewer), drawn by seed, in rising order. int [Q]"""
    return np.sort(shuffled(total, seed, purpose)[:count])
