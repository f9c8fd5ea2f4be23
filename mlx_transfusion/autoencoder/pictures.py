"""The pictures of some rows, drawn in a fresh order every epoch: a batch is a function of (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from mlx_transfusion import noise
from mlx_transfusion.autoencoder.config import PictureData
from mlx_transfusion.errors import UserError
from mlx_transfusion.training.config import SourceConfig
from mlx_transfusion.training.data import rows_of, shares
from mlx_transfusion.training.image_store import ImageRef
from mlx_transfusion.training.pixels import BYTES_PER_GIB, PixelCache
from mlx_transfusion.training.rows import load_rows


class Pictures:
    """Distinct pictures of some sources."""

    def __init__(
        self, sources: Sequence[SourceConfig], data: PictureData, *, seed: int = 0, stream: str = "train"
    ) -> None:
        """Reads all rows, not the pictures. Raises UserError for bad files and rows, and where no row has one."""
        self._seed, self._stream, self._flip = seed, f"autoencoder/{stream}", data.flip
        self._weights = [s.weight for s in sources]
        self.refs: list[list[ImageRef]] = []
        self.bad_rows: list[str] = []
        for s in sources:
            loaded = load_rows(
                rows_of(s),
                skip_bad_rows=data.skip_bad_rows,
                check_images=data.check_images,
            )
            found = dict.fromkeys(
                one for row in loaded.rows for one in row.segments if isinstance(one, ImageRef)
            )
            if not found:
                raise UserError(f"{s.rows}: names no picture, and an autoencoder learns from nothing else")
            self.refs.append(list(found))
            self.bad_rows += loaded.bad_rows
        self._pixels = PixelCache(
            data.size, data.size, threads=data.threads, limit_bytes=int(data.cache_gib * BYTES_PER_GIB)
        )

    def __len__(self) -> int:
        """Number of distinct pictures."""
        return sum(map(len, self.refs))

    def batch(self, step: int, size: int) -> np.ndarray:
        """Pixels of a step's pictures: uint8 [size, H, W, 3]."""
        refs: list[ImageRef] = []
        for source, count in enumerate(shares(self._weights, size)):
            for i in range(step * count, (step + 1) * count):
                refs.append(self._draw(source, i))
        draws = noise.uniform(self._seed, step, (size,), f"{self._stream}/flip")
        return self._pixels.load(refs, [bool(u < self._flip) for u in draws])

    def first(self, count: int, part: int = 64) -> Iterator[np.ndarray]:
        """`count` pictures or all there are, always the same, not mirrored: uint8 [<= part, H, W, 3]."""
        refs = list(dict.fromkeys(ref for source in self.refs for ref in source))
        chosen = noise.permutation(0, 0, len(refs), "autoencoder/first")[:count]
        for start in range(0, len(chosen), part):
            yield self._pixels.load([refs[i] for i in chosen[start : start + part]])

    def _draw(self, source: int, index: int) -> ImageRef:
        refs = self.refs[source]
        epoch, place = divmod(index, len(refs))
        return refs[_order(self._seed, source, epoch, len(refs), self._stream)[place]]


@lru_cache(maxsize=16)
def _order(seed: int, source: int, epoch: int, n: int, stream: str) -> np.ndarray:
    return noise.permutation(seed, (epoch, source), n, f"{stream}/rows")


def to_signed(pixels: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1
