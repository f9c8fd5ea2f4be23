"""The error of a consistency function by angle, against closed forms and on a model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_transfusion.evaluation.flow_map import ANGLES, flow_map_errors, trajectory_end
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.transfusion import Transfusion

MEAN, STD = 0.3, 0.8
PREFIXES = [[1, 10, 4], [1, 11, 4]]


def spread(a: Any) -> Any:
    """Standard deviation at an angle of data N(MEAN, STD^2) mixed with unit noise."""
    return mx.sqrt(STD**2 * mx.cos(a) ** 2 + mx.sin(a) ** 2)


def teacher_velocity(x: mx.array, a: Any) -> mx.array:
    """E[v | x] of that data."""
    shift = mx.sin(a) * mx.cos(a) * (1 - STD**2) / spread(a) ** 2
    return -mx.sin(a) * MEAN + shift * (x - mx.cos(a) * MEAN)


def end_of_trajectory(x: mx.array, a: Any) -> mx.array:
    return MEAN + STD * (x - mx.cos(a) * MEAN) / spread(a)


class Closed:
    """What the measure asks of a model, with a closed form in the place of the network."""

    guidance_condition = False

    def __init__(self, network: Any) -> None:
        self.network = network

    def prefill(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[None, KVCache]:
        cache = KVCache(0, len(ids))
        cache.append([], np.ones(ids.shape, bool))
        return None, cache

    def velocity(self, x: mx.array, angle: mx.array, cache: KVCache) -> mx.array:
        return self.network(x, angle[:, None, None])


def pictures(seed: int, shape: tuple[int, ...] = (2, 4, 6)) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(seed)
    x0, z = rng.standard_normal((2, *shape)).astype(np.float32)
    return mx.array(MEAN + STD * x0), mx.array(z)


def test_the_exact_student_has_no_error_and_the_teacher_has_its_own() -> None:
    exact = Closed(lambda x, a: (mx.cos(a) * x - end_of_trajectory(x, a)) / mx.sin(a))
    teacher = Closed(teacher_velocity)
    x0, z = pictures(0)
    errors = flow_map_errors([exact, teacher], teacher, PREFIXES, x0, z, 1.0)  # type: ignore[list-item,arg-type]
    assert errors.shape == (2, len(ANGLES))
    assert errors[0].max() < 1e-6
    for error, angle in zip(errors[1], map(mx.array, ANGLES), strict=True):
        x = mx.cos(angle) * x0 + mx.sin(angle) * z
        f = mx.cos(angle) * x - mx.sin(angle) * teacher_velocity(x, angle)
        expected = float((f - end_of_trajectory(x, angle)).square().mean())
        np.testing.assert_allclose(error, expected, rtol=0.01, atol=1e-7)
    assert errors[1, -1] > 0.1


def test_the_trajectory_is_solved_closely() -> None:
    _, z = pictures(1)
    for angle in (0.4, 1.2, 1.5):
        end = trajectory_end(lambda x, a: teacher_velocity(x, mx.array(a)), z, angle)
        np.testing.assert_allclose(end, end_of_trajectory(z, mx.array(angle)), atol=2e-3)


def test_guidance_moves_what_the_student_is_compared_with(tiny_model: Transfusion) -> None:
    x0, z = pictures(2, (2, *tiny_model.latent_shape))
    plain, guided = (
        flow_map_errors([tiny_model], tiny_model, PREFIXES, x0, z, scale, (0.05, 1.0)) for scale in (1.0, 3.0)
    )
    assert plain[0, 0] < plain[0, 1]  # at 0 every student is right
    assert abs(plain[0, 1] - guided[0, 1]) > 1e-6
