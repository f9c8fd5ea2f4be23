"""How far a consistency function is from what it should be: the end of its teacher's trajectory, angle by angle.

The value of sCM's loss says nothing (consistency.py), and one-step pictures show the last angle only. This
shows where along the way a student is right: f(x, a) = cos(a) x - sin(a) F(x, a) against the solution at 0 of
dx/da = v that starts from (x, a), for noised data pictures. The teacher's own weights in the student's place
give its error before any distillation: a diffusion model's f is the mean of all pictures that x may come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_transfusion import sampling, trigflow
from mlx_transfusion.models.family import PictureFamily
from mlx_transfusion.painting import guided_velocity, prefill
from mlx_transfusion.settings import GenerationSettings

SAMPLER = "heun"
STEPS_PER_RADIAN = 25
"""Of the teacher's trajectories; of second order, so the end is known to some 1e-3."""
ANGLES = (0.1, 0.3, 0.6, 0.9, 1.1, 1.3, 1.5, trigflow.NOISE_ANGLE)


def flow_map_errors(
    students: Sequence[PictureFamily],
    teacher: PictureFamily,
    prefixes: Sequence[Sequence[int]],
    x0: mx.array,
    z: mx.array,
    guidance: float,
    angles: Sequence[float] = ANGLES,
) -> np.ndarray:
    """Mean squared error of each student's f at each angle, [students, angles], in units of the data's variance.

    prefixes: B prompts that end in BOI. x0, z: their clean pictures and noise [B, N, P]. guidance: of the teacher.
    """
    velocity = _teacher_velocity(teacher, prefixes, guidance)
    caches = [prefill(student, prefixes) for student in students]
    out = np.zeros((len(students), len(angles)))
    for column, angle in enumerate(angles):
        x = trigflow.mix(x0, z, angle)
        end = trajectory_end(velocity, x, angle)
        for row, (student, cache) in enumerate(zip(students, caches, strict=True)):
            network = student.velocity(x, mx.full((len(prefixes),), angle), cache)
            f = trigflow.x0_from_velocity(x, network, angle)
            out[row, column] = float(np.array((f - end).square().mean()))
    return out


def trajectory_end(velocity: sampling.Velocity, x: mx.array, angle: float) -> mx.array:
    """The solution [B, N, P] at angle 0 of dx/da = velocity(x, a) that starts from x at `angle` (radians)."""
    steps = max(4, round(STEPS_PER_RADIAN * angle))
    grid = sampling.angle_schedule(steps, angle)
    return sampling.get_sampler(SAMPLER).function(velocity, x, grid, _no_noise, None)


def _teacher_velocity(
    teacher: PictureFamily, prefixes: Sequence[Sequence[int]], guidance: float
) -> sampling.Velocity:
    settings = GenerationSettings(sampler=SAMPLER, guidance=guidance).resolve()
    guide = None if guidance == 1 or teacher.guidance_condition else teacher.guide(prefixes)
    return guided_velocity(teacher, prefill(teacher, prefixes), guide, settings)


def _no_noise(step: int) -> mx.array:
    raise AssertionError(f"{SAMPLER} asked for noise at step {step}")
