"""All pictures of a run as latents, each encoded once before the first step. Imports no mlx."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.training.image_store import ImageRef

Name = tuple[ImageRef, bool]
"""A picture, and whether it is mirrored."""


class EncodedPictures:
    """Latents float32 [N, P] of pictures, in memory or, where they need more room, in a file."""

    def __init__(
        self,
        names: Iterable[Name],
        shape: tuple[int, int],
        encode: Callable[[Name], np.ndarray],
        room: int,
        folder: Path,
    ) -> None:
        """Encode each picture to latents of the shape [N, P].

        room: bytes of memory; more go into a file in `folder` that has no name and ends with the process. Raises
        UserError for a picture that cannot be read, and when the file cannot be written.
        """
        self._place = {name: i for i, name in enumerate(dict.fromkeys(names))}
        whole = (len(self._place), *shape)
        self._latents: np.ndarray
        if 4 * math.prod(whole) <= room:
            self._latents = np.empty(whole, np.float32)
            for name, i in self._place.items():
                self._latents[i] = encode(name)
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the map below keeps it
            for name in self._place:  # not through the map: there a full disk kills the process
                file.write(encode(name).astype("<f4").tobytes())
            file.flush()
        except OSError as error:
            raise UserError(
                f"{folder}: cannot keep the encoded pictures there ({error.strerror}): free some space or raise "
                "data.cache_gib"
            ) from error
        self._latents = np.memmap(file, "<f4", "r", shape=whole)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._place)

    def load(self, refs: Sequence[ImageRef], flips: Sequence[bool]) -> np.ndarray:
        """Latents of pictures in their order: float32 [M, N, P], a fresh array."""
        return np.asarray(self._latents[[self._place[name] for name in zip(refs, flips, strict=True)]])
