"""What an autoencoder loses: PSNR, and the Frechet distance of what it gives back from what it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_transfusion.autoencoder.pictures import to_signed
from mlx_transfusion.autoencoder.preview import Preview
from mlx_transfusion.evaluation.distances import frechet
from mlx_transfusion.models.autoencoder import Autoencoder

Features = Callable[[np.ndarray], np.ndarray]
"""uint8 [B, H, W, 3] -> float32 [B, D]"""
PART = 16


def reconstruct(model: Autoencoder, pixels: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] -> uint8 [B, H, W, 3], through the means of the latents or the nearest codes."""
    out = [
        to_uint8(np.array(model.decode(model.latents(mx.array(to_signed(pixels[i : i + PART]))))))
        for i in range(0, len(pixels), PART)
    ]
    return np.concatenate(out)


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """float in [-1, 1] -> uint8."""
    return np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each pair of pictures uint8 [N, H, W, 3]: float64 [N], at most 100."""
    error = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 255**2 * 1e-10))


def measure(
    model: Autoencoder,
    parts: Iterable[np.ndarray],
    features: Features | None = None,
    preview: Preview | None = None,
) -> dict[str, Any]:
    """Figures of pictures uint8 [B, H, W, 3] in parts.

    PSNR is the mean over pictures. features: of EfficientNet-Lite0 for one, give the reconstruction Frechet
    distance (which is no rFID: that is defined by another network). Needs two pictures or more for that. preview:
    gives its PSNR against the mean colours that its pixels stand for.
    """
    ratios, absolute, previews = [], [], []
    real: list[np.ndarray] = []
    fake: list[np.ndarray] = []
    for pixels in parts:
        decoded = reconstruct(model, pixels)
        ratios.append(psnr(pixels, decoded))
        absolute.append(np.abs(pixels.astype(np.float64) - decoded).mean((1, 2, 3)) / 127.5)
        if features is not None:
            real.append(features(pixels))
            fake.append(features(decoded))
        if preview is not None:
            previews.append(psnr(shrink(pixels, model.factor), preview(latents(model, pixels))))
    every = np.concatenate(ratios)
    out: dict[str, Any] = {
        "pictures": len(every),
        "psnr": float(every.mean()),
        "l1": float(np.concatenate(absolute).mean()),
    }
    if features is not None:
        out["frechet"] = frechet(np.concatenate(fake), np.concatenate(real))
    if preview is not None:
        out["preview_psnr"] = float(np.concatenate(previews).mean())
    return out


def latents(model: Autoencoder, pixels: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] -> normalised latents float32 [B, h, w, C], by means or the nearest codes."""
    parts = range(0, len(pixels), PART)
    found = [model.normalize(model.latents(mx.array(to_signed(pixels[i : i + PART])))) for i in parts]
    return np.concatenate([np.array(one) for one in found])


def shrink(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Mean colours of squares of factor x factor pixels: uint8 [B, H, W, 3] -> uint8 [B, h, w, 3]."""
    b, height, width, c = pixels.shape
    blocks = pixels.reshape(b, height // factor, factor, width // factor, factor, c)
    return np.round(blocks.mean((2, 4))).astype(np.uint8)
