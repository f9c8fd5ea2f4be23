"""Activations of gated layers, differentiable in both modes and in forward mode under reverse mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import mlx.core as mx

LOG2_E = 1 / math.log(2)


def silu(x: mx.array) -> mx.array:
    """x sigmoid(x). Not mlx's own, which is compiled: that has no gradient inside a forward-mode derivative."""
    return x * sigmoid(x)


def relu(x: mx.array) -> mx.array:
    """max(x, 0), with the derivative 0 at 0."""
    return x * (x > 0)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)), elementwise.

    In float32 on a CPU the exponential is a power of two, which takes MLX half the time (docs/performance.md).
    """
    cheap = x.dtype == mx.float32 and mx.default_device().type == mx.cpu
    return _sigmoid_by_power(x) if cheap else mx.sigmoid(x)


def _by_power(x: mx.array) -> mx.array:
    # Without a derivative of its own: forward mode walks through the body too, before it takes the rule below.
    return 1 / (1 + mx.power(2.0, mx.stop_gradient(x) * -LOG2_E))


_custom = mx.custom_function(_by_power)
_sigmoid_by_power = cast(Callable[[mx.array], mx.array], _custom)


# By the value, s' = s (1 - s): through the power it would be infinity times zero far below zero.
@_custom.vjp
def _vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output * (1 - output)


@_custom.jvp
def _jvp(x: mx.array, tangent: mx.array) -> mx.array:
    output = _sigmoid_by_power(x)
    return tangent * output * (1 - output)
