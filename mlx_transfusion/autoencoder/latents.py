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

import mlx.core as mx
import numpy as np

from mlx_transfusion.autoencoder.folder import LoadedAutoencoder
from mlx_transfusion.autoencoder.pictures import to_signed
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.autoencoder_tiles import Tiling, encode_tiled
from mlx_transfusion.training.image_store import ImageRef
from mlx_transfusion.training.latents import DTYPES, FORMAT, NAME
from mlx_transfusion.training.pixels import load_pixels

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


def _header(kind: str, shape: Sequence[int], size: int, metadata: dict[str, str]) -> bytes:
    """Length and JSON header of a safetensors file with one array, filled up to a multiple of 8 bytes."""
    about = {"dtype": kind, "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": metadata, NAME: about}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
