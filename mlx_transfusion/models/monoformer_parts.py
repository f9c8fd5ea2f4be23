"""The small parts of a MonoFormer (monoformer.py): its layers besides Llama's, its positions, its attention mask.

Shapes: B rows, T positions, D width, N patches.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.gates import silu

TIME_WIDTH = 256
"""Sines and cosines of a time step; it does not follow the model's width."""


class TwoLayers(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, out)
        self.fc2 = nn.Linear(out, out)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., width] -> [..., out]."""
        return self.fc2(gelu(self.fc1(x)))


class TimeEmbedder(nn.Module):
    """A time step as sines and cosines, then two layers."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(TIME_WIDTH, d)
        self.fc2 = nn.Linear(d, d)

    def __call__(self, step: mx.array) -> mx.array:
        """Time steps [B], 0..999 and fractions -> [B, D]."""
        half = TIME_WIDTH // 2
        waves = step.astype(mx.float32)[:, None] * mx.exp(-np.log(10000) * mx.arange(half) / half)
        waves = mx.concatenate([mx.cos(waves), mx.sin(waves)], -1)
        return self.fc2(silu(self.fc1(waves.astype(self.fc1.weight.dtype))))


class FinalLayer(nn.Module):
    """DiT's last layer (arXiv 2212.09748, 3.2): a norm that the time shifts and scales, then a linear map."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(d, 2 * d)
        self.linear = nn.Linear(d, out)

    def __call__(self, x: mx.array, time: mx.array) -> mx.array:
        """Hidden states [B, N, D] and the time [B, D] -> [B, N, out]."""
        shift, scale = mx.split(self.modulation(silu(time))[:, None], 2, -1)
        return self.linear(mx.fast.layer_norm(x, None, None, 1e-6) * (1 + scale) + shift)


def gelu(x: mx.array) -> mx.array:
    """The exact GELU. Not mlx's own, which is compiled: that has no gradient inside a forward-mode derivative."""
    return x * (1 + mx.erf(x * 0.5**0.5)) / 2


def position_sines(grid: int, d: int) -> mx.array:
    """DiT's fixed positions [grid*grid, D] in raster order: the column's sines and cosines, then the row's."""
    quarter = d // 4
    waves = np.arange(grid)[:, None] * 10000.0 ** (-np.arange(quarter) / quarter)
    axis = np.concatenate([np.sin(waves), np.cos(waves)], 1)
    columns, rows = np.tile(axis, (grid, 1)), np.repeat(axis, grid, 0)
    return mx.array(np.concatenate([columns, rows], 1).astype(np.float32))


def picture_mask(cache: KVCache, new: np.ndarray, picture: int) -> mx.array:
    """KVCache.text_mask as bool [B, 1, T, S + T], with all tokens from `picture` on seeing each other.

    new: which of them are real, bool [B, T].
    """
    t, s = new.shape[1], cache.valid.shape[1]
    among = np.tril(np.ones((t, t), bool))
    among[picture:, picture:] = True
    seen = np.concatenate([np.ones((t, s), bool), among], 1)
    return mx.array((seen & cache.visible(new)[:, None])[:, None])
