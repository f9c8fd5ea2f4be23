"""Gates of the feed-forward layers: values and derivatives in every mode, against mlx's own sigmoid."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_transfusion.models import gates

Function = Callable[[mx.array], mx.array]

X = mx.random.normal((500,), key=mx.random.key(0)) * 6
ALONG = mx.random.normal((500,), key=mx.random.key(1))


def plain(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def gradient(f: Function) -> Function:
    return mx.grad(lambda x: f(x).sum())


def derivative(f: Function) -> Function:
    return lambda x: mx.jvp(f, [x], [ALONG])[1][0]


@pytest.mark.parametrize(
    "make",
    [
        lambda f: f,
        gradient,
        derivative,
        lambda f: gradient(lambda x: derivative(f)(x).square()),
        lambda f: mx.compile(gradient(lambda x: derivative(f)(x).square())),
        lambda f: derivative(gradient(f)),
        lambda f: mx.compile(gradient(f)),
        lambda f: gradient(mx.checkpoint(f)),
    ],
    ids=[
        "value",
        "gradient",
        "derivative",
        "gradient of derivative",
        "the same, compiled",
        "derivative of gradient",
        "compiled gradient",
        "checkpointed",
    ],
)
def test_silu_is_x_times_sigmoid_in_every_mode(make: Callable[[Function], Function]) -> None:
    found, wanted = np.array(make(gates.silu)(X)), np.array(make(plain)(X))
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_far_from_zero_values_and_gradients_stay_finite() -> None:
    x = mx.array([-1e30, -1e4, -200.0, -90.0, 90.0, 200.0, 1e4, 1e30])
    assert np.array(gates.sigmoid(x)).tolist() == pytest.approx([0, 0, 0, 0, 1, 1, 1, 1], abs=1e-38)
    assert np.array(gradient(gates.sigmoid)(x)).tolist() == pytest.approx([0] * 8, abs=1e-37)
    assert np.array(gradient(gates.silu)(x))[[0, 2, 5, 7]].tolist() == pytest.approx([0, 0, 1, 1])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_keeps_its_type(dtype: mx.Dtype) -> None:
    x = X.astype(dtype)
    assert gates.silu(x).dtype == dtype
    assert mx.array_equal(gates.silu(x), plain(x))


def test_relu() -> None:
    x = mx.array([-2.0, 0.0, 3.0])
    assert gates.relu(x).tolist() == [0, 0, 3]
    assert gradient(gates.relu)(x).tolist() == [0, 0, 1]
