"""Exact answers in float64 numpy, written from the mathematics: Gaussian data, a 1-D mixture, a two-layer network.

TrigFlow with unit standard deviations: x = cos(a) x0 + sin(a) z. Data N(m, s^2) has variance
V(a) = s^2 cos^2 a + sin^2 a at angle a, and its velocity is linear in x; its trajectories keep their quantile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Field = Callable[[np.ndarray, float], np.ndarray]


def follow(velocity: Field, x: np.ndarray, start: float, end: float = 0.0, steps: int = 64) -> np.ndarray:
    """The trajectory dx/da = velocity(x, a) from `start` to `end`, by classical Runge-Kutta."""
    h = (end - start) / steps
    for i in range(steps):
        a = start + i * h
        k1 = velocity(x, a)
        k2 = velocity(x + h / 2 * k1, a + h / 2)
        k3 = velocity(x + h / 2 * k2, a + h / 2)
        k4 = velocity(x + h * k3, a + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@dataclass(frozen=True)
class Mixture:
    """Sum of weights[k] N(means[k], stds[k]^2) in one dimension. One component is Gaussian data."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def components(self, x: np.ndarray, a: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distances to the means at angle a, variances, and log densities without constants: [..., K]."""
        c, s = (f(np.asarray(a, np.float64))[..., None] for f in (np.cos, np.sin))
        distance = np.asarray(x, np.float64)[..., None] - c * np.array(self.means)
        variance = np.array(self.stds) ** 2 * c**2 + s**2
        return distance, variance, np.log(self.weights) - np.log(variance) / 2 - distance**2 / variance / 2

    def velocity(self, x: np.ndarray, a: np.ndarray | float) -> np.ndarray:
        distance, variance, density = self.components(x, a)
        posterior = np.exp(density - density.max(-1, keepdims=True))
        posterior /= posterior.sum(-1, keepdims=True)
        c, s = (f(np.asarray(a, np.float64))[..., None] for f in (np.cos, np.sin))
        each = -s * np.array(self.means) + s * c * (1 - np.array(self.stds) ** 2) / variance * distance
        return (posterior * each).sum(-1)

    def cdf(self, x: np.ndarray, a: np.ndarray | float) -> np.ndarray:
        distance, variance, _ = self.components(x, a)
        z = distance / np.sqrt(2 * variance)
        return (np.array(self.weights) * 0.5 * (1 + np.vectorize(math.erf)(z))).sum(-1)

    def flow_map(self, x: np.ndarray, a: np.ndarray | float) -> np.ndarray:
        """The consistency function: the data point whose quantile is that of x at angle a, by bisection."""
        goal = self.cdf(x, a)
        low, high = np.full(goal.shape, -20.0), np.full(goal.shape, 20.0)
        for _ in range(60):
            middle = (low + high) / 2
            above = self.cdf(middle, 0.0) > goal
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return (low + high) / 2


TWO_MODES = Mixture((0.3, 0.7), (-2.0, 1.2), (0.4, 0.6))
"""Mean 0.24, standard deviation 1.565. Its flow map is nearly a cliff at the 30% quantile."""

Parameters = dict[str, np.ndarray]


def network_gradients(
    p: Parameters,
    x: np.ndarray,
    angle: np.ndarray,
    velocity: np.ndarray,
    warmup: float,
    rescale: Callable[[np.ndarray], np.ndarray],
) -> tuple[float, Parameters, np.ndarray]:
    """Loss of Algorithm 1, its gradients, and g, for F = tanh(x A + a u + b) B + c and w = p a + q: all by hand.

    x and velocity [M, D], angle [M].
    """
    a, count = angle[:, None], x.size
    cos, sin = np.cos(a), np.sin(a)
    h = np.tanh(x @ p["A"] + a * p["u"] + p["b"])
    out = h @ p["B"] + p["c"]
    along = (1 - h**2) * (velocity @ p["A"] + p["u"])  # d hidden / d angle on the trajectory
    df_da = -cos * (out - velocity) - sin * warmup * (x + along @ p["B"])
    g = rescale(cos * df_da)
    w = p["p"] * angle + p["q"]
    square = (g**2).mean(1)
    to_out = -2 * np.exp(w)[:, None] * g / count
    to_hidden = (to_out @ p["B"].T) * (1 - h**2)
    to_w = (np.exp(w) * square - 1) / len(x)
    gradients = {
        "A": x.T @ to_hidden,
        "u": (to_hidden * a).sum(0),
        "b": to_hidden.sum(0),
        "B": h.T @ to_out,
        "c": to_out.sum(0),
        "p": (to_w * angle).sum(),
        "q": to_w.sum(),
    }
    return float((np.exp(w) * square - w).mean()), gradients, g
