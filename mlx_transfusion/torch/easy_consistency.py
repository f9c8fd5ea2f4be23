"""Easy Consistency Tuning in PyTorch (ECT, arXiv 2406.14548). The MLX twin, `easy_consistency.py`, has the formulas.

Shapes: x, F, v and d are [M, ...], angles and gaps [M] in radians. Everything is float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlx_transfusion import trigflow
from mlx_transfusion.pace import DECAY, STRETCH
from mlx_transfusion.torch import consistency

_TINY = 1e-6
"""Smallest cosine that tan(a) is computed with: cos(pi/2) in float32 is negative."""


def relative_gap(angle: Tensor, at_noise: float) -> Tensor:
    """gap = 1 - r/t of each picture [M], in (0, 1], for angles [M] and the gap at large angles."""
    tangent = angle.sin() / angle.cos().clamp(min=_TINY)
    return (at_noise * (1 + STRETCH * torch.sigmoid(-DECAY * tangent))).clamp(max=1.0)


class Earlier(NamedTuple):
    """The point of the same trajectory that f is compared with."""

    x: Tensor
    """State x' [M, ...]."""
    angle: Tensor
    """b [M], at most the angle it comes from, 0 for the data."""
    scale: Tensor
    """1/n [M]: cos(b) = cos(a)/n, sin(b) = (1 - gap) sin(a)/n."""


def earlier(x: Tensor, angle: Tensor, cos_velocity: Tensor, gap: Tensor) -> Earlier:
    """The point at tan(b) = (1 - gap) tan(a), one rotation from x [M, ...] along v, given as cos(a) v [M, ...]."""
    cosine, sine = angle.cos().clamp(min=0), angle.sin()
    scale = 1 / (cosine.square() + ((1 - gap) * sine).square()).sqrt()
    along = trigflow.per_image((cosine.square() + (1 - gap) * sine.square()) * scale, x)
    across = trigflow.per_image(gap * sine * scale, x)
    return Earlier(along * x - across * cos_velocity, torch.arctan2((1 - gap) * sine, cosine), scale)


def tangent(
    network: Tensor,
    network_earlier: Tensor,
    x: Tensor,
    angle: Tensor,
    cos_velocity: Tensor,
    gap: Tensor,
    point: Earlier,
) -> Tensor:
    """d = (f(x, a) - f(x', b)) / (gap sin(a)) [M, ...] as a constant, from F [M, ...] at x and at x'."""
    cosine = trigflow.per_image(point.angle.cos(), x)
    sine = trigflow.per_image(point.angle.sin(), x)
    gap, scale = trigflow.per_image(gap, x), trigflow.per_image(point.scale, x)
    states = cosine * (scale * cos_velocity - sine * x)
    return (states - (network - (1 - gap) * scale * network_earlier) / gap).detach()


def rescale(d: Tensor, how: str = "normalize", constant: float = consistency.TANGENT_CONSTANT) -> Tensor:
    """d [M, ...] as the loss's gradient has it: "normalize" to d / sqrt(|d|^2 + c^2) (pseudo-Huber), "clip", "none".

    Raises UserError for an unknown `how`.
    """
    if how != "normalize":
        return consistency.rescale(d, how)
    return d / trigflow.per_image((consistency.rms(d).square() + constant**2).sqrt(), d)
