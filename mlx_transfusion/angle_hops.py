"""Discrete consistency distillation in hops of a fixed angle (arXiv 2303.01469), for pictures that are mostly noise.

The teacher's trajectory is followed from angle a down to b = a - hop by one step of the midpoint rule, and f(x, a) is
moved to f(x', b), a constant. Unlike ECT, whose relative gap in tan(a) leaves dozens of hops between pi/2 and the
middle angles, a few hops of fixed angle cross the whole range, so an error at the end of a chain is magnified a few
times only. `training/tangents.py` joins this with sCM: the derivative below some angle, hops above it.

Shapes as in `consistency`: x, F, v and d `[M, ...]`, angles `[M]`. Everything is to be float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlx_transfusion import trigflow

CosVelocity = Callable[[mx.array, mx.array], mx.array]
"""cos(a) v [M, ...] of a teacher at states x [M, ...] and angles [M]."""

_TINY = 1e-5
"""Smallest cosine that v is computed with from cos(a) v: beyond it float32 has no digits left."""


class Landing(NamedTuple):
    """Where a hop ends."""

    x: mx.array
    """State x' [M, ...]."""
    angle: mx.array
    """b [M], 0 at least."""


def hop(x: mx.array, angle: mx.array, cos_velocity: mx.array, teacher: CosVelocity, by: float) -> Landing:
    """The state x' at b = max(0, a - by) of the trajectory through x [M, ...] at angles [M]; the error is O(by^3).

    cos_velocity: that of the teacher at x. by: radians. With h = (a - b) / 2, x_m = cos(h) x - sin(h) v lies half-way
    and x' = x - 2 sin(h) v(x_m, a - h). That is exact for a trajectory of fixed data and noise.
    """
    there = mx.maximum(angle - by, 0)
    half = (angle + there) / 2
    middle = trigflow.rotate(
        x, _velocity(cos_velocity, angle), trigflow.per_image(angle, x), trigflow.per_image(half, x)
    )
    v = _velocity(teacher(middle, half), half)
    return Landing(x - 2 * mx.sin(trigflow.per_image(angle - half, x)) * v, there)


def _velocity(cos_velocity: mx.array, angle: mx.array) -> mx.array:
    return cos_velocity / trigflow.per_image(mx.maximum(mx.cos(angle), _TINY), cos_velocity)


def tangent(
    network: mx.array, network_there: mx.array, x: mx.array, angle: mx.array, to: Landing
) -> mx.array:
    """d [M, ...] as a constant: F + d is where f(x, a) = f(x', b).

    network, network_there: F [M, ...] at x and at x'. Angles of 0, where f is x whatever F is, give d = 0.
    """
    a = trigflow.per_image(angle, x)
    sine = mx.sin(a)
    end = trigflow.x0_from_velocity(to.x, network_there, trigflow.per_image(to.angle, x))
    wanted = (mx.cos(a) * x - end) / mx.maximum(sine, _TINY)
    return mx.stop_gradient(mx.where(sine > _TINY, wanted - network, 0))
