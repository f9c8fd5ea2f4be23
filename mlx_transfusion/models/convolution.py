"""2-D convolution with derivatives in both directions: mlx's own has none in forward mode.

A convolution is linear in the picture and linear in the kernel, so its derivative along (dx, dw) is two more
convolutions, conv(dx, w) + conv(x, dw). Layout: pictures [B, H, W, C], kernels [O, kh, kw, C / groups].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import cast

import mlx.core as mx
import mlx.nn as nn

Convolution = Callable[[mx.array, mx.array], mx.array]


@cache
def _convolution(stride: int, padding: int, groups: int) -> Convolution:
    """The convolution of that stride, zero padding and groups, as a function (x, weight) with its derivatives."""

    def plain(x: mx.array, weight: mx.array) -> mx.array:
        return mx.conv2d(x, weight, stride, padding, groups=groups)

    def body(x: mx.array, weight: mx.array) -> mx.array:
        # Forward mode walks through this body before it finds the rule below, and fails at mlx's primitive unless
        # nothing in here carries a derivative. The rules, not the body, say what the derivatives are.
        return plain(mx.stop_gradient(x), mx.stop_gradient(weight))

    function = mx.custom_function(body)
    convolve = cast(Convolution, function)

    folds = stride > 1 and groups == 1
    """mlx's gradient of a strided convolution is twenty times slower on a CPU than that of one without a stride."""

    @function.vjp
    def backward(primals: Sequence[mx.array], cotangent: mx.array, output: mx.array) -> list[mx.array]:
        forwards = partial(_folded, stride=stride, padding=padding) if folds else plain
        return mx.vjp(forwards, list(primals), [cotangent])[1]

    @function.jvp
    def forward(primals: Sequence[mx.array], tangents: Sequence[mx.array | None]) -> mx.array:
        (x, weight), (dx, dw) = primals, tangents  # None where an argument is a constant
        terms = [] if dx is None else [convolve(dx, weight)]
        terms += [] if dw is None else [convolve(x, dw)]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    return convolve


def _folded(x: mx.array, weight: mx.array, stride: int, padding: int) -> mx.array:
    """The same convolution with the stride folded into the channels: blocks of stride x stride pixels become one."""
    kernel = weight.shape[1:3]
    out = [(n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[1:3], kernel, strict=True)]
    taps = [-(-k // stride) for k in kernel]
    sizes = [(n + t - 1) * stride for n, t in zip(out, taps, strict=True)]
    x = mx.pad(
        x,
        [
            (0, 0),
            *((padding, max(0, n - padding - m)) for n, m in zip(sizes, x.shape[1:3], strict=True)),
            (0, 0),
        ],
    )
    x = _fold(x[:, : sizes[0], : sizes[1]], stride)
    weight = mx.pad(
        weight, [(0, 0), *((0, t * stride - k) for t, k in zip(taps, kernel, strict=True)), (0, 0)]
    )
    return mx.conv2d(x, _fold(weight, stride))


def _fold(x: mx.array, block: int) -> mx.array:
    """[B, block H, block W, C] -> [B, H, W, block block C]."""
    b, height, width, c = x.shape
    x = x.reshape(b, height // block, block, width // block, block, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height // block, width // block, block * block * c)


def conv2d(x: mx.array, weight: mx.array, stride: int = 1, padding: int = 0, groups: int = 1) -> mx.array:
    """`mx.conv2d` of x [B, H, W, C] and weight [O, kh, kw, C / groups] -> [B, H', W', O], for `mx.jvp` as well.

    H' = (H + 2 padding - kh) // stride + 1. Equal to `mx.conv2d` in value and gradient; compiles; the gradient of
    a forward-mode pass's value or derivative is right too. Derivatives of gradients in forward mode are not there.
    """
    return _convolution(stride, padding, groups)(x, weight)


class Conv2d(nn.Module):
    """`nn.Conv2d` with the same parameter names, shapes and initial values, on `conv2d`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1
    ) -> None:
        super().__init__()
        seen = inputs // groups
        bound = (seen * kernel * kernel) ** -0.5
        self.weight = mx.random.uniform(-bound, bound, (outputs, kernel, kernel, seen))
        self.bias = mx.zeros((outputs,))
        self._stride, self._padding, self._groups = stride, padding, groups

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, inputs] -> [B, H', W', outputs]."""
        return conv2d(x, self.weight, self._stride, self._padding, self._groups) + self.bias
