"""Where a picture's network output is to go, by sCM's derivative or ECT's pair of points (`training/tangents.py`)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mlx_transfusion import pace, trigflow
from mlx_transfusion.torch import consistency, easy_consistency
from mlx_transfusion.torch.consistency import Network
from mlx_transfusion.training.consistency_config import ConsistencyConfig


class States(NamedTuple):
    """M noisy pictures and the way they go."""

    x: Tensor
    """[M, ...]"""
    angle: Tensor
    """[M]"""
    cos_velocity: Tensor
    """cos(a) v, [M, ...]."""


class Networks(NamedTuple):
    """One network in three forms."""

    trained: Network
    """With gradients."""
    constant: Network
    """What it reads besides its arguments is a constant."""
    forward: Network
    """As `constant`, with a derivative in forward mode."""


class Tangent(NamedTuple):
    """What a method says about M pictures, each [M, ...]."""

    network: Tensor
    """F, with its gradient."""
    raw: Tensor
    """Where F is to move, before it is rescaled."""
    rescaled: Tensor
    """The same, as the loss takes it."""
    derivative: Tensor
    """J = cos(a) sin(a) dF/da along the trajectory, or its difference quotient."""


class Method(Protocol):
    """One way to train a consistency function."""

    def pace(self, step: int) -> float:
        """The number that changes over the run, at `step` (0-based)."""

    def tangent(self, network: Networks, at: States, pace: float) -> Tangent:
        """Where the network's output at these states is to move."""


class ContinuousTime:
    """sCM (arXiv 2410.11081): the derivative of f along the trajectory by forward mode."""

    def __init__(self, settings: ConsistencyConfig) -> None:
        self._settings = settings

    def pace(self, step: int) -> float:
        """The factor r of the tangent's unstable part, which rises to 1."""
        return pace.tangent_warmup(step, self._settings.tangent_warmup)

    def tangent(self, network: Networks, at: States, pace: float) -> Tangent:
        """g = cos(a) df/da."""
        slope = consistency.derivative(network.forward, *at)
        value = network.trained(at.x, at.angle)
        raw = consistency.tangent(value, slope, *at, pace)
        rescaled = consistency.rescale(raw, self._settings.tangent, self._settings.tangent_constant)
        return Tangent(value, raw, rescaled, slope)


class EasyTuning:
    """ECT (arXiv 2406.14548): f at a point and at an earlier one, which come closer in stages."""

    def __init__(self, settings: ConsistencyConfig, steps: int) -> None:
        self._settings, self._steps = settings, steps

    def pace(self, step: int) -> float:
        """The gap at large angles, which falls stage by stage."""
        return pace.stage_gap(step, self._steps, self._settings.gap_stages, self._settings.gap_factor)

    def tangent(self, network: Networks, at: States, pace: float) -> Tangent:
        """d, the difference of f between both points in units of F and of the gap."""
        gap = easy_consistency.relative_gap(at.angle, pace)
        point = easy_consistency.earlier(*at, gap)
        with torch.no_grad():
            there = network.constant(point.x, point.angle)
        here = network.trained(at.x, at.angle)
        raw = easy_consistency.tangent(here, there, *at, gap, point)
        rescaled = easy_consistency.rescale(raw, self._settings.tangent, self._settings.tangent_constant)
        quotient = (here.detach() - there) / trigflow.per_image(gap, there)
        return Tangent(here, raw, rescaled, quotient)


def method_of(settings: ConsistencyConfig, steps: int) -> Method:
    """The method that a run of `steps` asks for."""
    return EasyTuning(settings, steps) if settings.method == "ect" else ContinuousTime(settings)
