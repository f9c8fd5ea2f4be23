"""Latents or codes of a data set in one file, made once and read by memory map for training.

training/latents.py describes the file and reads it.
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
from mlx_transfusion.models.autoencoder import Autoencoder
from mlx_transfusion.models.autoencoder_tiles import Tiling, encoded_tiled
from mlx_transfusion.picture_sizes import Size, named, nearest
from mlx_transfusion.training.image_store import ImageRef
from mlx_transfusion.training.latents import CODES, DTYPES, FORMAT, LATENTS
from mlx_transfusion.training.pixels import image_size, load_pixels

PART = 16
"""Pictures encoded at once, where one is no larger than a tile."""

Progress = Callable[[int], None]
"""Called with the number of pictures done."""


def write_cache(
    file: Path,
    autoencoder: LoadedAutoencoder,
    refs: Sequence[ImageRef],
    size: Size,
    *,
    flips: bool = False,
    dtype: str = "float32",
    threads: int = 2,
    progress: Progress = lambda done: None,
) -> Path:
    """Encode distinct pictures, brought to `size`, by their means; returns `file`, whole or not there at all.

    An autoencoder with a codebook gives codes, and `dtype` is of no matter. flips: also the mirrored picture. Raises
    UserError for pictures that cannot be read, a size that the autoencoder's halvings do not divide, and a disk that
    is full.
    """
    config = autoencoder.config
    autoencoder.model.check_pixels((1, *size, 3))
    refs = list(dict.fromkeys(refs))
    if not refs:
        raise UserError(f"{file}: there is no picture to encode")
    coded = config.quantizer is not None
    kind, numpy_type = DTYPES["int32" if coded else dtype]
    encode = encode_to_codes if coded else encode_pixels
    height, width = (side // config.factor for side in size)
    shape = (len(refs), 1 + flips, height, width, *(() if coded else (config.latent_channels,)))
    metadata = {
        "format": FORMAT,
        "autoencoder": autoencoder.fingerprint,
        "size": named([size]),
        "names": json.dumps([ref.name for ref in refs]),
    }

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(refs), PART):
            pixels = load_pixels(refs[start : start + PART], *size, threads)
            latents = [encode(autoencoder, pixels)]
            if flips:
                latents.append(encode(autoencoder, pixels[:, :, ::-1]))
            yield np.stack(latents, 1).astype(numpy_type)
            progress(start + len(pixels))

    about = {
        "dtype": kind,
        "shape": list(shape),
        "data_offsets": [0, int(np.prod(shape)) * numpy_type.itemsize],
    }
    return _write(file, _header(CODES if coded else LATENTS, about, metadata), blocks())


def by_size(refs: Sequence[ImageRef], sizes: Sequence[Size]) -> dict[Size, list[ImageRef]]:
    """The pictures that training wants in each size: those nearest to it in aspect, in all sizes of one aspect.

    One size takes them all. Raises UserError for pictures that cannot be read, and for a size without any.
    """
    if len(sizes) == 1:
        return {sizes[0]: list(refs)}
    out: dict[Size, list[ImageRef]] = {size: [] for size in sizes}
    for ref in refs:
        for size in nearest(*image_size(ref.read(), str(ref)), list(out)):
            out[size].append(ref)
    if missing := [size for size, found in out.items() if not found]:
        raise UserError(f"no picture is nearest to {named(missing)} in aspect: leave this size out")
    return out


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
    """Pixels uint8 [B, H, W, 3] -> normalised latents float32 [B, h, w, C], by their means; large ones in tiles.

    Raises UserError for an autoencoder with a codebook.
    """
    model = autoencoder.latents
    mean = mx.split(_encoded(model, pixels), 2, -1)[0]
    return np.array(model.normalize(mean))


def encode_to_codes(autoencoder: LoadedAutoencoder, pixels: np.ndarray) -> np.ndarray:
    """Pixels uint8 [B, H, W, 3] -> codes int32 [B, h, w]; large pictures in tiles.

    Raises UserError for an autoencoder without a codebook.
    """
    model = autoencoder.codes
    return np.array(model.quantizer.codes(_encoded(model, pixels)))


def _encoded(model: Autoencoder, pixels: np.ndarray) -> mx.array:
    signed = to_signed(pixels)
    if max(pixels.shape[1:3]) // model.factor <= Tiling().tile:
        return model.encoded(mx.array(signed))
    return mx.array(encoded_tiled(model, signed))


def _header(name: str, about: dict[str, Any], metadata: dict[str, str]) -> bytes:
    """Length and JSON header of a safetensors file with one array, filled up to a multiple of 8 bytes."""
    text = json.dumps({"__metadata__": metadata, name: about}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
