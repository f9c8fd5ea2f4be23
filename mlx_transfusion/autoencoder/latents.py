"""Latents of a data set in one file, made once and read by memory map for training.

The file is a safetensors file with one array "latents" [N, V, h, w, C], float32 or float16, already normalised
(unit variance); V is 1, or 2 with the mirrored picture behind each. Its metadata says which pictures these are, in
what size, and the fingerprint of the autoencoder that made them: with another one they are noise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_transfusion.autoencoder.folder import LoadedAutoencoder
from mlx_transfusion.autoencoder.pictures import to_signed
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.autoencoder_tiles import Tiling, encode_tiled
from mlx_transfusion.training.image_store import ImageRef
from mlx_transfusion.training.pixels import load_pixels

FORMAT, NAME = "mlx-transfusion-latents", "latents"
DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "float32": ("F32", np.dtype("<f4")),
    "float16": ("F16", np.dtype("<f2")),
}
PART = 16
"""Pictures encoded at once, where one is no larger than a tile."""

Progress = Callable[[int], None]
"""Called with the number of pictures done."""


def write_cache(
    file: Path,
    autoencoder: LoadedAutoencoder,
    refs: Sequence[ImageRef],
    size: int,
    *,
    flips: bool = False,
    dtype: str = "float32",
    threads: int = 2,
    progress: Progress = lambda done: None,
) -> Path:
    """Encode distinct pictures, brought to size x size, by their means; returns `file`, whole or not there at all.

    flips: also the mirrored picture. Raises UserError for pictures that cannot be read, a size that the
    autoencoder's halvings do not divide, and a disk that is full.
    """
    config = autoencoder.config
    autoencoder.model.check_pixels((1, size, size, 3))
    refs = list(dict.fromkeys(refs))
    if not refs:
        raise UserError(f"{file}: there is no picture to encode")
    kind, numpy_type = DTYPES[dtype]
    side, views = size // config.factor, 1 + flips
    shape = (len(refs), views, side, side, config.latent_channels)
    metadata = {
        "format": FORMAT,
        "autoencoder": autoencoder.fingerprint,
        "size": str(size),
        "names": json.dumps([ref.name for ref in refs]),
    }

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(refs), PART):
            pixels = load_pixels(refs[start : start + PART], size, size, threads)
            latents = [encode_pixels(autoencoder, pixels)]
            if flips:
                latents.append(encode_pixels(autoencoder, pixels[:, :, ::-1]))
            yield np.stack(latents, 1).astype(numpy_type)
            progress(start + len(pixels))

    return _write(file, _header(kind, shape, int(np.prod(shape)) * numpy_type.itemsize, metadata), blocks())


def _write(file: Path, header: bytes, blocks: Iterator[np.ndarray]) -> Path:
    temporary = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as out:
            out.write(header)
            for block in blocks:
                out.write(block.tobytes())
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"{file}: cannot write the latents: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return file


def encode_pixels(autoencoder: LoadedAutoencoder, pixels: np.ndarray) -> np.ndarray:
    """Pixels uint8 [B, H, W, 3] -> normalised latents float32 [B, h, w, C], by their means; large ones in tiles."""
    model, signed = autoencoder.model, to_signed(pixels)
    if max(pixels.shape[1:3]) // autoencoder.config.factor <= Tiling().tile:
        mean = model.encode(mx.array(signed)).mean
    else:
        mean = mx.array(encode_tiled(model, signed)[0])
    return np.array(model.normalize(mean))


class LatentCache:
    """A file of latents, opened for reading; nothing but its header is read before it is asked for."""

    def __init__(self, file: str | os.PathLike[str]) -> None:
        """Raises UserError for a file that is missing, cut off, or no such file."""
        self.path = Path(file)
        header, offset = _read_header(self.path)
        try:
            metadata, about = header["__metadata__"], header[NAME]
            if metadata["format"] != FORMAT:
                raise ValueError(metadata["format"])
            self.fingerprint, self.size = str(metadata["autoencoder"]), int(metadata["size"])
            self.names = [str(name) for name in json.loads(metadata["names"])]
            self.shape = tuple(int(n) for n in about["shape"])
            numpy_type = dict(DTYPES.values())[about["dtype"]]
            if len(self.shape) != 5 or min(self.shape) < 1 or len(self.names) != self.shape[0]:
                raise ValueError(self.shape)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.path}: no file of latents: make one with autoencoder encode") from error
        wanted = offset + int(np.prod(self.shape)) * numpy_type.itemsize
        if self.path.stat().st_size != wanted:
            raise UserError(f"{self.path}: {self.path.stat().st_size} bytes, expected {wanted}: encode again")
        self._latents: np.memmap[Any, Any] = np.memmap(self.path, numpy_type, "r", offset, self.shape)
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

    def load(self, refs: Sequence[ImageRef], flips: Sequence[bool] | None = None) -> np.ndarray:
        """Latents of pictures in their order: float32 [N, h, w, C], a fresh array.

        flips: per picture, whether its mirrored version is meant. Raises UserError for a picture that is not in the
        file, and for flips where there are none.
        """
        if flips is not None and any(flips) and not self.flips:
            raise UserError(f"{self.path}: holds no mirrored pictures: encode with --flips, or train without")
        out = np.empty((len(refs), *self.shape[2:]), np.float32)
        for i, ref in enumerate(refs):
            place = self._place.get(ref.name)
            if place is None:
                raise UserError(f"{self.path}: holds no latents of {ref}: encode the data set again")
            out[i] = self._latents[place, int(bool(flips is not None and flips[i]))]
        return out


def _header(kind: str, shape: Sequence[int], size: int, metadata: dict[str, str]) -> bytes:
    """Length and JSON header of a safetensors file with one array, filled up to a multiple of 8 bytes."""
    about = {"dtype": kind, "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": metadata, NAME: about}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length < file.stat().st_size:
                raise ValueError(length)
            header = json.loads(stream.read(length))
    except OSError as error:
        raise UserError(f"{file}: cannot read the latents: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: no file of latents: make one with autoencoder encode") from error
    if not isinstance(header, dict):
        raise UserError(f"{file}: no file of latents: make one with autoencoder encode")
    return header, 8 + length
