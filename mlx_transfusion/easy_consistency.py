"""Easy Consistency Tuning (ECT, arXiv 2406.14548): two points of one trajectory in place of a derivative.

The discrete-time relative of `consistency`: f(x, a) = cos(a) x - sin(a) F(x, a) is compared with itself at an earlier
point (x', b) of the trajectory, and the gap between both shrinks in stages over the run. No forward mode is needed,
only a second, undifferentiated pass. ECT counts noise by t = tan(a) (data of unit variance) and takes

    r = t (1 - gap),     gap = min(1, (1 + k sigmoid(-b t)) / q^(stage + 1)),     tan(b) = r        (section 3)

so in the first stages small angles are compared with the data itself (r = 0), as in diffusion training, and late
stages approach the continuous limit. The point x' lies on the teacher's (guided) velocity from x (distillation), or
on the sample's own noise (tuning on data alone): both are a rotation by a - b along a velocity v.

ECT's loss is weight (sqrt(|D|^2 + c^2) - c) with D = f(x, a) - sg f(x', b) and weight 1/(t - r), or 1/t^2 + 1 in its
later code. Both depend on t without bound. Here D is measured in the units of the network instead,

    d = D / (gap sin(a)),

which is D / ((t - r) cos(a)): the paper's 1/(t - r) without its decay at high noise. d tends to sCM's tangent
g = cos(a) df/da as the gap closes, so it has one scale in all stages and at all angles, and whatever follows sCM's
tangent follows d: the pseudo-Huber loss's gradient is d / sqrt(|d|^2 + c^2), bounded, the network moves along it, and
the learned weight w(a) and the balance with the text loss stay what they are. That is the paper's loss with weight
1/sin(a), between its two, and with c in proportion to the gap.

Nothing is divided by cos(a) or sin(a): with n = hypot(cos(a), (1 - gap) sin(a)) all terms of d are bounded from
angle 0 to pi/2, where t is infinite and b = pi/2 too.

Shapes as in `consistency`: x, F, v and d `[M, ...]`, angles and gaps `[M]`. Everything is to be float32.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_transfusion import consistency, trigflow
from mlx_transfusion.pace import DECAY, STRETCH

_TINY = 1e-6
"""Smallest cosine that tan(a) is computed with: cos(pi/2) in float32 is negative."""


def relative_gap(angle: mx.array, at_noise: float | mx.array) -> mx.array:
    """gap = 1 - r/t of each picture [M], in (0, 1], for angles [M] and the gap at large angles (`pace.stage_gap`)."""
    tangent = mx.sin(angle) / mx.maximum(mx.cos(angle), _TINY)
    return mx.minimum(1.0, at_noise * (1 + STRETCH * mx.sigmoid(-DECAY * tangent)))


class Earlier(NamedTuple):
    """The point of the same trajectory that f is compared with."""

    x: mx.array
    """State x' [M, ...]."""
    angle: mx.array
    """b [M], at most the angle it comes from, 0 for the data."""
    scale: mx.array
    """1/n [M]: cos(b) = cos(a)/n, sin(b) = (1 - gap) sin(a)/n."""


def earlier(x: mx.array, angle: mx.array, cos_velocity: mx.array, gap: mx.array) -> Earlier:
    """The point at tan(b) = (1 - gap) tan(a), one rotation from x [M, ...] along the velocity v.

    cos_velocity: cos(a) v [M, ...], of the sample itself (the point is then exact) or of a teacher (exact as the gap
    closes). gap [M]: `relative_gap`. The rotation is `trigflow.rotate`, with sin(a - b) = gap sin(a) cos(a) / n.
    """
    cosine, sine = mx.maximum(mx.cos(angle), 0), mx.sin(angle)
    # n is 0.24 or more if the gap is at most 1/2 at pi/2: a gap of 1, where n = cos(a), ends at angle 1.32.
    scale = 1 / mx.sqrt(cosine.square() + ((1 - gap) * sine).square())
    along = trigflow.per_image((cosine.square() + (1 - gap) * sine.square()) * scale, x)
    across = trigflow.per_image(gap * sine * scale, x)
    return Earlier(along * x - across * cos_velocity, mx.arctan2((1 - gap) * sine, cosine), scale)


def tangent(
    network: mx.array,
    network_earlier: mx.array,
    x: mx.array,
    angle: mx.array,
    cos_velocity: mx.array,
    gap: mx.array,
    point: Earlier,
) -> mx.array:
    """d = (f(x, a) - f(x', b)) / (gap sin(a)) [M, ...] as a constant: F + gap d is where f(x, a) = f(x', b).

    network, network_earlier: F [M, ...] at x and at x'. With f written out, what the states contribute cancels to
    first order in the gap, and only F's difference is left to divide by it:

        d = cos(b) (cos(a) v / n - sin(b) x) - (F - (1 - gap)/n F') / gap
    """
    cosine = trigflow.per_image(mx.cos(point.angle), x)
    sine = trigflow.per_image(mx.sin(point.angle), x)
    gap, scale = trigflow.per_image(gap, x), trigflow.per_image(point.scale, x)
    states = cosine * (scale * cos_velocity - sine * x)
    return mx.stop_gradient(states - (network - (1 - gap) * scale * network_earlier) / gap)


def rescale(d: mx.array, how: str = "normalize", constant: float = consistency.TANGENT_CONSTANT) -> mx.array:
    """d [M, ...] as the loss's gradient has it: "normalize" to d / sqrt(|d|^2 + c^2) (pseudo-Huber), "clip", "none".

    |d| is the root mean square over an image. "none" is the squared loss. Raises UserError for an unknown `how`.
    """
    if how != "normalize":
        return consistency.rescale(d, how)
    return d / trigflow.per_image(mx.sqrt(consistency.rms(d).square() + constant**2), d)
