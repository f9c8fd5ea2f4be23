"""Eight Gaussians on a ring: unit variance, and the exact velocity of its probability flow."""

from __future__ import annotations

import math
from itertools import pairwise

import mlx.core as mx
import numpy as np

from mlx_transfusion import noise, trigflow

MODES = 8
STD = 0.1
RADIUS = math.sqrt(2 * (1 - STD**2))
"""Makes the variance of each coordinate RADIUS^2 / 2 + STD^2 = 1, which TrigFlow wants."""


def means() -> np.ndarray:
    """Centres of the modes [MODES, 2]."""
    turn = 2 * math.pi * np.arange(MODES) / MODES
    return RADIUS * np.stack([np.cos(turn), np.sin(turn)], 1)


def sample(count: int, index: int, seed: int = 0) -> np.ndarray:
    """`count` exact samples, float32 [count, 2]; another `index`, other samples."""
    which = noise.integers(seed, index, MODES, count, stream="ring/mode")
    around = noise.normal(seed, index, (count, 2), stream="ring/around")
    return (means()[which] + STD * around).astype(np.float32)


def velocity(x: mx.array, angle: mx.array) -> mx.array:
    """The exact TrigFlow velocity [M, 2] of states x [M, 2] at angles [M]: the teacher.

    At each angle the states are a mixture too, of components N(cos(a) m, V) with V = STD^2 cos^2 + sin^2. The
    velocity is the mean of the components' own, weighted by how likely each is to have made x.
    """
    a = trigflow.per_image(angle, x)
    cosine, sine = mx.cos(a), mx.sin(a)
    centres = mx.array(means().astype(np.float32))
    distance = x[:, None] - cosine[:, None] * centres  # [M, MODES, 2]
    variance = STD**2 * cosine**2 + sine**2
    share = mx.softmax(-distance.square().sum(-1) / (2 * variance), -1)
    centre = share @ centres
    return -sine * centre + sine * cosine * (1 - STD**2) / variance * (x - cosine * centre)


def ddim(start: mx.array, steps: int) -> list[mx.array]:
    """The teacher's states from noise [M, 2] to data in `steps` equal steps, both ends included."""
    angles = np.linspace(trigflow.NOISE_ANGLE, 0, steps + 1)
    states = [start]
    for now, then in pairwise(angles):
        v = velocity(states[-1], mx.full((len(start),), now))
        states.append(trigflow.rotate(states[-1], v, float(now), float(then)))
        mx.eval(states[-1])
    return states


def energy_distance(x: mx.array, y: mx.array) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples [n, 2]: 0 for equal distributions, without bias.

    The root of it is a metric. Pairs of a point with itself are left out, so the estimate may fall below 0.
    """
    within = [_mean_distance(s, s) * len(s) / (len(s) - 1) for s in (x, y)]
    return 2 * _mean_distance(x, y) - within[0] - within[1]


def _mean_distance(x: mx.array, y: mx.array, rows: int = 1024) -> float:
    total = 0.0
    for i in range(0, len(x), rows):
        part = x[i : i + rows]
        distances = mx.sqrt((part[:, None, 0] - y[:, 0]) ** 2 + (part[:, None, 1] - y[:, 1]) ** 2)
        total += float(distances.mean(1).sum())
    return total / len(x)
