"""Images to token vectors and back: patchify, and the paper's patch encoders and decoders, linear or U-Net.

Patches are in raster order; inside a patch the elements run row, column, channel.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.models.gates import silu
from mlx_transfusion.models.unet import Skips, UNetDown, UNetUp
from mlx_transfusion.picture_sizes import Size

EDGE_FREQUENCIES = 16


def patchify(images: mx.array, patch_size: int) -> mx.array:
    """[B, H, W, C] -> [B, N, patch_size*patch_size*C] with N = (H/p) * (W/p) in raster order."""
    b, h, w, c = images.shape
    p = patch_size
    x = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: mx.array, height: int, width: int, patch_size: int) -> mx.array:
    """Inverse of patchify: [B, N, P] -> [B, height, width, C]."""
    b, p = patches.shape[0], patch_size
    x = patches.reshape(b, height // p, width // p, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height, width, -1)


@lru_cache(maxsize=64)
def edge_waves(rows: int, columns: int) -> np.ndarray:
    """Where each patch stands, by sines and cosines of its distances from the four edges: float32 [N, 8 F].

    A distance is counted in patches to the patch's centre, and F = EDGE_FREQUENCIES run from 1 down to 1/100 radian a
    patch. From two opposite edges together a patch also knows how large the picture is.
    """
    y, x = np.meshgrid(np.arange(rows) + 0.5, np.arange(columns) + 0.5, indexing="ij")
    distances = np.stack([y, rows - y, x, columns - x], -1).reshape(rows * columns, 4)
    frequencies = 100.0 ** (-np.arange(EDGE_FREQUENCIES) / (EDGE_FREQUENCIES - 1))
    angles = (distances[..., None] * frequencies).reshape(rows * columns, -1)
    return np.concatenate([np.cos(angles), np.sin(angles)], -1).astype(np.float32)


class AngleEmbedding(nn.Module):
    """The noise angle in radians as a vector: sines and cosines of low frequencies, then a small MLP.

    The highest frequency is 1, so that the derivative by the angle stays of order one and a consistency model
    can start from these weights (arXiv 2410.11081, section 4.1).

    guidance: with a layer for the guidance scale, which is embedded like the angle and added behind one linear map.
    That starts at zero, so the model begins as one without; and it does not depend on the angle, so the scale has
    no part in a derivative along a trajectory.
    """

    def __init__(self, config: ModelConfig, guidance: bool = False) -> None:
        super().__init__()
        n = config.time_frequencies
        self._frequencies = 100.0 ** (-mx.arange(n) / max(1, n - 1))
        self.fc1 = nn.Linear(2 * n, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size)
        if guidance:
            self.guidance = _zero_linear(2 * n, config.hidden_size)

    def __call__(self, angle: mx.array, guidance: mx.array | None = None) -> mx.array:
        """Angles [B] in radians -> [B, D].

        guidance: scales [B], of pictures that are being painted; None for pictures that are read.
        """
        out = self.fc2(silu(self.fc1(self._waves(angle))))
        return out if guidance is None else out + self.guidance(self._waves(guidance))

    def _waves(self, values: mx.array) -> mx.array:
        x = values[:, None] * self._frequencies
        return mx.concatenate([mx.cos(x), mx.sin(x)], -1)


class PatchEncoder(nn.Module):
    """Patches to token vectors: one linear layer, or a U-Net's way down; the angle embedding is added to each.

    It is added behind the linear layer, in the model's width, where it cannot collide with the few dimensions
    of a patch; seen from the transformer this contains the paper's form (arXiv 2408.11039, footnote 6). Behind
    the U-Net, which is steered by the angle itself, it stays: normalisation may have taken the angle's trace away.
    Positions, learned ones or coordinates, are added to either.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._patch_size, self._grid = config.patch_size, config.grid()
        if config.patch_encoder == "unet":
            self.unet = UNetDown(config)
        else:
            self.proj = nn.Linear(config.patch_dim, config.hidden_size)
        if config.patch_positions == "learned":
            self.position = 0.02 * mx.random.normal((config.patches_per_image, config.hidden_size))
        elif config.patch_positions == "coordinates":
            self.coordinates = nn.Linear(edge_waves(1, 1).shape[1], config.hidden_size)

    def __call__(
        self, patches: mx.array, angle: mx.array, grid: Size | None = None
    ) -> tuple[mx.array, Skips]:
        """Noisy patches [B, N, P] and their angle embedding [B, D] -> token vectors [B, N, D].

        With them come the skips that the decoder of the same pass needs; the linear encoder has none. grid: rows and
        columns of the patches, None for the config's.
        """
        rows, columns = grid or self._grid
        p = self._patch_size
        x, skips = (
            self.unet(unpatchify(patches, rows * p, columns * p, p), angle)
            if "unet" in self
            else (self.proj(patches), ())
        )
        x = x + angle[:, None]
        if "coordinates" in self:
            x = x + self.coordinates(mx.array(edge_waves(rows, columns)).astype(x.dtype))
        return (x + self.position if "position" in self else x), skips


class PatchDecoder(nn.Module):
    """Hidden states back to image elements: one linear layer, or a U-Net's way up. Starts at zero, its target's mean.

    With `patch_skip` it adds each element of the noisy patch times a gain that depends on the angle. The part of
    the target that is linear in the input (all of it, for white data) then need not travel through the
    transformer, whose width is hardly more than a large patch has elements. A U-Net has a way past the transformer
    already, but one of normalised features; the gain is exact, and may be had beside it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._patch_size = config.patch_size
        if config.patch_encoder == "unet":
            self.unet = UNetUp(config)
        else:
            self.proj = _zero_linear(config.hidden_size, config.patch_dim)
        if config.patch_skip:
            self.skip_gain = _zero_linear(config.hidden_size, config.patch_dim)

    def __call__(self, hidden: mx.array, patches: mx.array, angle: mx.array, skips: Skips = ()) -> mx.array:
        """Hidden states [B, N, D] -> [B, N, P]; noisy patches [B, N, P], angle embedding [B, D], its skips."""
        out = self._unet(hidden, angle, skips) if "unet" in self else self.proj(hidden)
        return out + self.skip_gain(silu(angle))[:, None] * patches if "skip_gain" in self else out

    def _unet(self, hidden: mx.array, angle: mx.array, skips: Skips) -> mx.array:
        return patchify(self.unet(hidden, angle, skips), self._patch_size)


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    layer.weight, layer.bias = mx.zeros_like(layer.weight), mx.zeros_like(layer.bias)
    return layer
