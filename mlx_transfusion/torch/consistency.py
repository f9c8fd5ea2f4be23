"""Continuous-time consistency models in PyTorch (sCM, arXiv 2410.11081): the twin of `consistency.py`.

The derivative along the trajectory comes from `torch.func.jvp` of a pass without gradients, on attention that is
written out; the value that is differentiated comes from a second, ordinary pass. That costs one more forward than
taking both from one pass, and buys fused attention, recomputation and sharding for the pass that has a gradient.
Shapes: x, F, v and g are [M, ...], angles [M] in radians. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mlx_transfusion import trigflow
from mlx_transfusion.errors import UserError

Network = Callable[[Tensor, Tensor], Tensor]
"""F(x [M, ...], angle [M]) -> [M, ...]."""

TANGENT_CONSTANT = 0.1
"""c of g / (|g| + c), which keeps a tangent near zero from being blown up to full length."""


def derivative(network: Network, x: Tensor, angle: Tensor, cos_velocity: Tensor) -> Tensor:
    """J = cos(a) sin(a) dF/da [M, ...] of the states x at angles [M] along cos(a) v, as a constant (section 5.1)."""
    a = trigflow.per_image(angle, x)
    with torch.no_grad():
        tangents = a.sin() * cos_velocity, angle.sin() * angle.cos()
        return torch.func.jvp(network, (x, angle), tangents)[1].detach()


def tangent(
    value: Tensor, slope: Tensor, x: Tensor, angle: Tensor, cos_velocity: Tensor, warmup: float = 1.0
) -> Tensor:
    """g = cos(a) df/da [M, ...] as a constant, from F and J (Algorithm 1).

    warmup: the factor r in [0, 1] of the unstable second term (section 4.2); 1 is the full tangent.
    """
    a = trigflow.per_image(angle, x)
    cosine, sine = a.cos(), a.sin()
    drift = cosine * (cosine * value - cos_velocity)
    return (-drift - warmup * (cosine * sine * x + slope)).detach()


def rms(x: Tensor) -> Tensor:
    """Root mean square of each image over all of its elements: [M, ...] -> [M]."""
    return x.square().flatten(1).mean(1).sqrt()


def rescale(g: Tensor, how: str = "normalize", constant: float = TANGENT_CONSTANT) -> Tensor:
    """The tangent made harmless: "normalize" to g / (rms(g) + c), "clip" to [-1, 1], or "none".

    Raises UserError for an unknown `how`.
    """
    if how == "clip":
        return g.clamp(-1, 1)
    if how == "none":
        return g
    if how != "normalize":
        raise UserError(f'tangent is "{how}", expected normalize, clip or none')
    return g / (trigflow.per_image(rms(g), g) + constant)


def image_losses(network: Tensor, g: Tensor, log_weight: Tensor) -> Tensor:
    """Loss of each image [M]: e^w mean((F - sg(F) - g)^2) - w (Algorithm 1); its gradient moves F along g."""
    error = (network - (network.detach() + g)).square().flatten(1).mean(1)
    return log_weight.exp() * error - log_weight


class LossWeight(nn.Module):
    """The adaptive weighting w(a) of section 4.2: a small network of the angle alone, 0 at first."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, 1)

    def forward(self, angle: Tensor) -> Tensor:
        """Angles [M] in radians -> w [M]."""
        frequencies = 8.0 ** torch.linspace(0, 1, self.width // 2, device=angle.device) - 0.5
        x = angle[:, None] * frequencies
        return self.fc2(torch.tanh(self.fc1(torch.cat([x.cos(), x.sin()], -1))))[:, 0]
