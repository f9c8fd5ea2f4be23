"""Pictures as latents or codes in a file (made by `autoencoder encode`), in the place of pixels. Imports no mlx.

The file is a safetensors file with one array: "latents" [N, V, h, w, C], float32 or float16, already normalised
(unit variance), or "codes" [N, V, h, w], int32. V is 1, or 2 with the mirrored picture behind each. Its metadata
says which pictures these are, in what size, and the fingerprint of the autoencoder that made them: with another one
they are noise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.picture_sizes import Size, named
from mlx_transfusion.training.image_store import ImageRef

FORMAT, LATENTS, CODES = "mlx-transfusion-latents", "latents", "codes"
WHAT = ("latents", "make one with autoencoder encode")
DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "float32": ("F32", np.dtype("<f4")),
    "float16": ("F16", np.dtype("<f2")),
    "int32": ("I32", np.dtype("<i4")),
}
AXES = {LATENTS: 5, CODES: 4}


class LatentCache:
    """A file of latents, opened for reading; nothing but its header is read before it is asked for."""

    def __init__(self, file: str | os.PathLike[str], kind: str = LATENTS) -> None:
        """kind: LATENTS or CODES. Raises UserError for a file that is missing, cut off, of the other kind, or no such
        file.

        What is said of latents below holds for codes, int32 [h, w] in the place of float32 [h, w, C].
        """
        self.path = Path(file)
        header, offset = read_header(self.path, *WHAT)
        try:
            metadata = header["__metadata__"]
            if metadata["format"] != FORMAT:
                raise ValueError(metadata["format"])
            if kind not in header and (others := header.keys() & AXES.keys()):
                raise UserError(
                    f"{self.path}: holds {min(others)}, expected {kind}: encode with the autoencoder of the model"
                )
            about = header[kind]
            self.fingerprint = str(metadata["autoencoder"])
            self.names = [str(name) for name in json.loads(metadata["names"])]
            self.shape = tuple(int(n) for n in about["shape"])
            numpy_type = dict(DTYPES.values())[about["dtype"]]
            if len(self.shape) != AXES[kind] or min(self.shape) < 1 or len(self.names) != self.shape[0]:
                raise ValueError(self.shape)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.path}: no file of latents: make one with autoencoder encode") from error
        wanted = offset + int(np.prod(self.shape)) * numpy_type.itemsize
        if self.path.stat().st_size != wanted:
            raise UserError(f"{self.path}: {self.path.stat().st_size} bytes, expected {wanted}: encode again")
        self._latents: np.memmap[Any, Any] = np.memmap(self.path, numpy_type, "r", offset, self.shape)
        self.dtype = np.int32 if kind == CODES else np.float32
        self._place = {name: i for i, name in enumerate(self.names)}

    @property
    def flips(self) -> bool:
        """Whether mirrored pictures are there too."""
        return self.shape[1] == 2

    def check(self, fingerprint: str, shape: Sequence[int], where: str) -> None:
        """Raises UserError unless that autoencoder made them, and they have the shape [h, w, C] that a model reads.

        where: what it was compared with, for the message.
        """
        if self.fingerprint != fingerprint:
            raise UserError(
                f"{self.path}: stale: made by autoencoder {self.fingerprint}, and {where} has the fingerprint "
                f"{fingerprint}: encode the data set again"
            )
        if tuple(shape) != self.shape[2:]:
            raise UserError(
                f"{self.path}: latents of shape {list(self.shape[2:])}, {where} expects {list(shape)}"
            )

    def place(self, ref: ImageRef, flipped: bool = False) -> tuple[int, int]:
        """Where a picture's latents, or those of its mirrored version, lie. Raises UserError where they do not."""
        if flipped and not self.flips:
            raise UserError(f"{self.path}: holds no mirrored pictures: encode with --flips, or train without")
        if ref.name not in self._place:
            raise UserError(f"{self.path}: holds no latents of {ref}: encode the data set again")
        return self._place[ref.name], int(flipped)

    def load(self, refs: Sequence[ImageRef], flips: Sequence[bool] | None = None) -> np.ndarray:
        """Latents of pictures in their order: float32 [N, h, w, C], a fresh array.

        flips: per picture, whether its mirrored version is meant. Raises UserError as `place`.
        """
        out = np.empty((len(refs), *self.shape[2:]), self.dtype)
        for i, ref in enumerate(refs):
            out[i] = self._latents[self.place(ref, bool(flips is not None and flips[i]))]
        return out


class LatentFiles:
    """Several such files as one: what training loads instead of pixels."""

    def __init__(self, files: Sequence[str], shape: Sequence[int], kind: str = LATENTS) -> None:
        """shape: [h, w, C] of the model's pictures, or [h, w] of codes. Raises UserError for other files."""
        self._caches = [LatentCache(file, kind) for file in files]
        self.fingerprint = self._caches[0].fingerprint
        for cache in self._caches:
            cache.check(self.fingerprint, shape, f"the run's model and {self._caches[0].path}")
        self._file_of = {name: cache for cache in reversed(self._caches) for name in cache.names}

    def place(self, ref: ImageRef, flipped: bool = False) -> tuple[int, int]:
        """As `LatentCache.place`, in the first file that holds the picture."""
        return self._file_of.get(ref.name, self._caches[0]).place(ref, flipped)

    def load(self, refs: Sequence[ImageRef], flips: Sequence[bool] | None = None) -> np.ndarray:
        """As `LatentCache.load`, from the first file that holds a picture."""
        first = self._caches[0]
        out = np.empty((len(refs), *first.shape[2:]), first.dtype)
        for i, ref in enumerate(refs):
            cache = self._file_of.get(ref.name, first)
            out[i] = cache.load([ref], None if flips is None else [flips[i]])[0]
        return out


def latents_by_size(files: Sequence[str], sizes: Sequence[Size], channels: int) -> dict[Size, LatentFiles]:
    """The files of each size (height, width) that a model learns; all are of one autoencoder.

    Raises UserError for bad files, for one of no such size, and for a size without a file.
    """
    if len(sizes) == 1:
        return {sizes[0]: LatentFiles(files, (*sizes[0], channels))}
    of_size: dict[Size, list[str]] = {size: [] for size in sizes}
    for file in files:
        height, width = LatentCache(file).shape[2:4]
        if (height, width) not in of_size:
            raise UserError(f"{file}: latents of {width}x{height}, and the model learns {named(sizes)}")
        of_size[height, width].append(file)
    if missing := [size for size, found in of_size.items() if not found]:
        raise UserError(
            f"data.latents: no file has the size {named(missing)}, which the model learns: encode one"
        )
    out = {size: LatentFiles(found, (*size, channels)) for size, found in of_size.items()}
    makers = {
        latents.fingerprint: found for latents, found in zip(out.values(), of_size.values(), strict=True)
    }
    if len(makers) > 1:
        first, second = list(makers.values())[:2]
        raise UserError(f"{first[0]} and {second[0]} are of two autoencoders: encode both with one")
    return out


def read_header(file: Path, what: str, remedy: str) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file, and where its numbers begin. Raises UserError that names `what` and `remedy`."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length < file.stat().st_size:
                raise ValueError(length)
            header = json.loads(stream.read(length))
    except OSError as error:
        raise UserError(f"{file}: cannot read the {what}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: no file of {what}: {remedy}") from error
    if not isinstance(header, dict):
        raise UserError(f"{file}: no file of {what}: {remedy}")
    return header, 8 + length
