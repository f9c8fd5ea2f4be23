"""The discrete noise schedule of a DDPM network (Ho et al. 2020) and its sampler with a learned variance.

A network that was trained on T steps knows the index t of its own table of alpha_bar, not an angle. Samplers of this
package ask it at any angle: at the table's own angles that index is exact, and between two of them it is interpolated
linearly in the angle. The network takes the fraction, since it embeds t in sines and cosines; it was never trained on
one, but neighbouring steps of a table of 1000 differ by little. Outside the table the first or the last index serves.

The sampler is improved DDPM's (Nichol and Dhariwal 2021, sections 3.1 and 4): a respaced chain whose variance lies
between the posterior's and beta by the network's own share. It is not what the package paints with (its samplers know
one velocity and no variance), and stands here to repeat official pictures.
Shapes: B rows, N patches of P numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_transfusion import trigflow
from mlx_transfusion.errors import UserError

Predict = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]
"""(x [B, N, P], timesteps [B]) -> noise and variance values, each [B, N, P]."""


def linear_alpha_bar(steps: int = 1000, first: float = 1e-4, last: float = 2e-2) -> np.ndarray:
    """alpha_bar float64 [steps] of betas that grow linearly from `first` to `last` (Ho et al. 2020, section 4)."""
    return np.cumprod(1 - np.linspace(first, last, steps))


def spaced_steps(steps: int, count: int) -> list[int]:
    """`count` of the timesteps 0..steps-1, evenly spread, both ends among them; ascending.

    Raises UserError for a count that does not fit.
    """
    if not 1 <= count <= steps:
        raise UserError(f"a schedule of {steps} steps has no {count} of them: choose 1 to {steps}")
    stride = (steps - 1) / (count - 1) if count > 1 else 0.0
    return [round(stride * i) for i in range(count)]


class AngleTable:
    """The angles of a table of alpha_bar, and where any angle stands in it."""

    def __init__(self, alpha_bar: np.ndarray) -> None:
        """alpha_bar float64 [T], decreasing. Raises UserError for one outside [0, 1]."""
        self.angles: np.ndarray = trigflow.angle_from_alpha_bar(alpha_bar)
        """Radians float64 [T], increasing."""
        self._knots = mx.array(self.angles.astype(np.float32))

    def index(self, angle: mx.array) -> mx.array:
        """Fractional index float32 [B] of angles [B]; differentiable, constant outside the table."""
        last = len(self.angles) - 1
        inside = mx.clip(angle, self._knots[0], self._knots[last])
        below = mx.minimum((inside[:, None] >= self._knots).sum(1), last) - 1
        below = mx.stop_gradient(mx.maximum(below, 0))
        start, end = self._knots[below], self._knots[below + 1]
        return below + (inside - start) / (end - start)


class Chain(NamedTuple):
    """A respaced chain: K of the T steps, ascending. All float64 [K] but `steps`."""

    steps: list[int]
    """What the network is told."""
    betas: np.ndarray
    alpha_bar: np.ndarray
    posterior_log_variance: np.ndarray
    """That of step 0 is zero, and the one of step 1 stands in its place."""
    x0_share: np.ndarray
    x_share: np.ndarray


def respaced(alpha_bar: np.ndarray, steps: Sequence[int]) -> Chain:
    """The chain over some of the steps of alpha_bar [T] (Nichol and Dhariwal 2021, section 4; Ho et al., equation 7).

    Raises UserError for fewer than two steps, which leave no posterior variance.
    """
    if len(steps) < 2:
        raise UserError("a DDPM chain needs at least 2 steps")
    kept = alpha_bar[list(steps)]
    before = np.append(1.0, kept[:-1])
    betas = 1 - kept / before
    variance = betas * (1 - before) / (1 - kept)
    return Chain(
        list(steps),
        betas,
        kept,
        np.log(np.append(variance[1], variance[1:])),
        betas * np.sqrt(before) / (1 - kept),
        (1 - before) * np.sqrt(1 - betas) / (1 - kept),
    )


def reverse_step(
    chain: Chain, index: int, x: mx.array, eps: mx.array, variance: mx.array, noise: mx.array
) -> tuple[mx.array, mx.array]:
    """One step of the chain from its step `index`: the next state and the estimate of the data, as x [B, N, P].

    variance: the network's values; -1 is the posterior's, 1 is beta (Nichol and Dhariwal 2021, equation 15).
    The last step, of index 0, adds no noise.
    """
    bar = chain.alpha_bar[index]
    x0 = (x - float(np.sqrt(1 - bar)) * eps) / float(np.sqrt(bar))
    mean = float(chain.x0_share[index]) * x0 + float(chain.x_share[index]) * x
    if index == 0:
        return mean, x0
    share = (variance + 1) / 2
    low, high = float(chain.posterior_log_variance[index]), float(np.log(chain.betas[index]))
    return mean + mx.exp((share * high + (1 - share) * low) / 2) * noise, x0


def sample(
    predict: Predict,
    x: mx.array,
    chain: Chain,
    noise: Callable[[int], mx.array],
    callback: Callable[[int, mx.array, mx.array], None] | None = None,
) -> mx.array:
    """Walk the chain from its last step, whose state x [B, N, P] is, to the data.

    predict: (guided) noise and variance values. noise(i): unit normal noise as x for the i-th step taken.
    callback(i, x, x0) after every step.
    """
    for taken, index in enumerate(reversed(range(len(chain.steps)))):
        eps, variance = predict(x, mx.full((x.shape[0],), float(chain.steps[index])))
        x, x0 = reverse_step(chain, index, x, eps, variance, noise(taken))
        mx.eval(x)
        if callback is not None:
            callback(taken, x, x0)
    return x
