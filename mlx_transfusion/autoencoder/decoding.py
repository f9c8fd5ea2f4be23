"""A file of latents or codes back into pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_transfusion.autoencoder.folder import LoadedAutoencoder
from mlx_transfusion.autoencoder.measures import to_uint8
from mlx_transfusion.errors import UserError
from mlx_transfusion.images import save_png
from mlx_transfusion.models.autoencoder import Autoencoder
from mlx_transfusion.models.autoencoder_tiles import Tiling, decode_tiled
from mlx_transfusion.training.image_store import ImageFolder, ImageRef
from mlx_transfusion.training.latents import CODES, LATENTS, LatentCache


def decode_latents(autoencoder: LoadedAutoencoder, latents: np.ndarray) -> np.ndarray:
    """Normalised latents [B, h, w, C] -> pixels uint8 [B, H, W, 3]; large pictures in tiles. Raises UserError."""
    model = autoencoder.model
    model.check_latents(latents.shape)
    return _pixels(model, model.denormalize(mx.array(latents, mx.float32)))


def decode_to_pixels(autoencoder: LoadedAutoencoder, codes: np.ndarray) -> np.ndarray:
    """Codes int [B, h, w] -> pixels uint8 [B, H, W, 3]; large pictures in tiles. Raises UserError."""
    model = autoencoder.codes
    return _pixels(model, model.vectors(mx.array(codes)))


def _pixels(model: Autoencoder, z: mx.array) -> np.ndarray:
    if max(z.shape[1:3]) <= Tiling().tile:
        return to_uint8(np.array(model.decode(z)))
    return to_uint8(decode_tiled(model, np.array(z)))


def decode_file(
    autoencoder: LoadedAutoencoder, file: Path, folder: Path, count: int | None = None, preview: bool = False
) -> Iterator[Path]:
    """Write NAME.png of the first `count` pictures of a file of latents or codes; gives each path when it is written.

    preview: one pixel for each latent element, by the folder's linear map. Raises UserError for latents of another
    autoencoder, and for a preview where the folder has none.
    """
    coded = autoencoder.config.quantizer is not None
    cache = LatentCache(file, CODES if coded else LATENTS)
    cache.check(autoencoder.fingerprint, cache.shape[2:], str(autoencoder.path))
    decode = decode_to_pixels if coded else decode_latents
    if preview:
        decode = _preview
    store = ImageFolder(folder)
    for name in cache.names[:count]:
        pixels = decode(autoencoder, cache.load([ImageRef(store, name)]))
        target = folder / Path(name).with_suffix(".png").name
        save_png(target, pixels[0], {"latents": str(file), "autoencoder": autoencoder.fingerprint})
        yield target


def _preview(autoencoder: LoadedAutoencoder, latents: np.ndarray) -> np.ndarray:
    if autoencoder.preview is None:
        raise UserError(f"{autoencoder.path}: holds no preview: it was not trained here; leave out --preview")
    if autoencoder.config.quantizer is not None:
        model = autoencoder.codes
        latents = np.array(model.normalize(model.vectors(mx.array(latents))))
    return autoencoder.preview(latents)
