"""The convolution against mlx's own (values, gradients) and against central differences (forward mode)."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_transfusion.models.convolution import Conv2d, conv2d

Arrays = tuple[mx.array, mx.array, mx.array, mx.array]


def draw(
    batch: int = 2, height: int = 6, width: int = 4, inputs: int = 3, outputs: int = 5, kernel: int = 3
) -> Arrays:
    """A picture, a kernel, and a direction for each."""
    picture, weight = (batch, height, width, inputs), (outputs, kernel, kernel, inputs)
    keys = mx.random.split(mx.random.key(0), 4)
    shapes = (picture, weight, picture, weight)
    x, w, dx, dw = (mx.random.normal(shape, key=k) for shape, k in zip(shapes, keys, strict=True))
    return x, w, dx, dw


def bent(x: mx.array, w: mx.array) -> mx.array:
    """A function whose derivative depends on where it is taken, with the convolution in its middle."""
    return mx.tanh(conv2d(mx.sin(x), w, 1, 1))


def plain_bent(x: mx.array, w: mx.array) -> mx.array:
    return mx.tanh(mx.conv2d(mx.sin(x), w, 1, 1))


def differences(f: Callable[[float], mx.array], h: float = 5e-3) -> np.ndarray:
    return np.array((f(h) - f(-h)) / (2 * h))


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.sampled_from([1, 2, 3, 4]),
    stride=st.sampled_from([1, 2, 3]),
    padding=st.integers(0, 2),
    height=st.integers(4, 7),
    width=st.integers(4, 7),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 4),
)
def test_value_and_gradients_are_those_of_mlx(
    kernel: int, stride: int, padding: int, height: int, width: int, inputs: int, outputs: int
) -> None:
    x, w, dx, dw = draw(2, height, width, inputs, outputs, kernel)
    ours, (out,) = (lambda x, w: conv2d(x, w, stride, padding)), (mx.conv2d(x, w, stride, padding),)
    assert np.array_equal(ours(x, w), out)
    cotangent = mx.random.normal(out.shape, key=mx.random.key(9))
    wanted = mx.vjp(lambda x, w: mx.conv2d(x, w, stride, padding), [x, w], [cotangent])[1]
    for got, theirs in zip(mx.vjp(ours, [x, w], [cotangent])[1], wanted, strict=True):
        # With a stride ours takes another way to the same sums.
        np.testing.assert_allclose(np.array(got), np.array(theirs), rtol=0, atol=0 if stride == 1 else 1e-5)
    # linear in each argument: the derivative along (dx, dw) is exact for a step of any length
    (_,), (tangent,) = mx.jvp(ours, [x, w], [dx, dw])
    exact = mx.conv2d(dx, w, stride, padding) + mx.conv2d(x, dw, stride, padding)
    np.testing.assert_allclose(tangent, exact, atol=1e-4)


@pytest.mark.parametrize("along", ["x", "w", "both"])
@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode_equals_central_differences(along: str, compiled: bool) -> None:
    x, w, dx, dw = draw()
    a, b = float(along != "w"), float(along != "x")

    def value_and_tangent(x: mx.array, w: mx.array) -> tuple[mx.array, mx.array]:
        if along == "x":
            (value,), (tangent,) = mx.jvp(lambda x: bent(x, w), [x], [dx])
        elif along == "w":
            (value,), (tangent,) = mx.jvp(lambda w: bent(x, w), [w], [dw])
        else:
            (value,), (tangent,) = mx.jvp(bent, [x, w], [dx, dw])
        return value, tangent

    value, tangent = (mx.compile(value_and_tangent) if compiled else value_and_tangent)(x, w)
    np.testing.assert_allclose(value, plain_bent(x, w), atol=1e-6)
    wanted = differences(lambda h: plain_bent(x + a * h * dx, w + b * h * dw))
    assert np.linalg.norm(wanted) > 1
    assert np.linalg.norm(np.array(tangent) - wanted) < 2e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_the_value_of_a_forward_pass(compiled: bool) -> None:
    """What the consistency loss needs: value and constant derivative from one pass, gradient of the value."""
    x, w, dx, _ = draw()

    def loss(w: mx.array) -> mx.array:
        (value,), (tangent,) = mx.jvp(lambda x: bent(x, w), [x], [dx])
        return (value * mx.stop_gradient(tangent)).sum() + value.square().sum()

    (_,), (tangent,) = mx.jvp(lambda x: bent(x, w), [x], [dx])
    wanted = mx.grad(lambda w: (plain_bent(x, w) * tangent).sum() + plain_bent(x, w).square().sum())(w)
    gradient = mx.grad(loss)
    got = (mx.compile(gradient) if compiled else gradient)(w)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_derivative() -> None:
    x, w, dx, dw = draw()

    def loss(w: mx.array) -> mx.array:
        _, (tangent,) = mx.jvp(lambda x: bent(x, w), [x], [dx])
        return tangent.square().sum()

    along = (mx.grad(loss)(w) * dw).sum().item()
    wanted = differences(lambda h: loss(w + h * dw), 1e-2).item()
    assert along == pytest.approx(wanted, rel=5e-3)
    assert abs(wanted) > 1


def test_the_layer_is_mlxs_layer() -> None:
    ours, theirs = Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(3, 6, 3, stride=2, padding=1)
    shapes = {name: value.shape for name, value in tree_flatten(theirs.parameters())}
    assert {name: value.shape for name, value in tree_flatten(ours.parameters())} == shapes
    assert mx.abs(ours.weight).max().item() <= 27**-0.5
    assert ours.weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=0.2)
    ours.bias = mx.arange(6).astype(mx.float32)
    theirs.update(ours.parameters())
    x = draw(inputs=3)[0]
    assert ours(x).shape == (2, 3, 2, 6)
    assert np.array_equal(ours(x), theirs(x))


def test_half_precision_stays_half() -> None:
    x, w, dx, dw = (v.astype(mx.bfloat16) for v in draw())
    (value,), (tangent,) = mx.jvp(lambda x, w: conv2d(x, w, 1, 1), [x, w], [dx, dw])
    assert value.dtype == tangent.dtype == mx.bfloat16
    gradient = mx.grad(lambda w: conv2d(x, w, 1, 1).square().sum())(w)
    assert gradient.dtype == mx.bfloat16
