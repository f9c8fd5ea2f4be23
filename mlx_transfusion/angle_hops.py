"""Discrete consistency distillation in hops of a fixed angle (arXiv 2303.01469), for pictures that are mostly noise.

A teacher's trajectory is followed from angle a down to b = a - hop in one rotation (DDIM), and f(x, a) is moved to
f(x', b), a constant. Unlike ECT, whose relative gap in tan(a) leaves dozens of hops between pi/2 and the middle
angles, a few hops of fixed angle cross the whole range, so an error at the end of a chain is magnified a few times
only. `training/tangents.py` joins this with sCM: the derivative below some angle, hops above it.

Shapes as in `consistency`: x, F, v and d `[M, ...]`, angles `[M]`. Everything is to be float32.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_transfusion import trigflow

_TINY = 1e-5
"""Smallest cosine that v is computed with from cos(a) v: beyond it float32 has no digits left."""


class Landing(NamedTuple):
    """Where a hop ends."""

    x: mx.array
    """State x' [M, ...]."""
    angle: mx.array
    """b [M], 0 at least."""


def hop(x: mx.array, angle: mx.array, cos_velocity: mx.array, by: float) -> Landing:
    """The state x' at b = max(0, a - by) of the trajectory through x [M, ...] at angles [M], in one rotation.

    cos_velocity: cos(a) v [M, ...] of the teacher. by: radians. The error is of second order in `by`.
    """
    there = mx.maximum(angle - by, 0)
    v = cos_velocity / trigflow.per_image(mx.maximum(mx.cos(angle), _TINY), x)
    from_, to = trigflow.per_image(angle, x), trigflow.per_image(there, x)
    return Landing(trigflow.rotate(x, v, from_, to), there)


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
