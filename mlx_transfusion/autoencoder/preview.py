"""Small pictures straight from latents, for a look while sampling: one linear map, no decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.autoencoder_config import AutoencoderConfig


@dataclass(frozen=True)
class Preview:
    """pixels = latents @ weight + bias, pixel values in [-1, 1], one pixel for each latent element."""

    weight: np.ndarray
    """float32 [C, 3]."""
    bias: np.ndarray
    """float32 [3]."""

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Normalised latents [..., h, w, C] -> uint8 [..., h, w, 3]."""
        pixels = np.asarray(latents, np.float32) @ self.weight + self.bias
        return np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)

    def arrays(self) -> dict[str, mx.array]:
        """For a safetensors file."""
        return {"weight": mx.array(self.weight), "bias": mx.array(self.bias)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, mx.array], config: AutoencoderConfig, where: str) -> Preview:
        """The way back. Raises UserError for arrays of other names or shapes."""
        expected = {"weight": (config.latent_channels, config.in_channels), "bias": (config.in_channels,)}
        if {name: tuple(value.shape) for name, value in arrays.items()} != expected:
            raise UserError(
                f"{where}: no map from {config.latent_channels} latent channels to pixels: delete it"
            )
        return cls(*(np.array(arrays[name].astype(mx.float32)) for name in ("weight", "bias")))


def fit_preview(latents: np.ndarray, pixels: np.ndarray) -> Preview:
    """Least squares from normalised latents [N, h, w, C] to the means of the pixels [N, H, W, 3] that they stand for.

    pixels: in [-1, 1].
    """
    n, height, width, channels = latents.shape
    factor = pixels.shape[1] // height
    small = pixels.reshape(n, height, factor, width, factor, pixels.shape[-1]).mean((2, 4))
    x = np.concatenate([latents.reshape(-1, channels), np.ones((n * height * width, 1))], 1).astype(
        np.float64
    )
    y = small.reshape(-1, pixels.shape[-1]).astype(np.float64)
    # By the normal equations, kept solvable where two channels say the same.
    gram = x.T @ x + 1e-6 * len(x) * np.eye(channels + 1)
    found = np.linalg.solve(gram, x.T @ y).astype(np.float32)
    return Preview(found[:-1], found[-1])
