"""The time of a rectified flow as a vector: BAGEL and Show-o2 embed it alike."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.models.layers import silu

FREQUENCIES = 128
"""Half of the numbers that the time becomes before the two linear layers."""


class FlowTimeEmbedding(nn.Module):
    """t in [0, 1], as it is, in 128 cosines and 128 sines of falling frequency, then linear, SiLU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._frequencies = mx.exp(-math.log(10000.0) / FREQUENCIES * mx.arange(FREQUENCIES))
        self.fc1 = nn.Linear(2 * FREQUENCIES, width)
        self.fc2 = nn.Linear(width, width)

    def __call__(self, t: mx.array) -> mx.array:
        """Times [B] -> [B, D]."""
        x = t[:, None] * self._frequencies
        waves = mx.concatenate([mx.cos(x), mx.sin(x)], -1).astype(self.fc1.bias.dtype)
        return self.fc2(silu(self.fc1(waves)))
