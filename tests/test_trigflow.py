"""Every conversion is exact inside its bounds, tame outside, and the same in every array library."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion import trigflow as tf
from mlx_transfusion.errors import UserError

SAFE = st.floats(tf.MIN_X0_ANGLE, tf.MAX_EPS_ANGLE)
ANY = st.floats(0, tf.NOISE_ANGLE)
SEEDS = st.integers(0, 2**32 - 1)
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 2e-3)])


def pair(seed: int, dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """x0 and z, `[2, 5]`."""
    x0, z = np.random.default_rng(seed).standard_normal((2, 2, 5)).astype(dtype)
    return x0, z


def close(found: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance)


# --- the process ---


@PRECISIONS
@settings(deadline=None)
@given(seed=SEEDS, angle=ANY)
def test_state_and_velocity_give_back_data_and_noise(
    dtype: type, tolerance: float, seed: int, angle: float
) -> None:
    x0, z = pair(seed, dtype)
    x, v = tf.mix(x0, z, angle), tf.velocity_target(x0, z, angle)
    close(tf.x0_from_velocity(x, v, angle), x0, tolerance / 100)
    close(tf.eps_from_velocity(x, v, angle), z, tolerance / 100)
    assert x.dtype == v.dtype == dtype


@settings(deadline=None)
@given(seed=SEEDS, angle=st.floats(0.01, 1.56))
def test_velocity_is_the_derivative_of_the_state(seed: int, angle: float) -> None:
    x0, z = pair(seed)
    h = 1e-4
    slope = (tf.mix(x0, z, angle + h) - tf.mix(x0, z, angle - h)) / (2 * h)
    close(tf.velocity_target(x0, z, angle), slope, 1e-7)


@settings(deadline=None)
@given(seed=SEEDS, angle=ANY, following=ANY)
def test_rotation_follows_a_constant_estimate_exactly(seed: int, angle: float, following: float) -> None:
    x0, z = pair(seed)
    x, v = tf.mix(x0, z, angle), tf.velocity_target(x0, z, angle)
    close(tf.rotate(x, v, angle, following), tf.mix(x0, z, following), 1e-12)


def test_ends_are_data_and_noise() -> None:
    x0, z = pair(0)
    close(tf.mix(x0, z, 0.0), x0, 0)
    close(tf.mix(x0, z, tf.NOISE_ANGLE), z, 1e-15)
    close(tf.velocity_target(x0, z, tf.NOISE_ANGLE), -x0, 1e-15)


# --- eps and x0 ---


@PRECISIONS
@settings(deadline=None)
@given(seed=SEEDS, angle=SAFE)
def test_eps_and_x0_predictions_convert_exactly(
    dtype: type, tolerance: float, seed: int, angle: float
) -> None:
    x0, z = pair(seed, dtype)
    x, v = tf.mix(x0, z, angle), tf.velocity_target(x0, z, angle)
    close(tf.velocity_from_eps(x, z, angle), v, tolerance)
    close(tf.velocity_from_x0(x, x0, angle), v, tolerance)
    close(tf.x0_from_eps(x, z, angle), x0, tolerance)
    close(tf.eps_from_x0(x, x0, angle), z, tolerance)
    assert tf.velocity_from_eps(x, z, angle).dtype == dtype


@PRECISIONS
@settings(deadline=None)
@given(seed=SEEDS, angle=SAFE)
def test_conversions_of_any_prediction_go_round(
    dtype: type, tolerance: float, seed: int, angle: float
) -> None:
    """A network's output is no true velocity: the round trip may not rely on x being consistent with it."""
    x, v = pair(seed, dtype)
    close(tf.velocity_from_eps(x, tf.eps_from_velocity(x, v, angle), angle), v, tolerance)
    close(tf.velocity_from_x0(x, tf.x0_from_velocity(x, v, angle), angle), v, tolerance)
    eps, x0 = tf.eps_from_velocity(x, v, angle), tf.x0_from_velocity(x, v, angle)
    close(tf.x0_from_eps(x, eps, angle), x0, tolerance)
    close(tf.eps_from_x0(x, x0, angle), eps, tolerance)


@PRECISIONS
@settings(deadline=None)
@given(seed=SEEDS, angle=ANY)
def test_the_form_without_division_is_exact_everywhere(
    dtype: type, tolerance: float, seed: int, angle: float
) -> None:
    x0, z = pair(seed, dtype)
    x, v = tf.mix(x0, z, angle), tf.velocity_target(x0, z, angle)
    close(tf.cos_velocity_from_eps(x, z, angle), math.cos(angle) * v, tolerance / 100)


@settings(deadline=None)
@given(seed=SEEDS, angle=st.floats(tf.MAX_EPS_ANGLE, tf.NOISE_ANGLE))
def test_eps_conversions_fade_past_their_bound(seed: int, angle: float) -> None:
    x0, z = pair(seed)
    x, v = tf.mix(x0, z, angle), tf.velocity_target(x0, z, angle)
    fade = math.cos(angle) / math.cos(tf.MAX_EPS_ANGLE)
    assert 0 <= fade <= 1
    close(tf.velocity_from_eps(x, z, angle), fade * v, 1e-10)
    close(tf.x0_from_eps(x, z, angle), fade * x0, 1e-10)


@settings(deadline=None)
@given(seed=SEEDS, angle=st.floats(0, tf.MIN_X0_ANGLE))
def test_x0_conversions_fade_before_their_bound(seed: int, angle: float) -> None:
    x0, z = pair(seed)
    x, v = tf.mix(x0, z, angle), tf.velocity_target(x0, z, angle)
    fade = math.sin(angle) / math.sin(tf.MIN_X0_ANGLE)
    assert 0 <= fade <= 1
    close(tf.velocity_from_x0(x, x0, angle), fade * v, 1e-10)
    close(tf.eps_from_x0(x, x0, angle), fade * z, 1e-10)


def test_errors_of_a_prediction_grow_637_fold_at_most() -> None:
    """The documented constant, at the very ends too, where a plain division would be infinite."""
    x0, z = pair(1)
    worst_eps = worst_x0 = 0.0
    for angle in (0.0, tf.MIN_X0_ANGLE, 0.7, tf.MAX_EPS_ANGLE, tf.NOISE_ANGLE):
        x = tf.mix(x0, z, angle)
        worst_eps = max(
            worst_eps,
            abs(tf.velocity_from_eps(x, z + 1, angle) - tf.velocity_from_eps(x, z, angle)).max(),
        )
        worst_x0 = max(
            worst_x0, abs(tf.velocity_from_x0(x, x0 + 1, angle) - tf.velocity_from_x0(x, x0, angle)).max()
        )
    assert worst_eps == pytest.approx(636.6, abs=0.1)
    assert worst_x0 == pytest.approx(636.6, abs=0.1)


def test_bounds_are_steps_1_and_999_of_the_papers_1000() -> None:
    assert pytest.approx(tf.angle_from_step(999, 1000), rel=1e-15) == tf.MAX_EPS_ANGLE
    assert pytest.approx(tf.angle_from_step(1, 1000), rel=1e-15) == tf.MIN_X0_ANGLE


# --- rectified flow ---


@settings(deadline=None)
@given(seed=SEEDS, s=st.floats(0, 1))
def test_rectified_flow_converts_exactly_both_ways(seed: int, s: float) -> None:
    x0, z = pair(seed)
    x, v, angle = tf.flow_to_trigflow((1 - s) * x0 + s * z, z - x0, s)
    close(x, tf.mix(x0, z, angle), 1e-12)
    close(v, tf.velocity_target(x0, z, angle), 1e-12)
    assert math.cos(angle) * s == pytest.approx(math.sin(angle) * (1 - s), abs=1e-14)
    x_s, u, back = tf.trigflow_to_flow(x, v, angle)
    close(x_s, (1 - s) * x0 + s * z, 1e-12)
    close(u, z - x0, 1e-12)
    assert back == pytest.approx(s, abs=1e-14)


@settings(deadline=None)
@given(seed=SEEDS, angle=ANY)
def test_any_prediction_goes_round_through_rectified_flow(seed: int, angle: float) -> None:
    x, v = pair(seed)
    again_x, again_v, again = tf.flow_to_trigflow(*tf.trigflow_to_flow(x, v, angle))
    close(again_x, x, 1e-10)
    close(again_v, v, 1e-10)
    assert again == pytest.approx(angle, abs=1e-14)


def test_the_flow_ode_and_the_trigflow_ode_are_one() -> None:
    """Along rectified flow's own straight path, the converted velocity is the derivative by the angle."""
    x0, z = pair(4)
    s, h = 0.3, 1e-5
    ahead, _, high = tf.flow_to_trigflow((1 - s - h) * x0 + (s + h) * z, z - x0, s + h)
    behind, _, low = tf.flow_to_trigflow((1 - s + h) * x0 + (s - h) * z, z - x0, s - h)
    _, v, _ = tf.flow_to_trigflow((1 - s) * x0 + s * z, z - x0, s)
    close((ahead - behind) / (high - low), v, 1e-8)


@settings(deadline=None)
@given(s=st.floats(0, 1))
def test_flow_time_goes_round(s: float) -> None:
    assert tf.flow_time_from_angle(tf.angle_from_flow_time(s)) == pytest.approx(s, abs=1e-14)


# --- steps ---


@settings(deadline=None)
@given(step=st.floats(0, 1000), steps=st.integers(1, 4000))
def test_steps_of_the_cosine_schedule(step: float, steps: int) -> None:
    step = min(step, steps)
    angle = tf.angle_from_step(step, steps)
    assert tf.step_from_angle(angle, steps) == pytest.approx(step, abs=1e-10)
    assert math.sqrt(tf.alpha_bar_from_angle(angle)) == pytest.approx(
        math.cos(step / steps * math.pi / 2), abs=1e-12
    )


@settings(deadline=None)
@given(angle=ANY)
def test_alpha_bar_goes_round(angle: float) -> None:
    assert tf.angle_from_alpha_bar(tf.alpha_bar_from_angle(angle)) == pytest.approx(angle, abs=3e-8)


def test_small_angles_keep_their_digits() -> None:
    """arccos(sqrt(alpha_bar)) would be wrong in its first digit for a share of noise of 1e-16."""
    assert tf.angle_from_alpha_bar(1 - 2.0**-53) == pytest.approx(2.0**-26.5, rel=1e-6)
    assert tf.angle_from_alpha_bar([0.0, 0.5, 1.0]).tolist() == pytest.approx([math.pi / 2, math.pi / 4, 0])


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan"), [0.5, 2.0]])
def test_alpha_bar_out_of_range_is_one_line(bad: Any) -> None:
    with pytest.raises(UserError, match="alpha_bar"):
        tf.angle_from_alpha_bar(bad)


def test_nichols_adjusted_cosine_stays_near_the_pure_one() -> None:
    angles = tf.angle_from_alpha_bar(tf.nichol_alpha_bar(1000))
    gap = abs(angles - tf.angle_from_step(np.arange(1, 1001), 1000))
    assert 0.010 < gap.max() <= 0.011
    assert angles[-1] == pytest.approx(1.57075, abs=5e-6)
    assert np.all(np.diff(angles) > 0)


def test_index_in_the_table_of_an_arbitrary_schedule() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)  # Ho et al.'s linear schedule
    table = tf.angle_from_alpha_bar(np.cumprod(1 - betas))
    assert tf.index_from_angle(table, table).tolist() == pytest.approx(list(range(1000)), abs=1e-9)
    assert tf.index_from_angle((table[41] + table[42]) / 2, table) == pytest.approx(41.5, abs=1e-9)
    assert tf.index_from_angle(0.0, table) == 0
    assert tf.index_from_angle(tf.NOISE_ANGLE, table) == 999


@pytest.mark.parametrize("table", [[0.1], [0.2, 0.1], [0.1, float("nan")], [[0.1, 0.2]]])
def test_a_table_that_does_not_increase_is_one_line(table: Any) -> None:
    with pytest.raises(UserError, match="increasing"):
        tf.index_from_angle(0.1, table)


@settings(deadline=None)
@given(angle=st.floats(1e-6, 1.57))
def test_log_snr(angle: float) -> None:
    assert tf.log_snr(angle) == pytest.approx(math.log(math.cos(angle) / math.sin(angle)), abs=1e-9)


def test_log_snr_at_the_ends() -> None:
    assert tf.log_snr(0) == math.inf
    assert tf.log_snr(tf.NOISE_ANGLE) == -math.inf


# --- array libraries ---

CONVERSIONS: list[Callable[..., Any]] = [
    tf.mix,
    tf.velocity_target,
    tf.x0_from_velocity,
    tf.eps_from_velocity,
    tf.velocity_from_eps,
    tf.cos_velocity_from_eps,
    tf.velocity_from_x0,
    tf.x0_from_eps,
    tf.eps_from_x0,
    lambda x, v, angle: tf.rotate(x, v, angle, angle / 2),
    lambda x, v, angle: tf.flow_to_trigflow(x, v, angle / 2)[0],
    lambda x, v, angle: tf.flow_to_trigflow(x, v, angle / 2)[1],
    lambda x, v, angle: tf.flow_to_trigflow(x, v, angle / 2)[2],
    lambda x, v, angle: tf.trigflow_to_flow(x, v, angle)[1],
    lambda x, v, angle: tf.flow_time_from_angle(angle),
    lambda x, v, angle: tf.alpha_bar_from_angle(angle),
    lambda x, v, angle: tf.step_from_angle(tf.angle_from_step(angle, 10), 10),
]


@pytest.mark.parametrize("library", ["mlx", "torch"])
@pytest.mark.parametrize("function", CONVERSIONS)
def test_every_library_agrees_with_numpy(library: str, function: Callable[..., Any]) -> None:
    array = mx.array if library == "mlx" else pytest.importorskip("torch").from_numpy
    x, v = pair(3, np.float32)
    angles = np.array([0.0005, 1.5], np.float32)
    expected = function(x, v, tf.per_image(angles, x))
    found = function(array(x), array(v), tf.per_image(array(angles), array(x)))
    assert type(found) is type(array(x))
    close(found, expected, 2e-4)
    assert expected.dtype == np.float32
    assert np.asarray(found).dtype == np.float32


def test_one_angle_an_image_equals_one_number_for_each() -> None:
    x, v = pair(5)
    angles = np.array([0.3, 1.2])
    together = tf.x0_from_velocity(x, v, tf.per_image(angles, x))
    for row, angle in enumerate(angles):
        close(together[row], tf.x0_from_velocity(x[row], v[row], float(angle)), 1e-15)


def test_per_image_shapes() -> None:
    assert tf.per_image(np.zeros(3), np.zeros((3, 4, 5))).shape == (3, 1, 1)
    assert tf.per_image(mx.zeros(3), mx.zeros((3, 4))).shape == (3, 1)


def test_mlx_differentiates_and_compiles_through_the_angle() -> None:
    """A consistency student takes tangents along the angle; training compiles."""
    x, v = (mx.array(a) for a in pair(6, np.float32))

    def state(angle: mx.array) -> mx.array:
        return tf.mix(x, v, angle)

    _, tangents = mx.jvp(state, [mx.array(0.4)], [mx.array(1.0)])
    close(tangents[0], tf.velocity_target(np.asarray(x), np.asarray(v), 0.4), 1e-6)
    compiled = mx.compile(lambda angle: tf.velocity_from_eps(x, v, angle))
    close(compiled(mx.array(0.4)), tf.velocity_from_eps(x, v, 0.4), 1e-5)
