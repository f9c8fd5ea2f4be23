"""A rectified flow at the border of a model: its time as a vector (BAGEL, Show-o2), its velocity as TrigFlow's."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion import trigflow
from mlx_transfusion.models.gates import silu

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


def flow_velocity(
    x: mx.array, angle: mx.array, network: Callable[[mx.array, mx.array], mx.array]
) -> mx.array:
    """TrigFlow velocity [B, N, P] of noisy patches [B, N, P] at angles [B] from a network of rectified flow.

    network: states of the flow [B, N, P] and their shares of noise [B] -> the velocity noise - data [B, N, P].
    """
    per_image = angle[:, None, None]
    share = trigflow.flow_time_from_angle(per_image)
    state = x / (mx.sin(per_image) + mx.cos(per_image))
    return trigflow.flow_to_trigflow(state, network(state, share[:, 0, 0]), share)[1]
