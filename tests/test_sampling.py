"""Samplers against closed forms: Gaussian data has an exact velocity, flow map and posterior."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion import noise
from mlx_transfusion.errors import UserError
from mlx_transfusion.sampling import (
    SAMPLERS,
    SPACINGS,
    Guidance,
    angle_schedule,
    check_angles,
    get_sampler,
    guided,
)
from mlx_transfusion.trigflow import NOISE_ANGLE, eps_from_velocity, velocity_from_eps

DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]
ALL = list(SAMPLERS)
DIFFUSION = [name for name in ALL if name != "consistency"]  # that has test_consistency_sampling.py besides
MEAN, STD = 0.7, 0.4


def gaussian_velocity(x: Any, a: float, mean: float = MEAN, std: float = STD) -> Any:
    """The exact velocity of data N(mean, std^2), in any array library."""
    sine, cosine = math.sin(a), math.cos(a)
    variance = (std * cosine) ** 2 + sine**2
    return (sine * cosine * (1 - std**2) / variance) * (x - cosine * mean) - sine * mean


def gaussian_flow(x: np.ndarray, a: float) -> np.ndarray:
    """Where the exact ODE takes `x` from angle a to 0."""
    spread = math.sqrt((STD * math.cos(a)) ** 2 + math.sin(a) ** 2)
    return MEAN + STD / spread * (x - math.cos(a) * MEAN)


MODES = np.array([[1.5, 0.0], [-0.8, 1.2], [-0.6, -1.1]])
WEIGHTS = np.array([0.5, 0.3, 0.2])
MODE_STD = 0.25


def mixture_velocity(x: np.ndarray, a: float) -> np.ndarray:
    """The exact velocity of the 2-D mixture: those of its modes, weighted by their posteriors."""
    sine, cosine = math.sin(a), math.cos(a)
    offsets = x[:, None] - cosine * MODES
    variance = (MODE_STD * cosine) ** 2 + sine**2
    logits = np.log(WEIGHTS) - (offsets**2).sum(-1) / (2 * variance)
    posterior = np.exp(logits - logits.max(1, keepdims=True))
    posterior /= posterior.sum(1, keepdims=True)
    each = (sine * cosine * (1 - MODE_STD**2) / variance) * offsets - sine * MODES
    return (posterior[..., None] * each).sum(1)


def mixture_samples(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return MODES[rng.choice(3, count, p=WEIGHTS)] + MODE_STD * rng.standard_normal((count, 2))


def energy_distance(one: np.ndarray, two: np.ndarray) -> float:
    def mean_distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a[:, None] - b) ** 2).sum(-1)).mean())

    return 2 * mean_distance(one, two) - mean_distance(one, one) - mean_distance(two, two)


def fresh(shape: tuple[int, ...], seed: int = 0) -> Callable[[int], np.ndarray]:
    return lambda step: noise.normal(seed, step, shape, "step").astype(np.float64)


def run(
    name: str, velocity: Callable[[Any, float], Any], x: Any, steps: int, start: float = NOISE_ANGLE
) -> Any:
    return SAMPLERS[name].function(velocity, x, angle_schedule(steps, start), fresh(x.shape))


# --- accuracy ---


def exact_mixture_flow(x: np.ndarray, a: float, steps: int = 1000) -> np.ndarray:
    """Where the ODE takes `x` from angle a to 0, by the classic Runge-Kutta method (error below 1e-9)."""
    h = -a / steps
    for i in range(steps):
        t = a + i * h
        k1 = mixture_velocity(x, t)
        k2 = mixture_velocity(x + h / 2 * k1, t + h / 2)
        k3 = mixture_velocity(x + h / 2 * k2, t + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + mixture_velocity(x + h * k3, t + h))
    return x


def convergence_order(steps: list[int], errors: list[float]) -> float:
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


@pytest.mark.parametrize("start", [NOISE_ANGLE, 1.2])
def test_samplers_converge_to_the_flow_of_a_mixture_at_their_order(start: float) -> None:
    x = noise.normal(0, 0, (60, 2)).astype(np.float64)
    exact = exact_mixture_flow(x, start)
    steps = [32, 64, 128, 256]
    for name, order in (("ddim", 1), ("heun", 2), ("midpoint", 2)):
        errors = [
            float(np.sqrt(((run(name, mixture_velocity, x, n, start) - exact) ** 2).mean())) for n in steps
        ]
        assert convergence_order(steps, errors) == pytest.approx(order, abs=0.25), (name, errors)
        assert errors[-1] < (5e-3 if order == 1 else 2e-4), name


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("start", [NOISE_ANGLE, 1.2])
def test_samplers_reach_the_exact_flow_map_of_a_gaussian(name: str, start: float) -> None:
    x = np.linspace(-2.5, 2.5, 11)
    errors = [
        abs(run(name, gaussian_velocity, x, n, start) - gaussian_flow(x, start)).max() for n in (16, 256)
    ]
    assert errors[0] < (0.15 if name == "ddim" else 0.03)
    assert errors[1] < (0.01 if name == "ddim" else 1e-3)


def test_dpmpp_2m_is_of_second_order_in_its_own_variable() -> None:
    """On equal steps of lambda. (Equal turns end in infinite lambda, which costs a logarithm.)"""

    def error(steps: int) -> float:
        angles = [math.atan(math.exp(-lam)) for lam in np.linspace(-2, 2.5, steps + 1)]
        states: list[np.ndarray] = []
        x = np.linspace(-2.5, 2.5, 11)
        SAMPLERS["dpmpp_2m"].function(
            gaussian_velocity, x, [*angles, 0.0], None, lambda i, n, x, x0: states.append(x)
        )
        # The last of these states stands at angles[-1], from where the exact flow map goes on.
        return float(abs(gaussian_flow(states[-2], angles[-1]) - gaussian_flow(x, angles[0])).max())

    steps = [32, 64, 128, 256]
    errors = [error(n) for n in steps]
    assert convergence_order(steps, errors) == pytest.approx(2, abs=0.15), errors
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("start", [NOISE_ANGLE, 0.9])
def test_data_of_one_point_is_reached_exactly_in_any_number_of_steps(
    name: str, steps: int, start: float
) -> None:
    x = math.cos(start) * MEAN + math.sin(start) * np.linspace(-2, 2, 5)
    found = run(name, lambda x, a: gaussian_velocity(x, a, MEAN, 0.0), x, steps, start)
    np.testing.assert_allclose(found, MEAN, atol=1e-12)


@pytest.mark.parametrize("name", ["heun", "midpoint"])
def test_unit_normal_data_stands_still(name: str) -> None:
    """There v = 0, and what a plain rotation loses the second evaluation gives back."""
    x = np.linspace(-2, 2, 5)
    found = run(name, lambda x, a: 0.0 * x, x, 3, 0.5)
    np.testing.assert_allclose(found, x, rtol=1e-14)


@settings(deadline=None)
@given(
    data=st.data(),
    a=st.floats(0.01, NOISE_ANGLE),
    x=st.floats(-3, 3),
    v=st.floats(-3, 3),
    z=st.floats(-3, 3),
)
def test_a_ddpm_step_is_the_textbook_posterior(
    data: st.DataObject, a: float, x: float, v: float, z: float
) -> None:
    """Ho et al. 2020, equation 7, written down from alpha_bar for any network output v, with noise z."""
    b = data.draw(st.floats(a * 0.01, a * 0.99))
    states: list[float] = []
    SAMPLERS["ddpm"].function(
        lambda x, angle: v, x, [a, b, 0.0], lambda step: z, lambda i, n, x, x0: states.append(x)
    )
    alpha_bar_a, alpha_bar_b = math.cos(a) ** 2, math.cos(b) ** 2
    alpha = alpha_bar_a / alpha_bar_b
    beta = 1 - alpha
    x0 = math.cos(a) * x - math.sin(a) * v
    mean = (
        math.sqrt(alpha_bar_b) * beta / (1 - alpha_bar_a) * x0
        + math.sqrt(alpha) * (1 - alpha_bar_b) / (1 - alpha_bar_a) * x
    )
    variance = (1 - alpha_bar_b) / (1 - alpha_bar_a) * beta
    assert states[0] == pytest.approx(mean + math.sqrt(variance) * z, abs=1e-8)


def test_250_ddpm_steps_are_the_textbook_on_every_fourth_step_of_1000() -> None:
    """Nichol and Dhariwal 2021, section 4: betas of the subset from alpha_bar, then plain DDPM."""
    x = start = np.linspace(-2, 2, 5)
    draw = fresh(x.shape)
    # The textbook's eps form divides by sqrt(alpha_bar), 0 at step 1000: it starts at step 996.
    kept = np.arange(0, 1000, 4)
    alpha_bar = np.cos(math.pi * kept / 2000) ** 2
    for count, i in enumerate(range(len(kept) - 1, 0, -1)):
        a = math.pi * kept[i] / 2000
        eps = eps_from_velocity(x, gaussian_velocity(x, a), a)
        beta = 1 - alpha_bar[i] / alpha_bar[i - 1]
        sigma = math.sqrt((1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * beta)
        x = (x - beta / math.sqrt(1 - alpha_bar[i]) * eps) / math.sqrt(1 - beta)
        x = x + sigma * draw(count) if i > 1 else x
    found = run("ddpm", gaussian_velocity, start, 249, math.pi * 996 / 2000)
    np.testing.assert_allclose(found, x, rtol=1e-9)


def test_ddpm_draws_the_mean_and_the_spread_of_the_data() -> None:
    count = 20_000
    x = noise.normal(1, 0, count).astype(np.float64)
    found = run("ddpm", gaussian_velocity, x, SAMPLERS["ddpm"].default_steps)
    assert abs(found.mean() - MEAN) < 5 * STD / math.sqrt(count)
    # 5 standard errors, and 1% for the finite number of steps (beta-tilde is a lower bound of the variance).
    assert abs(found.std() / STD - 1) < 0.01 + 5 / math.sqrt(2 * count)
    # A stochastic sampler has forgotten its start; a flow map would be a straight line in it.
    assert abs(np.corrcoef(found, x)[0, 1]) < 5 / math.sqrt(count)


@pytest.mark.parametrize("name", DIFFUSION)
def test_samples_of_a_mixture_have_its_distribution(name: str) -> None:
    count = 1500
    x = noise.normal(2, 0, (count, 2)).astype(np.float64)
    found = run(name, mixture_velocity, x, 100 if name in ("ddpm", "ddim") else 32)
    # Two sets of 1,500 true samples lie at .0024 on average, 1 pair in 100 beyond .0097.
    assert energy_distance(found, mixture_samples(0, count)) < 0.01


def test_the_energy_distance_tells_a_mixture_from_a_gaussian_of_equal_moments() -> None:
    """So the test above sees more than a mean and a covariance."""
    mixture = mixture_samples(0, 1500)
    rng = np.random.default_rng(1)
    gaussian = rng.multivariate_normal(mixture.mean(0), np.cov(mixture.T), 1500)
    assert energy_distance(mixture, gaussian) > 0.05


# --- the contract ---


class Counted:
    """Counts calls of the Gaussian velocity and keeps their angles."""

    def __init__(self) -> None:
        self.angles: list[float] = []

    def __call__(self, x: Any, a: float) -> Any:
        self.angles.append(a)
        return gaussian_velocity(x, a)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("steps", [1, 5])
def test_evaluations_are_as_registered(name: str, steps: int) -> None:
    velocity = Counted()
    run(name, velocity, np.zeros(3), steps)
    assert len(velocity.angles) == SAMPLERS[name].evaluations(steps)
    assert all(0 < a <= NOISE_ANGLE for a in velocity.angles)
    assert all(type(a) is float for a in velocity.angles)


@pytest.mark.parametrize("name", ALL)
def test_only_stochastic_samplers_draw_noise_once_a_step_but_the_last(name: str) -> None:
    drawn: list[int] = []

    def draw(step: int) -> np.ndarray:
        drawn.append(step)
        return np.zeros(3)

    SAMPLERS[name].function(gaussian_velocity, np.ones(3), angle_schedule(6), draw)
    assert drawn == ([0, 1, 2, 3, 4] if SAMPLERS[name].stochastic else [])


@pytest.mark.parametrize("name", ALL)
def test_the_callback_sees_every_state_and_estimate(name: str) -> None:
    seen: list[tuple[int, int, np.ndarray, np.ndarray]] = []
    angles = angle_schedule(4)
    final = SAMPLERS[name].function(
        gaussian_velocity,
        np.linspace(-2, 2, 5),
        angles,
        fresh((5,)),
        lambda step, steps, x, x0: seen.append((step, steps, x, x0)),
    )
    assert [(step, steps) for step, steps, _, _ in seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    np.testing.assert_array_equal(seen[-1][2], final)
    # From pure noise the posterior mean is the mean of the data; midpoint estimates it half way on.
    assert abs(seen[0][3] - MEAN).max() < (1e-12 if name != "midpoint" else 0.3)
    np.testing.assert_allclose(seen[-1][3], final, atol=0.2 if name in ("heun", "midpoint") else 1e-12)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_states_of_the_callback_lie_at_their_angles(name: str) -> None:
    """With data of one point the state at every angle is known."""
    angles = angle_schedule(5)
    z = np.linspace(-2, 2, 5)

    def check(step: int, steps: int, x: np.ndarray, x0: np.ndarray) -> None:
        a = angles[step + 1]
        np.testing.assert_allclose(x, math.cos(a) * MEAN + math.sin(a) * z, atol=1e-12)
        np.testing.assert_allclose(x0, MEAN, atol=1e-12)

    SAMPLERS[name].function(lambda x, a: gaussian_velocity(x, a, MEAN, 0.0), z, angles, None, check)


@pytest.mark.parametrize("name", ALL)
def test_a_picture_does_not_depend_on_its_batch(name: str) -> None:
    """Rows carry their own noise, keyed by their own seed, and must come out the same bit for bit."""

    def paint(seeds: list[int]) -> np.ndarray:
        def draw(step: int) -> np.ndarray:
            return np.stack([noise.normal(seed, step, (4, 3), "step") for seed in seeds])

        x = np.stack([noise.normal(seed, 0, (4, 3), "start") for seed in seeds])
        return SAMPLERS[name].function(gaussian_velocity, x, angle_schedule(9), draw)

    together = paint([3, 1, 2])
    for row, seed in enumerate([3, 1, 2]):
        np.testing.assert_array_equal(together[row], paint([seed])[0])
    assert together.dtype == np.float32


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("library", ["mlx", "torch"])
def test_every_library_agrees_with_numpy(name: str, library: str) -> None:
    array = mx.array if library == "mlx" else pytest.importorskip("torch").from_numpy
    x = noise.normal(5, 0, (2, 3))

    def paint(convert: Callable[[np.ndarray], Any]) -> Any:
        def draw(step: int) -> Any:
            return convert(noise.normal(5, step, x.shape, "step"))

        return SAMPLERS[name].function(gaussian_velocity, convert(x), angle_schedule(12), draw)

    found = paint(array)
    assert type(found) is type(array(x))
    assert np.asarray(found).dtype == np.float32
    np.testing.assert_allclose(np.asarray(found), paint(lambda a: a), atol=2e-6)


def test_ddpm_without_noise_is_one_line() -> None:
    with pytest.raises(UserError, match="draws noise"):
        SAMPLERS["ddpm"].function(gaussian_velocity, np.zeros(2), angle_schedule(3))


# --- registry and schedules ---


def test_the_registry_offers_the_papers_default() -> None:
    assert SAMPLERS["ddpm"].default_steps == 250
    assert get_sampler("heun") is SAMPLERS["heun"]


@pytest.mark.parametrize(
    ("name", "hint"), [("hein", "'heun'"), ("dpmpp2m", "'dpmpp_2m'"), ("xyz", "known: ddpm, ddim")]
)
def test_an_unknown_sampler_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"unknown sampler '{name}'; .*{hint}"):
        get_sampler(name)


@settings(deadline=None)
@given(
    steps=st.integers(1, 300),
    start=st.floats(0.001, NOISE_ANGLE),
    spacing=st.sampled_from(SPACINGS),
)
def test_schedules_are_what_samplers_want(steps: int, start: float, spacing: str) -> None:
    angles = angle_schedule(steps, start, spacing)
    check_angles(angles)
    assert len(angles) == steps + 1
    assert angles[0] == pytest.approx(min(start, math.atan(160)) if spacing == "karras" else start, abs=1e-9)


def test_uniform_steps_are_every_fourth_of_the_papers_1000() -> None:
    steps = [a * 2000 / math.pi for a in angle_schedule(250)]
    assert steps == pytest.approx(list(range(1000, -1, -4)), abs=1e-9)


def test_karras_spacing_is_edms() -> None:
    """EDM's own numbers: sigma 80 to .002, rho 7, 18 steps, at data of standard deviation .5."""
    sigmas = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    expected = [math.atan(sigma / 0.5) for sigma in sigmas] + [0.0]
    assert angle_schedule(18, spacing="karras") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_karras_spacing_works_with_every_sampler(name: str) -> None:
    angles = angle_schedule(60, spacing="karras")
    x = np.linspace(-2, 2, 5)
    found = SAMPLERS[name].function(gaussian_velocity, x, angles)
    np.testing.assert_allclose(found, gaussian_flow(x, angles[0]), atol=0.06 if name == "ddim" else 0.006)


@pytest.mark.parametrize("steps", [0, -5])
def test_too_few_steps_is_one_line(steps: int) -> None:
    with pytest.raises(UserError, match=f"steps is {steps}: use at least 1"):
        angle_schedule(steps)


@pytest.mark.parametrize("start", [0.0, -1.0, 1.6, float("nan")])
def test_a_start_out_of_range_is_one_line(start: float) -> None:
    with pytest.raises(UserError, match="start angle"):
        angle_schedule(4, start)


def test_an_unknown_spacing_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown spacing 'karas'; did you mean 'karras'"):
        angle_schedule(4, spacing="karas")


@pytest.mark.parametrize(
    "angles",
    [[], [0.0], [1.0, 0.5], [1.0, 1.0, 0.0], [0.5, 1.0, 0.0], [1.6, 0.0], [math.nan, 0.0], [1.0, 0.5, -0.1]],
)
@pytest.mark.parametrize("name", ALL)
def test_bad_angles_are_one_line(name: str, angles: list[float]) -> None:
    with pytest.raises(UserError, match="angle"):
        SAMPLERS[name].function(gaussian_velocity, np.zeros(2), angles, fresh((2,)))


# --- guidance ---


def test_guidance_by_hand() -> None:
    cond, uncond = np.array([1.0, 2.0]), np.array([0.0, 4.0])
    assert guided(cond, uncond, 0).tolist() == [0, 4]
    assert guided(cond, uncond, 1).tolist() == [1, 2]
    assert guided(cond, uncond, 3).tolist() == [3, -2]


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0, 10), a=st.floats(0.01, 1.5), values=st.tuples(*[st.floats(-3, 3)] * 3))
def test_guiding_velocities_is_guiding_eps(scale: float, a: float, values: tuple[float, ...]) -> None:
    x, cond, uncond = (np.array(value) for value in values)
    by_eps = velocity_from_eps(x, guided(cond, uncond, scale), a)
    by_velocity = guided(velocity_from_eps(x, cond, a), velocity_from_eps(x, uncond, a), scale)
    np.testing.assert_allclose(by_velocity, by_eps, atol=1e-9)


def test_guided_gaussians_by_closed_form() -> None:
    """Two Gaussians of one width: the guided field is that of a Gaussian at the extrapolated mean."""
    x = np.linspace(-2, 2, 5)

    def velocity(x: np.ndarray, a: float) -> np.ndarray:
        return guided(gaussian_velocity(x, a, 1.0), gaussian_velocity(x, a, 0.2), 3.0)

    found = run("heun", velocity, x, 200)
    np.testing.assert_allclose(found, 0.2 + 3 * 0.8 + STD * x, atol=1e-3)


def test_guidance_applies_inside_its_interval_only() -> None:
    guidance = Guidance(3.0, (0.3, 1.2))
    assert [guidance.active(a) for a in (0.2, 0.3, 1.0, 1.2, 1.3)] == [False, True, True, True, False]
    assert Guidance(2.0).active(0.0)
    assert Guidance(2.0).active(NOISE_ANGLE)
    assert not Guidance(1.0).active(0.5)
    assert Guidance(0.0).active(0.5)


@pytest.mark.parametrize("scale", [-0.1, math.inf, math.nan])
def test_a_bad_scale_is_one_line(scale: float) -> None:
    with pytest.raises(UserError, match="guidance is"):
        Guidance(scale)


@pytest.mark.parametrize("interval", [(1.0, 0.5), (-0.1, 1.0), (0.0, 1.6), (math.nan, 1.0)])
def test_a_bad_interval_is_one_line(interval: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="guidance interval"):
        Guidance(2.0, interval)
