"""The ways to tell a picture's network output where to go: sCM's derivative, ECT's pair of points, or sCM's
derivative at small angles with hops of a fixed angle above them.

All give the output F with its gradient and a direction for it. Everything else of a consistency step (prefixes,
the teacher, the learned weight, the text loss, the signals) is the same for all.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import mlx.core as mx

from mlx_transfusion import angle_hops, consistency, easy_consistency, pace, trigflow
from mlx_transfusion.angle_hops import CosVelocity, Landing
from mlx_transfusion.training.consistency_config import ConsistencyConfig


class States(NamedTuple):
    """M noisy pictures and the way they go."""

    x: mx.array
    """[M, ...]"""
    angle: mx.array
    """[M]"""
    cos_velocity: mx.array
    """cos(a) v, [M, ...]."""
    landing: Landing | None = None
    """Where a hop along the teacher's trajectory ends, for a method that hops."""


class Tangent(NamedTuple):
    """What a method says about M pictures, each [M, ...]."""

    network: mx.array
    """F, with its gradient."""
    raw: mx.array
    """Where F is to move, before it is rescaled."""
    rescaled: mx.array
    """The same, as the loss takes it."""
    derivative: mx.array
    """J = cos(a) sin(a) dF/da along the trajectory, or its difference quotient."""


class Method(Protocol):
    """One way to train a consistency function."""

    def pace(self, step: int) -> float:
        """The number that changes over the run, at `step` (0-based)."""

    def states(self, x: mx.array, angle: mx.array, cos_velocity: mx.array, teacher: CosVelocity) -> States:
        """What is known before any gradient: the noisy pictures, and what the method asks the teacher for."""

    def tangent(self, network: consistency.Network, at: States, pace: mx.array) -> Tangent:
        """Where the network's output at these states is to move."""


class ContinuousTime:
    """sCM (arXiv 2410.11081): the derivative of f along the trajectory by forward mode."""

    def __init__(self, settings: ConsistencyConfig) -> None:
        self._settings = settings

    def pace(self, step: int) -> float:
        """The factor r of the tangent's unstable part, which rises to 1."""
        return pace.tangent_warmup(step, self._settings.tangent_warmup)

    def states(self, x: mx.array, angle: mx.array, cos_velocity: mx.array, teacher: CosVelocity) -> States:
        """The pictures as they are."""
        return States(x, angle, cos_velocity)

    def tangent(self, network: consistency.Network, at: States, pace: mx.array) -> Tangent:
        """g = cos(a) df/da."""
        value = consistency.value_and_derivative(network, at.x, at.angle, at.cos_velocity)
        warmup = trigflow.per_image(mx.where(at.angle < self._settings.anchor_below, 0.0, pace), at.x)
        raw = consistency.tangent(value, at.x, at.angle, at.cos_velocity, warmup)
        rescaled = consistency.rescale(raw, self._settings.tangent, self._settings.tangent_constant)
        return Tangent(value.network, raw, rescaled, value.derivative)


class EasyTuning:
    """ECT (arXiv 2406.14548): f at a point and at an earlier one, which come closer in stages."""

    def __init__(self, settings: ConsistencyConfig, steps: int) -> None:
        self._settings, self._steps = settings, steps

    def pace(self, step: int) -> float:
        """The gap at large angles, which falls stage by stage."""
        return pace.stage_gap(step, self._steps, self._settings.gap_stages, self._settings.gap_factor)

    def states(self, x: mx.array, angle: mx.array, cos_velocity: mx.array, teacher: CosVelocity) -> States:
        """The pictures as they are."""
        return States(x, angle, cos_velocity)

    def tangent(self, network: consistency.Network, at: States, pace: mx.array) -> Tangent:
        """d, the difference of f between both points in units of F and of the gap."""
        gap = easy_consistency.relative_gap(at.angle, pace)
        point = easy_consistency.earlier(at.x, at.angle, at.cos_velocity, gap)
        here = network(at.x, at.angle)
        # The same weights as `here`, but a constant with all that it read, the prefix too.
        there = mx.stop_gradient(network(point.x, point.angle))
        raw = easy_consistency.tangent(here, there, at.x, at.angle, at.cos_velocity, gap, point)
        rescaled = easy_consistency.rescale(raw, self._settings.tangent, self._settings.tangent_constant)
        quotient = mx.stop_gradient(here - there) / gap.reshape(-1, *[1] * (at.x.ndim - 1))
        return Tangent(here, raw, rescaled, quotient)


class ContinuousBelow(ContinuousTime):
    """sCM below an angle, discrete hops of the same trajectory above it.

    Information enters at angle 0. Above some angle a derivative compares the network with untrained values of its
    own for longer than a small run lasts; a hop lands where the derivative has been at work.
    """

    def states(self, x: mx.array, angle: mx.array, cos_velocity: mx.array, teacher: CosVelocity) -> States:
        """The pictures, and where the teacher's hops take them."""
        to = angle_hops.hop(x, angle, cos_velocity, teacher, self._settings.hop)
        return States(x, angle, cos_velocity, Landing(*map(mx.stop_gradient, to)))

    def tangent(self, network: consistency.Network, at: States, pace: mx.array) -> Tangent:
        """g = cos(a) df/da below `hops_above`, d of `angle_hops` from it on; one pass gives F for both."""
        s, to = self._settings, at.landing
        assert to is not None
        below = super().tangent(network, at, pace)
        there = mx.stop_gradient(network(to.x, to.angle))
        d = angle_hops.tangent(below.network, there, at.x, at.angle, to)
        above = trigflow.per_image(at.angle >= s.hops_above, at.x)
        return Tangent(
            below.network,
            mx.where(above, d, below.raw),
            mx.where(above, easy_consistency.rescale(d, s.tangent, s.tangent_constant), below.rescaled),
            mx.where(above, mx.zeros_like(d), below.derivative),
        )


def picture_losses(
    method: Method, network: consistency.Network, at: States, pace: mx.array, log_weight: mx.array
) -> tuple[mx.array, mx.array]:
    """Loss of each of M pictures [M], and what is watched of each: a constant [5, M], the names in `Signals`.

    log_weight: w(a) [M], zeros for none.
    """
    t = method.tangent(network, at, pace)
    each = consistency.image_losses(t.network, t.rescaled, log_weight)
    cosine = trigflow.per_image(mx.cos(at.angle), at.x)
    drift = cosine * (cosine * t.network - at.cos_velocity)
    seen = [consistency.rms(t.raw), consistency.rms(drift), consistency.rms(t.derivative)]
    return each, mx.stop_gradient(mx.stack([*seen, each, log_weight]))


def method_of(settings: ConsistencyConfig, steps: int) -> Method:
    """The method that a run of `steps` asks for."""
    if settings.method == "ect":
        return EasyTuning(settings, steps)
    return ContinuousBelow(settings) if settings.method == "scm_hops" else ContinuousTime(settings)
