"""Gates of the feed-forward layers: values and derivatives in every mode, against closed forms in float64."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_transfusion.models import gates

Function = Callable[[mx.array], mx.array]

X = mx.random.normal((500,), key=mx.random.key(0)) * 6
ALONG = mx.random.normal((500,), key=mx.random.key(1))
X64, ALONG64 = np.array(X, np.float64), np.array(ALONG, np.float64)
S = 1 / (1 + np.exp(-X64))
SLOPE = S * (1 + X64 * (1 - S))
BEND = S * (1 - S) * (2 + X64 * (1 - 2 * S))
"""First and second derivative of silu."""


def gradient(f: Function) -> Function:
    return mx.grad(lambda x: f(x).sum())


def derivative(f: Function) -> Function:
    return lambda x: mx.jvp(f, [x], [ALONG])[1][0]


MODES = {
    "value": (lambda f: f, X64 * S),
    "gradient": (gradient, SLOPE),
    "derivative": (derivative, SLOPE * ALONG64),
    "gradient of derivative": (
        lambda f: gradient(lambda x: derivative(f)(x).square()),
        2 * SLOPE * BEND * ALONG64**2,
    ),
    "the same, compiled": (
        lambda f: mx.compile(gradient(lambda x: derivative(f)(x).square())),
        2 * SLOPE * BEND * ALONG64**2,
    ),
    "derivative of gradient": (lambda f: derivative(gradient(f)), BEND * ALONG64),
    "compiled gradient": (lambda f: mx.compile(gradient(f)), SLOPE),
    "checkpointed": (lambda f: gradient(mx.checkpoint(f)), SLOPE),
}


@pytest.mark.parametrize(("make", "wanted"), MODES.values(), ids=MODES)
def test_silu_is_x_times_sigmoid_in_every_mode(
    make: Callable[[Function], Function], wanted: np.ndarray
) -> None:
    np.testing.assert_allclose(np.array(make(gates.silu)(X)), wanted, rtol=2e-5, atol=2e-5)


def test_far_from_zero_values_and_gradients_stay_finite() -> None:
    x = mx.array([-1e30, -200.0, 200.0, 1e30])
    assert np.array(gates.silu(x)).tolist() == pytest.approx([0, 0, 200, 1e30])
    assert np.array(gradient(gates.silu)(x)).tolist() == pytest.approx([0, 0, 1, 1])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_keeps_its_type(dtype: mx.Dtype) -> None:
    assert gates.silu(X.astype(dtype)).dtype == dtype


def test_relu() -> None:
    x = mx.array([-2.0, 0.0, 3.0])
    assert gates.relu(x).tolist() == [0, 0, 3]
    assert gradient(gates.relu)(x).tolist() == [0, 0, 1]
