"""Activations of gated layers, differentiable in both modes and in forward mode under reverse mode."""

from __future__ import annotations

import mlx.core as mx


def silu(x: mx.array) -> mx.array:
    """x sigmoid(x). Not mlx's own, which is compiled: that has no gradient inside a forward-mode derivative."""
    return x * mx.sigmoid(x)


def relu(x: mx.array) -> mx.array:
    """max(x, 0), with the derivative 0 at 0."""
    return x * (x > 0)
