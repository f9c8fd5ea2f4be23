"""Continuous-time consistency models (sCM, arXiv 2410.11081): value, tangent and loss, for any network.

A network F(x, a) is read as a TrigFlow velocity. The consistency function

    f(x, a) = cos(a) x - sin(a) F(x, a)                        (section 3; `trigflow.x0_from_velocity`)

jumps to the data in one step. It is right when f is the same all along a trajectory dx/da = v, that is when

    df/da = -cos(a) (F - v) - sin(a) (x + dF/da) = 0,          dF/da = (∂F/∂x) v + ∂F/∂a

Algorithm 1 moves F along g = cos(a) df/da, in the rearranged form of section 5.1 whose factors cos(a) sin(a) stand
before the derivative is taken, so that nothing grows at either end:

    g = -cos(a) (cos(a) F - cos(a) v) - r (cos(a) sin(a) x + J),     J = cos(a) sin(a) dF/da

The velocity enters as cos(a) v alone, which is exact for a teacher of any kind: one that predicts the noise gives
cos(a) v = eps - sin(a) x without a division. v is a teacher's (distillation, sCD) or that of the sample,
cos(a) z - sin(a) x0 (training, sCT).

Data and noise have unit standard deviation (sigma_d = 1). Shapes: x, F, v and g are `[M, ...]`, angles `[M]` in
radians. Everything is to be float32: the tangent is a difference of near-equal terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion import trigflow
from mlx_transfusion.errors import UserError

Network = Callable[[mx.array, mx.array], mx.array]
"""F(x [M, ...], angle [M]) -> [M, ...]."""

TANGENT_CONSTANT = 0.1
"""c of g / (|g| + c), which keeps a tangent near zero from being blown up to full length."""


class Value(NamedTuple):
    """What one forward pass with its tangent gives."""

    network: mx.array
    """F [M, ...], with its gradient."""
    derivative: mx.array
    """J = cos(a) sin(a) dF/da [M, ...], a constant."""


def value_and_derivative(network: Network, x: mx.array, angle: mx.array, cos_velocity: mx.array) -> Value:
    """F and J of the states x [M, ...] at angles [M] along cos(a) v [M, ...], from one forward-mode pass.

    The derivative is a constant for gradients: the target is never differentiated (Algorithm 1), and gradients
    through a forward-mode derivative are silently wrong under gradient checkpointing.
    """
    a = trigflow.per_image(angle, x)
    primals = [x, angle]
    tangents = [mx.sin(a) * cos_velocity, mx.sin(angle) * mx.cos(angle)]
    value, derivative = mx.jvp(network, primals, [mx.stop_gradient(t) for t in tangents])
    return Value(value[0], mx.stop_gradient(derivative[0]))


def tangent(
    value: Value, x: mx.array, angle: mx.array, cos_velocity: mx.array, warmup: float | mx.array = 1.0
) -> mx.array:
    """g = cos(a) df/da [M, ...] as a constant.

    warmup: the factor r in [0, 1] of the unstable second term (section 4.2); 1 is the full tangent.
    """
    a = trigflow.per_image(angle, x)
    cosine, sine = mx.cos(a), mx.sin(a)
    drift = cosine * (cosine * value.network - cos_velocity)
    return mx.stop_gradient(-drift - warmup * (cosine * sine * x + value.derivative))


def rms(x: mx.array) -> mx.array:
    """Root mean square of each image over all of its elements: [M, ...] -> [M]."""
    return mx.sqrt(x.square().reshape(x.shape[0], -1).mean(1))


def rescale(g: mx.array, how: str = "normalize", constant: float = TANGENT_CONSTANT) -> mx.array:
    """The tangent [M, ...] made harmless: "normalize" to g / (|g| + c), "clip" to [-1, 1], or "none".

    constant: c, which keeps a tangent near zero from being blown up to full length.

    |g| is the root mean square over an image. The paper writes the plain norm, which is larger by the square root
    of the number of elements D; the learned weight undoes the difference in the end, but only the mean form has
    the gradient scale of the diffusion loss that it replaces from the first step on, whatever the image size. A
    text loss that shares the weights and the clipping needs that. One norm an image, never one a patch.

    Raises UserError for an unknown `how`.
    """
    if how == "clip":
        return mx.clip(g, -1, 1)
    if how == "none":
        return g
    if how != "normalize":
        raise UserError(f'tangent is "{how}", expected normalize, clip or none')
    return g / (trigflow.per_image(rms(g), g) + constant)


def image_losses(network: mx.array, g: mx.array, log_weight: mx.array) -> mx.array:
    """Loss of each image [M]: e^w mean((F - sg(F) - g)^2) - w (Algorithm 1).

    network: F [M, ...] with its gradient; g: the rescaled tangent; log_weight: w(a) [M], zeros for none. Its value
    says little, because F - sg(F) is always 0: it is e^w mean(g^2) - w. Its gradient moves F along g.
    """
    target = mx.stop_gradient(network) + g
    error = (network - target).square().reshape(g.shape[0], -1).mean(1)
    return mx.exp(log_weight) * error - log_weight


class LossWeight(nn.Module):
    """The adaptive weighting w(a) of section 4.2: a small network of the angle alone, 0 at first.

    At its optimum e^w is one over the mean squared error at that angle (appendix D), so all angles count alike.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self._frequencies = 8.0 ** mx.linspace(0, 1, width // 2) - 0.5
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, 1)
        self.fc2.weight, self.fc2.bias = mx.zeros_like(self.fc2.weight), mx.zeros_like(self.fc2.bias)

    def __call__(self, angle: mx.array) -> mx.array:
        """Angles [M] in radians -> w [M]."""
        x = angle[:, None] * self._frequencies
        return self.fc2(mx.tanh(self.fc1(mx.concatenate([mx.cos(x), mx.sin(x)], -1))))[:, 0]
