"""What Show-o2 makes of a picture's latents: one way for what it means, one for how it looks, and their fusion.

Both ways begin with the same latent patches. The semantic one is SigLIP's layers, trained to read noisy latents in
the place of pixels; the other is a linear map.
Shapes: B pictures, N patches in raster order, P numbers of a patch, C SigLIP's width, D the decoder's width.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_transfusion.models.vision_layers import VisionConfig, VisionLayer, gelu_erf, gelu_tanh

FUSION_EPS = 1e-6
CUBIC = -0.75
"""PyTorch's coefficient of bicubic interpolation."""


class DualPath(nn.Module):
    """Latent patches to the vectors that the decoder reads."""

    def __init__(self, config: VisionConfig, numbers: int, width: int, rows: int) -> None:
        super().__init__()
        c = config.hidden_size
        self.embed_und = nn.Linear(numbers, c)
        self.embed_gen = nn.Linear(numbers, width)
        self.positions = nn.Embedding(rows, c)
        self.layers = [VisionLayer(config, gelu_tanh) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(c + width, eps=FUSION_EPS)
        self.fc1 = nn.Linear(c + width, width)
        self.fc2 = nn.Linear(width, width)

    def __call__(self, patches: mx.array, grid: tuple[int, int], resize: bool) -> mx.array:
        """Latent patches [B, N, P] of a picture of grid (rows, columns) -> [B, N, D].

        resize: whether the table of positions is that of another, square grid.
        """
        return self.fuse(self.semantic(patches, grid, resize), self.embed_gen(patches))

    def semantic(self, patches: mx.array, grid: tuple[int, int], resize: bool) -> mx.array:
        """The semantic way alone: [B, N, C]."""
        x = self.embed_und(patches) + self.table(grid, resize)
        for layer in self.layers:
            x = layer(x)
        return x

    def fuse(self, semantic: mx.array, looks: mx.array) -> mx.array:
        """[B, N, C] and [B, N, D] -> [B, N, D]."""
        return self.fc2(gelu_erf(self.fc1(self.norm(mx.concatenate([semantic, looks], -1)))))

    def table(self, grid: tuple[int, int], resize: bool) -> mx.array:
        """Positions [N, C] of a grid."""
        if not resize:
            return self.positions.weight
        side = round(self.positions.weight.shape[0] ** 0.5)
        square = self.positions.weight.reshape(side, side, -1)
        by_row, by_column = (mx.array(cubic_weights(side, n), square.dtype) for n in grid)
        return mx.einsum("ri,cj,ijd->rcd", by_row, by_column, square).reshape(grid[0] * grid[1], -1)


def cubic_weights(size: int, new: int) -> np.ndarray:
    """The matrix [new, size] of PyTorch's bicubic interpolation along an axis, without antialiasing."""

    def near(x: np.ndarray) -> np.ndarray:  # within one step
        return ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:  # one to two steps away
        return ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC

    at = (np.arange(new) + 0.5) * size / new - 0.5
    first = np.floor(at)
    rest = at - first
    out = np.zeros((new, size))
    for step, weight in zip(
        (-1, 0, 1, 2), (far(rest + 1), near(rest), near(1 - rest), far(2 - rest)), strict=True
    ):
        column = np.clip(first.astype(int) + step, 0, size - 1)
        np.add.at(out, (np.arange(new), column), weight)
    return out.astype(np.float32)
