"""TrigFlow: the one description of diffusion in this package, with exact conversions to all the others.

Time is an angle `a` in radians, 0 (data) to pi/2 (noise), after sCM (arXiv 2410.11081, section 3) with data
normalised to unit standard deviation (sigma_d = 1):

    x = cos(a) x0 + sin(a) z          state, z ~ N(0, 1)
    v = dx/da = cos(a) z - sin(a) x0  velocity, what the network means or is converted to

The cosine schedule of Transfusion, sqrt(alpha_bar_t) = cos(pi t / 2T) (arXiv 2408.11039, section 3), is this
very angle.

The functions use array methods only and take numpy, MLX or torch arrays alike. `x`, `x0`, `noise`, `v` and
`eps` share one shape, e.g. `[B, N, P]`. An angle is a number in radians or an array that broadcasts against
them: turn one angle an image, `[B]`, into `[B, 1, 1]` with `per_image`. Floats are not promoted: float32 in,
float32 out.

Ill-conditioned ends. A prediction of z says nothing about x0 at pi/2, and a prediction of x0 nothing about z
at 0. The two divisions by cos and sin are bounded there (`MAX_EPS_ANGLE`, `MIN_X0_ANGLE`); past a bound the
result fades to 0 instead of growing without limit, and 0 is the right limit for data of zero mean.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_transfusion.errors import UserError

Array = Any
"""An array of numpy, MLX or torch: no common type describes all three."""
Angle = Any
"""Radians: a plain number, or an array that broadcasts against the states."""

NOISE_ANGLE = math.pi / 2
"""The angle of pure noise. 0 is the angle of data."""

MAX_EPS_ANGLE = NOISE_ANGLE * 0.999
"""Up to here dividing by cos(a) is exact. It is step 999 of the paper's 1000: errors of eps grow 637-fold."""

MIN_X0_ANGLE = NOISE_ANGLE * 0.001
"""From here on dividing by sin(a) is exact. It is step 1 of 1000: errors of x0 grow 637-fold."""


def _call(name: str, *values: Any) -> Any:
    """`name(*values)` by the library of the first array among them; plain numbers give a plain float."""
    for value in values:
        if not isinstance(value, int | float):
            root = type(value).__module__.partition(".")[0]
            # The library of a living array is loaded already, so nothing is imported for its sake.
            library = sys.modules["mlx.core" if root == "mlx" else root]
            return getattr(library, name)(*values)
    return float(getattr(np, name)(*values))


def _at_least(value: Any, bound: float) -> Any:
    """max(value, bound), element by element."""
    return max(value, bound) if isinstance(value, int | float) else _call("clip", value, bound, None)


def per_image(angle: Array, x: Array) -> Array:
    """One angle an image, `[B]`, shaped `[B, 1, ...]` so that it broadcasts against `x` `[B, ...]`."""
    return angle.reshape((-1,) + (1,) * (x.ndim - 1))


# --- the process (sCM section 3) ---


def mix(x0: Array, noise: Array, angle: Angle) -> Array:
    """The noisy state cos(a) x0 + sin(a) z."""
    return _call("cos", angle) * x0 + _call("sin", angle) * noise


def velocity_target(x0: Array, noise: Array, angle: Angle) -> Array:
    """What a velocity network learns: cos(a) z - sin(a) x0."""
    return _call("cos", angle) * noise - _call("sin", angle) * x0


def x0_from_velocity(x: Array, v: Array, angle: Angle) -> Array:
    """The data estimate cos(a) x - sin(a) v (posterior mean for the true velocity). Exact at every angle."""
    return _call("cos", angle) * x - _call("sin", angle) * v


def eps_from_velocity(x: Array, v: Array, angle: Angle) -> Array:
    """The noise estimate sin(a) x + cos(a) v. Exact at every angle."""
    return _call("sin", angle) * x + _call("cos", angle) * v


def rotate(x: Array, v: Array, angle: Angle, next_angle: Angle) -> Array:
    """The DDIM step from `angle` to `next_angle`: cos(a-b) x - sin(a-b) v (sCM equation 26).

    It is exact when the estimates of x0 and z do not change on the way, and regular at both ends.
    """
    turn = angle - next_angle
    return _call("cos", turn) * x - _call("sin", turn) * v


# --- predictions of eps and of x0 ---


def velocity_from_eps(x: Array, eps: Array, angle: Angle) -> Array:
    """The velocity (eps - sin(a) x) / cos(a) of a network that predicts the noise.

    Past `MAX_EPS_ANGLE` the divisor stays cos(MAX_EPS_ANGLE): the result is v cos(a)/cos(MAX_EPS_ANGLE).
    """
    return cos_velocity_from_eps(x, eps, angle) / _at_least(_call("cos", angle), math.cos(MAX_EPS_ANGLE))


def cos_velocity_from_eps(x: Array, eps: Array, angle: Angle) -> Array:
    """cos(a) v = eps - sin(a) x, without any division and so exact at every angle.

    Losses and tangents that only need cos(a) v (all of sCM's do) use this form.
    """
    return eps - _call("sin", angle) * x


def velocity_from_x0(x: Array, x0: Array, angle: Angle) -> Array:
    """The velocity (cos(a) x - x0) / sin(a) of a network that predicts the data.

    Before `MIN_X0_ANGLE` the divisor stays sin(MIN_X0_ANGLE): the result is v sin(a)/sin(MIN_X0_ANGLE).
    """
    return (_call("cos", angle) * x - x0) / _at_least(_call("sin", angle), math.sin(MIN_X0_ANGLE))


def x0_from_eps(x: Array, eps: Array, angle: Angle) -> Array:
    """The data estimate (x - sin(a) eps) / cos(a); past `MAX_EPS_ANGLE` times cos(a)/cos(MAX_EPS_ANGLE)."""
    return (x - _call("sin", angle) * eps) / _at_least(_call("cos", angle), math.cos(MAX_EPS_ANGLE))


def eps_from_x0(x: Array, x0: Array, angle: Angle) -> Array:
    """The noise estimate (x - cos(a) x0) / sin(a); before `MIN_X0_ANGLE` times sin(a)/sin(MIN_X0_ANGLE)."""
    return (x - _call("cos", angle) * x0) / _at_least(_call("sin", angle), math.sin(MIN_X0_ANGLE))


# --- rectified flow ---


def angle_from_flow_time(s: Angle) -> Angle:
    """The angle atan(s / (1-s)) of rectified flow's noise fraction `s` in [0, 1]."""
    return _call("arctan2", s, 1 - s)


def flow_time_from_angle(angle: Angle) -> Angle:
    """The noise fraction s = sin / (sin + cos) of rectified flow; inverse of `angle_from_flow_time`."""
    sine = _call("sin", angle)
    return sine / (sine + _call("cos", angle))


def flow_to_trigflow(x_s: Array, u: Array, s: Angle) -> tuple[Array, Array, Angle]:
    """Rectified flow -> TrigFlow (x, v, angle).

    `x_s` = (1-s) x0 + s z is its state, `u` = z - x0 its velocity, `s` its noise fraction. Exact at every s.
    A checkpoint whose time 1 means data passes s = 1 - t and u = -v_checkpoint.
    """
    squared = s * s + (1 - s) * (1 - s)
    norm = squared**0.5
    return x_s / norm, ((1 - 2 * s) * x_s + squared * u) / norm, angle_from_flow_time(s)


def trigflow_to_flow(x: Array, v: Array, angle: Angle) -> tuple[Array, Array, Angle]:
    """TrigFlow (x, v, angle) -> rectified flow (x_s, u, s); exact inverse of `flow_to_trigflow`."""
    sine, cosine = _call("sin", angle), _call("cos", angle)
    total = sine + cosine
    return x / total, (sine - cosine) * x + total * v, sine / total


# --- steps and schedules of DDPM ---


def angle_from_step(step: Angle, steps: int) -> Angle:
    """The angle pi t / 2T of step t of the paper's cosine schedule: 0 is data, T = `steps` is noise."""
    return step * (math.pi / (2 * steps))


def step_from_angle(angle: Angle, steps: int) -> Angle:
    """The (fractional) step 2 T a / pi of the cosine schedule; inverse of `angle_from_step`."""
    return angle * (2 * steps / math.pi)


def angle_from_alpha_bar(alpha_bar: float | Sequence[float] | np.ndarray) -> Any:
    """The angle with cos(a)^2 = alpha_bar: a float for a number, a float64 array for a table.

    Raises UserError when a value lies outside [0, 1]. Computed as atan2(sqrt(1 - alpha_bar),
    sqrt(alpha_bar)), because arccos would lose half of the digits near alpha_bar = 1.
    """
    table = np.asarray(alpha_bar, np.float64)
    if not np.all((table >= 0) & (table <= 1)):
        raise UserError("alpha_bar of a noise schedule must lie in [0, 1]: check the schedule's table")
    angles = np.arctan2(np.sqrt(1 - table), np.sqrt(table))
    return angles if table.ndim else float(angles)


def alpha_bar_from_angle(angle: Angle) -> Angle:
    """alpha_bar = cos(a)^2, the share of the data's variance in the state."""
    cosine = _call("cos", angle)
    return cosine * cosine


def index_from_angle(angle: float | np.ndarray, table: Sequence[float] | np.ndarray) -> Any:
    """The fractional index at which an increasing `table` of angles takes the value `angle`.

    For a network conditioned on the index of its own schedule, whose table `angle_from_alpha_bar` makes.
    Angles outside the table give its first or last index. Raises UserError when the table does not increase.
    """
    knots = np.asarray(table, np.float64)
    if knots.ndim != 1 or knots.size < 2 or not np.all(np.diff(knots) > 0):
        raise UserError(
            "a table of noise angles must be a list of 2 or more increasing values: check alpha_bar"
        )
    index = np.interp(angle, knots, np.arange(knots.size))
    return index if np.ndim(angle) else float(index)


def nichol_alpha_bar(steps: int, offset: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
    """alpha_bar of steps 1..`steps` (float64 `[steps]`) of the adjusted cosine schedule of improved DDPM.

    Nichol and Dhariwal 2021, equation 17: the cosine is shifted by `offset` so that the first step is not too
    small, and beta is cut at `max_beta` so that the last one leaves some signal. Its angles differ from the
    pure schedule's by at most 0.011 rad; a network trained on it converts by `angle_from_alpha_bar`.
    """
    shifted = (np.arange(steps + 1) / steps + offset) / (1 + offset)
    curve = np.cos(shifted * (math.pi / 2)) ** 2
    return np.cumprod(1 - np.minimum(1 - curve[1:] / curve[:-1], max_beta))


def log_snr(angle: float) -> float:
    """lambda = -log tan(a), half the log signal-to-noise ratio: +inf at angle 0, -inf at pi/2."""
    if angle <= 0:
        return math.inf
    return -math.inf if angle >= NOISE_ANGLE else -math.log(math.tan(angle))
