"""Image samplers: pure functions that walk from noise to data along TrigFlow angles (trigflow.py).

    sampler(velocity, x, angles, noise=None, callback=None) -> x at angle 0

- `velocity(x, angle)`: the (guided) velocity of the states `x` `[B, ...]` at one angle in radians, shaped as
`x`. - `x`: the states at `angles[0]`; for angles[0] = pi/2 that is unit normal noise. - `angles`: numbers
that decrease to 0.0 (`angle_schedule`); step i goes from angles[i] to angles[i + 1]. - `noise(step)`: fresh
unit normal noise shaped as `x`. Only stochastic samplers call it, at most once a step. - `callback(step,
steps, x, x0)`: called after every step with the new state and this step's estimate of the data.

Numbers of a step are plain floats and arrays only meet + - *, so numpy, MLX and torch arrays all work, rows
never mix, and the dtype stays. In a lazy library `velocity` or `callback` should evaluate `x`, or the graph
grows with the steps. Each step below is exact where the data is one point (x0 and z estimates constant): a
plain Euler or Heun step leaves the circle that such a state runs on, and the trigonometric factors bring it
back at no cost.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from mlx_transfusion.errors import UserError
from mlx_transfusion.trigflow import (
    NOISE_ANGLE,
    Array,
    angle_from_flow_time,
    eps_from_velocity,
    flow_time_from_angle,
    log_snr,
    rotate,
    x0_from_velocity,
)

Velocity = Callable[[Array, float], Array]
Noise = Callable[[int], Array]
Callback = Callable[[int, int, Array, Array], None]
Angles = Sequence[float]


def _report(callback: Callback | None, step: int, angles: Angles, x: Array, x0: Array) -> None:
    if callback is not None:
        callback(step, len(angles) - 1, x, x0)


def ddpm(
    velocity: Velocity, x: Array, angles: Angles, noise: Noise | None = None, callback: Callback | None = None
) -> Array:
    """The paper's ancestral sampler (Ho et al. 2020, equations 6 and 7) on any subset of the angles.

    With alpha_bar = cos(a)^2 respaced to the angles a > b (Nichol and Dhariwal 2021, section 4), the
    posterior q(x_b | x_a, x0) reads, with k = tan(b) / tan(a) and eps = (x_a - cos(a) x0) / sin(a),

        mean = cos(b) x0 + k sin(b) eps        standard deviation = sin(b) sqrt(1 - k^2)

    The share k of the old noise is kept and the rest drawn anew. The variance is Ho's beta-tilde, and 1 - k^2
    = sin(a-b) sin(a+b) / (sin(a) cos(b))^2 has no cancellation. From a = pi/2 all noise is new; the last step
    draws none. Raises UserError when `noise` is missing or for bad angles.
    """
    check_angles(angles)
    if noise is None:
        raise UserError("sampler 'ddpm' draws noise at every step: pass noise(step), or use 'ddim'")
    for step, (a, b) in enumerate(pairwise(angles)):
        v = velocity(x, a)
        x0 = x0_from_velocity(x, v, a)
        if b > 0:
            kept = math.sin(b) * math.cos(a) / (math.cos(b) * math.sin(a))
            fresh = math.sqrt(math.sin(a - b) * math.sin(a + b)) / (math.sin(a) * math.cos(b))
            eps = kept * eps_from_velocity(x, v, a) + fresh * noise(step)
            x = math.cos(b) * x0 + math.sin(b) * eps
        else:
            x = x0
        _report(callback, step, angles, x, x0)
    return x


def ddim(
    velocity: Velocity, x: Array, angles: Angles, noise: Noise | None = None, callback: Callback | None = None
) -> Array:
    """First order, one evaluation a step: the exact rotation of sCM's equation 26, DDIM in TrigFlow's terms.

    Raises UserError for bad angles.
    """
    check_angles(angles)
    for step, (a, b) in enumerate(pairwise(angles)):
        v = velocity(x, a)
        x0 = x0_from_velocity(x, v, a)
        x = rotate(x, v, a, b)
        _report(callback, step, angles, x, x0)
    return x


def heun(
    velocity: Velocity, x: Array, angles: Angles, noise: Noise | None = None, callback: Callback | None = None
) -> Array:
    """Second order, two evaluations a step: Heun's method (Karras et al. 2022, algorithm 1) in the angle.

    After a rotation to b it steps again with both velocities: x_b = x_a - tan((a-b)/2) (v_a + v_b), where
    tan(h/2) for h/2 makes the step exact on the circle. Networks know little at angle 0, so the last step is
    `midpoint`'s; a plain rotation there would make the largest error of the run. Raises UserError for bad
    angles.
    """
    check_angles(angles)
    for step, (a, b) in enumerate(pairwise(angles)):
        if b > 0:
            v = velocity(x, a)
            x0 = x0_from_velocity(x, v, a)
            x = x - math.tan((a - b) / 2) * (v + velocity(rotate(x, v, a, b), b))
        else:
            x, x0 = _midpoint_step(velocity, x, a, b)
        _report(callback, step, angles, x, x0)
    return x


def _midpoint_step(velocity: Velocity, x: Array, a: float, b: float) -> tuple[Array, Array]:
    """One midpoint step from a to b: the new state, and the estimate of the data half way."""
    middle = (a + b) / 2
    half_way = rotate(x, velocity(x, a), a, middle)
    v = velocity(half_way, middle)
    return x - 2 * math.sin((a - b) / 2) * v, x0_from_velocity(half_way, v, middle)


def midpoint(
    velocity: Velocity, x: Array, angles: Angles, noise: Noise | None = None, callback: Callback | None = None
) -> Array:
    """Second order, two evaluations a step: the velocity half way drives the whole step.

    x_b = x_a - 2 sin((a-b)/2) v((a+b)/2), where 2 sin(h/2) for h makes the step exact on the circle. It never
    asks for a velocity at angle 0. Raises UserError for bad angles.
    """
    check_angles(angles)
    for step, (a, b) in enumerate(pairwise(angles)):
        x, x0 = _midpoint_step(velocity, x, a, b)
        _report(callback, step, angles, x, x0)
    return x


def dpmpp_2m(
    velocity: Velocity, x: Array, angles: Angles, noise: Noise | None = None, callback: Callback | None = None
) -> Array:
    """Second order, one evaluation a step: DPM-Solver++(2M) (Lu et al. 2022, algorithm 2; sCM equation 28).

    It extrapolates the data estimate linearly in lambda = -log tan(a) from the step before, then steps
    exactly: x_b = (sin(b) x_a + sin(a-b) D) / sin(a). Where lambda is infinite, in the step after pi/2 and
    the one to 0, the estimate is used as it is. Raises UserError for bad angles.
    """
    check_angles(angles)
    before: Array | None = None
    for step, (a, b) in enumerate(pairwise(angles)):
        x0 = x0_from_velocity(x, velocity(x, a), a)
        target = x0
        if before is not None and b > 0:
            ratio = (log_snr(b) - log_snr(a)) / (log_snr(a) - log_snr(angles[step - 1]))
            target = x0 + (ratio / 2) * (x0 - before)
        x = (math.sin(b) / math.sin(a)) * x + (math.sin(a - b) / math.sin(a)) * target
        before = x0
        _report(callback, step, angles, x, x0)
    return x


def consistency(
    velocity: Velocity, x: Array, angles: Angles, noise: Noise | None = None, callback: Callback | None = None
) -> Array:
    """For consistency models: each step jumps to the data, and fresh noise takes it back to the next angle.

    `velocity` is the network F of sCM (arXiv 2410.11081, equation 5): f(x, a) = cos(a) x - sin(a) F(x, a) is
    the end of the path through x. Steps after the first mend what the jump before got wrong (multistep
    sampling, Song et al. 2023, algorithm 1): x_b = cos(b) f(x_a, a) + sin(b) z. The last step draws no noise.
    Raises UserError when `noise` is missing for more than one step, or for bad angles.
    """
    check_angles(angles)
    if noise is None and len(angles) > 2:
        raise UserError("sampler 'consistency' draws noise between its steps: pass noise(step), or one step")
    for step, (a, b) in enumerate(pairwise(angles)):
        x0 = x0_from_velocity(x, velocity(x, a), a)
        x = math.cos(b) * x0 + math.sin(b) * noise(step) if noise is not None and b > 0 else x0
        _report(callback, step, angles, x, x0)
    return x


class SamplerFunction(Protocol):
    """The signature that all samplers share (see the top of the file)."""

    def __call__(
        self,
        velocity: Velocity,
        x: Array,
        angles: Angles,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Array: ...


@dataclass(frozen=True)
class Sampler:
    """A sampler and what a caller must know to offer it."""

    function: SamplerFunction
    evaluations_per_step: int
    stochastic: bool
    default_steps: int

    def evaluations(self, steps: int) -> int:
        """How often `velocity` is called in a run of `steps` steps."""
        return steps * self.evaluations_per_step


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, 1, stochastic=True, default_steps=250),
    "ddim": Sampler(ddim, 1, stochastic=False, default_steps=50),
    "heun": Sampler(heun, 2, stochastic=False, default_steps=18),
    "midpoint": Sampler(midpoint, 2, stochastic=False, default_steps=16),
    "dpmpp_2m": Sampler(dpmpp_2m, 1, stochastic=False, default_steps=25),
    "consistency": Sampler(consistency, 1, stochastic=True, default_steps=2),
}


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def get_sampler(name: str) -> Sampler:
    """The sampler of this name. Raises UserError, with the nearest name, when there is none."""
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler '{name}'; {_nearest(name, list(SAMPLERS))}")
    return SAMPLERS[name]


SPACINGS = ("uniform", "flow", "shifted", "karras")
FLOW_SHIFT = 3.0
"""Of the spacing "shifted": BAGEL's and Show-o2's (Esser et al. 2024, arXiv 2403.03206, equation 23)."""
_KARRAS_RHO = 7.0
_KARRAS_MIN, _KARRAS_MAX = math.atan(0.004), math.atan(160.0)
"""EDM's sigma of 0.002 to 80 at data of standard deviation 0.5, as angles (Karras et al. 2022, table 1)."""


def angle_schedule(steps: int, start: float = NOISE_ANGLE, spacing: str = "uniform") -> list[float]:
    """The `steps` + 1 decreasing angles in radians of a run, from `start` down to exactly 0.0.

    'uniform' takes equal turns: 250 steps from pi/2 are every fourth of the paper's 1000. 'flow' takes equal
    steps of rectified flow's time sin / (sin + cos): 'ddim' on it is Euler's method for such a model, since both
    keep a step's estimates of x0 and z. 'shifted' moves these times s to 3 s / (1 + 2 s), towards the noise. 'karras'
    spaces tan(a) by the power 7 (Karras et al. 2022, equation 5) and so spends more steps near the data; it begins at
    atan(160) at the latest. A `start` below pi/2 resumes a partly noisy image. Raises UserError for steps < 1, a
    start outside (0, pi/2] or an unknown spacing.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}: use at least 1")
    if not 0 < start <= NOISE_ANGLE:
        raise UserError(
            f"the start angle is {start}: use an angle above 0 and at most pi/2 = {NOISE_ANGLE:.6f}"
        )
    if spacing == "uniform":
        return [start * (steps - i) / steps for i in range(steps)] + [0.0]
    if spacing == "flow":
        return _flow_angles(steps, start)
    if spacing == "shifted":
        return _flow_angles(steps, start, FLOW_SHIFT)
    if spacing != "karras":
        raise UserError(f"unknown spacing '{spacing}'; {_nearest(spacing, SPACINGS)}")
    first = min(start, _KARRAS_MAX)
    if steps == 1:
        return [first, 0.0]
    high, low = (math.tan(a) ** (1 / _KARRAS_RHO) for a in (first, min(_KARRAS_MIN, first / 2)))
    return [math.atan((high + (low - high) * i / (steps - 1)) ** _KARRAS_RHO) for i in range(steps)] + [0.0]


def _flow_angles(steps: int, start: float, shift: float = 1.0) -> list[float]:
    """Equal steps of the noise fraction of rectified flow, as angles; `shift` multiplies noise / data at each."""
    first = flow_time_from_angle(start)
    first = first / (shift + (1 - shift) * first)  # what is moved to the start
    even = [first * (steps - i) / steps for i in range(1, steps)]
    return [start] + [angle_from_flow_time(shift * s / (1 + (shift - 1) * s)) for s in even] + [0.0]


MIDDLE_ANGLE = 1.1
"""Where the second step of the consistency sampler begins (arXiv 2410.11081, section 5)."""


def middle_angles(steps: int, first: float = MIDDLE_ANGLE) -> tuple[float, ...]:
    """The angles in radians of a consistency run of `steps` steps between its start and 0: `steps` - 1 of them.

    The first one is `first`, and from there equal turns lead to 0: 2 steps 1.1; 3 steps 1.1, 0.55; 4 steps
    1.1, 0.73, 0.37. Raises UserError for steps < 1 and a first angle that `check_middle_angles` refuses.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}: use at least 1")
    check_middle_angles((first,), "the first middle angle")
    return tuple(angle_schedule(steps - 1, first)[:-1]) if steps > 1 else ()


def check_middle_angles(angles: Angles, name: str) -> None:
    """Raises UserError, which calls them `name`, unless the angles decrease strictly inside (0, pi/2)."""
    # Written so that NaN fails too.
    if not all(a > b for a, b in pairwise((NOISE_ANGLE, *angles, 0.0))):
        shown = ",".join(f"{angle:g}" for angle in angles)
        raise UserError(
            f"{name} {shown}: use radians that decrease between pi/2 = 1.5708 and 0, e.g. 1.1,0.6"
        )


def check_angles(angles: Angles) -> None:
    """Raises UserError unless the angles decrease strictly from at most pi/2 to exactly 0."""
    if len(angles) < 2:
        raise UserError(
            "a sampler needs 2 or more angles, the first noisy and the last 0: use angle_schedule"
        )
    # Written so that NaN fails too.
    if not (angles[0] <= NOISE_ANGLE and all(a > b for a, b in pairwise(angles))):
        raise UserError("the angles of a sampler must decrease from at most pi/2: use angle_schedule")
    if angles[-1] != 0:
        raise UserError(f"the last angle of a sampler is {angles[-1]}, not 0: use angle_schedule")


def guided(cond: Array, uncond: Array, scale: float) -> Array:
    """Classifier-free guidance: uncond + scale (cond - uncond); 1 is none (Ho and Salimans 2022).

    At one state eps, x0 and v are linear in each other with factors that sum to one, so guiding any of them
    is the same.
    """
    return uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class Guidance:
    """A guidance scale, and the interval (low, high) of angles in radians, ends included, where it applies.

    Outside of the interval sampling is conditional and costs one evaluation instead of two (Kynkaanniemi et
    al. 2024). Raises UserError for a negative or infinite scale and an interval outside [0, pi/2].
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, NOISE_ANGLE)

    def __post_init__(self) -> None:
        low, high = self.interval
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise UserError(
                f"guidance is {self.scale}: use a number of 0 or more (1 = none, the paper uses 3 to 5)"
            )
        if not 0 <= low <= high <= NOISE_ANGLE:
            raise UserError(
                f"guidance interval ({low}, {high}): use two angles with 0 <= low <= high <= pi/2"
            )

    def active(self, angle: float) -> bool:
        """Whether this angle needs the unconditional velocity at all."""
        return self.scale != 1 and self.interval[0] <= angle <= self.interval[1]
