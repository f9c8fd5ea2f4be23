"""The small parts of a MonoFormer (monoformer.py): its layers besides Llama's, its positions, its attention mask.

Shapes: B rows, T positions, D width, N patches.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.layers import Mask, silu


class TwoLayers(nn.Module):
    """Two linear layers with a nonlinearity between them."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, out)
        self.fc2 = nn.Linear(out, out)

    def __call__(self, x: mx.array, act: Callable[[mx.array], mx.array]) -> mx.array:
        """[..., width] -> [..., out]."""
        return self.fc2(act(self.fc1(x)))


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


def attention_mask(cache: KVCache, new: np.ndarray, picture: int | None) -> Mask:
    """Causal among the new tokens and open to all that is valid in the cache; the cheap forms where they serve.

    new: which tokens are real, bool [B, T]. picture: tokens from this one on see each other.
    """
    t, s = new.shape[1], cache.valid.shape[1]
    if picture is None and new.all() and cache.valid.all():
        return None if t == 1 else "causal"
    among = np.tril(np.ones((t, t), bool))
    if picture is not None:
        among[picture:, picture:] = True
    seen = np.concatenate([np.ones((t, s), bool), among], 1)
    mask = seen & cache.visible(new)[:, None]
    # A padded query keeps itself: a row that sees nothing is undefined on some backends.
    mask |= np.eye(t, s + t, s, dtype=bool)
    return mx.array(mask[:, None])
