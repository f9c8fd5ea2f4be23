"""The consistency objective against exact answers: Gaussian data, a mixture, gradients worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import trigflow_oracles as oracles
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion import consistency, trigflow
from mlx_transfusion.errors import UserError
from mlx_transfusion.pace import tangent_warmup

Network = Callable[[mx.array, mx.array], mx.array]
TANGENTS = ("normalize", "clip", "none")
ENDS_AND_BETWEEN = [0.0, 1e-6, 1e-3, 0.1, 0.5, 1.0, 1.3, 1.56, trigflow.NOISE_ANGLE]


def full_tangent(network: Network, x: mx.array, angle: mx.array, cos_velocity: mx.array) -> mx.array:
    value = consistency.value_and_derivative(network, x, angle, cos_velocity)
    return consistency.tangent(value, x, angle, cos_velocity)


# --- Gaussian data: everything in closed form ---


def gaussian_optimum(mean: float, std: float) -> Network:
    """The network whose consistency function is exact, free of divisions that blow up at angle 0."""

    def network(x: mx.array, angle: mx.array) -> mx.array:
        a = trigflow.per_image(angle, x)
        c, s = mx.cos(a), mx.sin(a)
        root = mx.sqrt(std**2 * c * c + s * s)
        slope = (c * c - std**2 * (1 + c * c)) / (root * (c * root + std))
        return s * ((x - c * mean) * slope - mean)

    return network


def gaussian_velocity(mean: float, std: float) -> Network:
    def network(x: mx.array, angle: mx.array) -> mx.array:
        a = trigflow.per_image(angle, x)
        c, s = mx.cos(a), mx.sin(a)
        return -s * mean + s * c * (1 - std**2) / (std**2 * c * c + s * s) * (x - c * mean)

    return network


def gaussian_states(mean: float, std: float, angles: list[float], seed: int = 0) -> tuple[mx.array, mx.array]:
    """States [M, 16] of that data at the angles [M]."""
    x0, z = np.random.default_rng(seed).standard_normal((2, len(angles), 16))
    angle = mx.array(angles, mx.float32)
    states = trigflow.mix(mx.array(mean + std * x0, mx.float32), mx.array(z, mx.float32), angle[:, None])
    return states, angle


@settings(deadline=None, max_examples=25)
@given(mean=st.floats(-1, 1), std=st.floats(0.3, 1.6), seed=st.integers(0, 1000))
def test_tangent_at_the_optimum_is_zero(mean: float, std: float, seed: int) -> None:
    x, angle = gaussian_states(mean, std, ENDS_AND_BETWEEN, seed)
    cos_velocity = mx.cos(angle)[:, None] * gaussian_velocity(mean, std)(x, angle)
    g = full_tangent(gaussian_optimum(mean, std), x, angle, cos_velocity)
    np.testing.assert_allclose(g, np.zeros(g.shape), atol=1e-5)


def test_consistency_function_at_the_optimum_is_the_flow_map() -> None:
    mean, std = 0.6, 1.6
    data = oracles.Mixture((1.0,), (mean,), (std,))
    x, angle = gaussian_states(mean, std, ENDS_AND_BETWEEN)
    f = trigflow.x0_from_velocity(x, gaussian_optimum(mean, std)(x, angle), angle[:, None])
    for row, start, jump in zip(np.array(x, np.float64), ENDS_AND_BETWEEN, np.array(f), strict=True):
        np.testing.assert_allclose(jump, oracles.follow(data.velocity, row, start), atol=2e-6)


@pytest.mark.parametrize(
    ("x", "angle", "velocity", "g"),
    [
        (2.0, 0.2, -0.290860, -0.112750),
        (2.0, 0.8, -1.132324, -0.655496),
        (-1.4, 1.1, 0.263560, 0.991700),
        (0.5, 1.5, -0.648472, -0.081374),
    ],
)
def test_tangent_of_the_teacher_itself(x: float, angle: float, velocity: float, g: float) -> None:
    """A diffusion model is no consistency model yet. Data N(0.6, 1.6^2); numbers from a derivation on paper."""
    teacher = gaussian_velocity(0.6, 1.6)
    state, a = mx.array([[x]]), mx.array([angle])
    v = teacher(state, a)
    assert v.item() == pytest.approx(velocity, abs=3e-6)
    found = full_tangent(teacher, state, a, mx.cos(a)[:, None] * v)
    assert found.item() == pytest.approx(g, abs=4e-6)


# --- a mixture: the consistency function preserves quantiles ---


def newton_flow_map(x: mx.array, angle: mx.array, guess: mx.array) -> mx.array:
    """The mixture's flow map with its derivatives: one Newton step from the known value `guess` [M, 1]."""
    weights, means, stds = (mx.array(v) for v in oracles.TWO_MODES.__dict__.values())

    def cdf(y: mx.array, a: mx.array) -> mx.array:
        variance = stds**2 * mx.cos(a) ** 2 + mx.sin(a) ** 2
        return (weights * 0.5 * (1 + mx.erf((y - mx.cos(a) * means) / mx.sqrt(2 * variance)))).sum(1, True)

    density = (weights / (stds * math.sqrt(2 * math.pi)) * mx.exp(-(((guess - means) / stds) ** 2) / 2)).sum(
        1, True
    )
    return guess - (cdf(guess, mx.zeros_like(angle)) - cdf(x, angle)) / density


@pytest.mark.parametrize(
    ("x", "angle", "velocity", "target"),
    [
        (0.2, 0.3, -0.765372, 0.319472),
        (0.2, 1.0, -0.661864, 0.849258),
        (-0.8, 1.3, 0.082916, -1.806982),
        (1.2, 1.5, -0.357952, 1.771688),
        (0.0, math.pi / 2, -0.240000, 0.860430),
    ],
)
def test_the_mixture_oracle_itself(x: float, angle: float, velocity: float, target: float) -> None:
    """Known values, and the ODE ends where the quantile map says: the two oracles share no formula."""
    data, state = oracles.TWO_MODES, np.array([x])
    assert data.velocity(state, angle)[0] == pytest.approx(velocity, abs=2e-6)
    assert data.flow_map(state, angle)[0] == pytest.approx(target, abs=2e-6)
    assert oracles.follow(data.velocity, state, angle, steps=128)[0] == pytest.approx(target, abs=2e-6)


def test_the_mixtures_quantile_map_has_no_tangent_and_the_teacher_has() -> None:
    angles, noise = (v.ravel() for v in np.meshgrid([0.3, 0.8, 1.2, 1.5], [-1.6, -1.0, -0.3, 0.2, 0.9, 1.7]))
    x = np.stack(
        [
            oracles.follow(oracles.TWO_MODES.velocity, z, math.pi / 2, a)
            for z, a in zip(noise, angles, strict=True)
        ]
    )
    start = mx.array(oracles.TWO_MODES.flow_map(x, angles)[:, None], mx.float32)

    def optimum(state: mx.array, a: mx.array) -> mx.array:
        return (mx.cos(a)[:, None] * state - newton_flow_map(state, a[:, None], start)) / mx.sin(a)[:, None]

    state, angle = mx.array(x[:, None], mx.float32), mx.array(angles, mx.float32)
    cos_velocity = mx.array((np.cos(angles) * oracles.TWO_MODES.velocity(x, angles))[:, None], mx.float32)
    g = full_tangent(optimum, state, angle, cos_velocity)
    assert float(mx.abs(g).max()) < 1e-3


def test_normalising_each_tangent_of_a_sample_moves_the_optimum_of_training_without_a_teacher() -> None:
    """In one dimension the mean of g is zero there, and the mean of g / (|g| + c) is -0.23."""
    data, angle, state = oracles.TWO_MODES, 1.0, 0.2
    rng = np.random.default_rng(0)
    which = rng.choice(2, 400_000, p=data.weights)
    x0 = rng.normal(np.array(data.means)[which], np.array(data.stds)[which])
    z = (state - math.cos(angle) * x0) / math.sin(angle)
    keep = rng.random(len(z)) < np.exp(-(z**2) / 2)  # pairs of data and noise that meet in this state
    v = mx.array(trigflow.velocity_target(x0, z, angle)[keep][:, None], mx.float32)
    x, a = mx.full(v.shape, state), mx.full(len(v), angle)
    start = mx.array(data.flow_map(np.array([[state]]), angle), mx.float32)

    def optimum(state: mx.array, a: mx.array) -> mx.array:
        return (mx.cos(a)[:, None] * state - newton_flow_map(state, a[:, None], start)) / mx.sin(a)[:, None]

    g = full_tangent(optimum, x, a, mx.cos(a)[:, None] * v)
    noise = float(mx.sqrt(g.square().mean())) / len(v) ** 0.5
    assert abs(g.mean().item()) < 4 * noise
    assert abs(consistency.rescale(g).mean().item()) > 0.05


def student_of_the_mixture(warmup: float, steps: int) -> tuple[float, float, float]:
    """Distil the exact velocity of the mixture from scratch.

    Returns the mean squared distance of one-step samples to the flow map, and the standard deviation of both,
    over noises away from the cliff between the modes.
    """
    weights, means, stds = (mx.array(v) for v in oracles.TWO_MODES.__dict__.values())

    def teacher(x: mx.array, angle: mx.array) -> mx.array:
        c, s = mx.cos(angle)[:, None], mx.sin(angle)[:, None]
        distance, variance = x - c * means, stds**2 * c * c + s * s
        posterior = mx.softmax(mx.log(weights) - mx.log(variance) / 2 - distance**2 / variance / 2, -1)
        each = -s * means + s * c * (1 - stds**2) / variance * distance
        return (posterior * each).sum(-1, keepdims=True)

    mx.random.seed(0)
    layers = [nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU()]
    body = nn.Sequential(*layers, nn.Linear(64, 1))

    def network(x: mx.array, angle: mx.array) -> mx.array:
        return body(mx.concatenate([x, mx.cos(angle)[:, None], mx.sin(angle)[:, None]], 1))

    def loss(x: mx.array, angle: mx.array) -> mx.array:
        cos_velocity = mx.cos(angle)[:, None] * teacher(x, angle)
        value = consistency.value_and_derivative(network, x, angle, cos_velocity)
        g = consistency.rescale(consistency.tangent(value, x, angle, cos_velocity, warmup))
        return consistency.image_losses(value.network, g, mx.zeros_like(angle)).mean()

    both = nn.value_and_grad(body, loss)
    optimizer = optim.Adam(optim.cosine_decay(3e-3, steps), betas=[0.9, 0.99], bias_correction=True)

    rng = np.random.default_rng(0)
    for _ in range(steps):
        which = rng.choice(2, 256, p=oracles.TWO_MODES.weights)
        x0 = rng.normal(np.array(oracles.TWO_MODES.means)[which], np.array(oracles.TWO_MODES.stds)[which])
        angle = np.arctan(np.exp(rng.normal(-0.3, 1.4, 256)))
        x = np.cos(angle) * x0 + np.sin(angle) * rng.normal(size=256)
        _, gradients = both(mx.array(x[:, None], mx.float32), mx.array(angle, mx.float32))
        optimizer.update(body, gradients)
        mx.eval(body.state, optimizer.state)
    z = np.linspace(-2.5, 2.5, 201)
    z = z[np.abs(z + 0.524) > 0.2]
    noise, angle = mx.array(z[:, None], mx.float32), mx.full((len(z),), math.pi / 2)
    found = np.array(trigflow.x0_from_velocity(noise, network(noise, angle), angle[:, None]))[:, 0]
    wanted = oracles.TWO_MODES.flow_map(z, math.pi / 2)
    return float(((found - wanted) ** 2).mean()), float(found.std()), float(wanted.std())


def test_a_student_learns_the_mixtures_quantile_map() -> None:
    error, std, true_std = student_of_the_mixture(warmup=1.0, steps=500)
    assert error < 0.08
    assert std == pytest.approx(true_std, rel=0.1)


def test_a_student_without_the_derivative_stays_at_the_posterior_mean() -> None:
    """The same training with the second term of the tangent switched off: a diffusion model, blurred at one step."""
    error, std, true_std = student_of_the_mixture(warmup=0.0, steps=200)
    assert error > 1
    assert std < 0.6 * true_std


# --- gradients ---


def numpy_rescale(g: np.ndarray, how: str) -> np.ndarray:
    if how == "normalize":
        return g / (np.sqrt((g**2).mean(1, keepdims=True)) + 0.1)
    return np.clip(g, -1, 1) if how == "clip" else g


@pytest.mark.parametrize(
    ("how", "warmup", "compiled"),
    [("normalize", 1.0, True), ("normalize", 0.4, False), ("clip", 1.0, False), ("none", 0.0, False)],
)
def test_gradients_equal_those_worked_out_by_hand(how: str, warmup: float, compiled: bool) -> None:
    rng = np.random.default_rng(1)
    shapes = {"A": (3, 5), "u": 5, "b": 5, "B": (5, 3), "c": 3, "p": (), "q": ()}
    numbers = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    x, velocity = rng.normal(size=(2, 6, 3))
    angle = np.array([0.0, 0.02, 0.4, 1.0, 1.4, math.pi / 2])
    wanted_loss, wanted, wanted_g = oracles.network_gradients(
        numbers, x, angle, velocity, warmup, lambda g: numpy_rescale(g, how)
    )
    if how == "clip":  # the case is worth nothing if clipping changes none of them, or all
        assert 0.1 < (np.abs(wanted_g) == 1).mean() < 0.9

    def loss(p: dict[str, mx.array], x: mx.array, angle: mx.array, cos_velocity: mx.array) -> mx.array:
        def network(x: mx.array, angle: mx.array) -> mx.array:
            return mx.tanh(x @ p["A"] + angle[:, None] * p["u"] + p["b"]) @ p["B"] + p["c"]

        value = consistency.value_and_derivative(network, x, angle, cos_velocity)
        g = consistency.rescale(consistency.tangent(value, x, angle, cos_velocity, warmup), how)
        return consistency.image_losses(value.network, g, p["p"] * angle + p["q"]).mean()

    arrays = [mx.array(v, mx.float32) for v in (x, angle, np.cos(angle)[:, None] * velocity)]
    both = mx.value_and_grad(loss)
    parameters = {name: mx.array(value, mx.float32) for name, value in numbers.items()}
    found_loss, found = (mx.compile(both) if compiled else both)(parameters, *arrays)
    assert found_loss.item() == pytest.approx(wanted_loss, rel=1e-5)
    for name, gradient in wanted.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_the_gradient_of_the_network_is_the_tangent() -> None:
    """-2 e^w g / D, whatever the network's value: F moves along g."""
    network, g = mx.random.normal((2, 4, 3, 5), key=mx.random.key(0))
    log_weight = mx.array([0.0, 1.0, -2.0, 0.3])
    gradient = mx.grad(lambda f: consistency.image_losses(f, g, log_weight).sum())(network)
    wanted = -2 * mx.exp(log_weight)[:, None, None] * g / 15
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_nothing_is_learned_through_the_tangent() -> None:
    """The derivative and g are constants; the value keeps the gradient that the network alone would have."""
    x, v = mx.random.normal((2, 4, 3), key=mx.random.key(0))
    angle, weight = mx.array([0.1, 0.5, 1.0, 1.5]), mx.random.normal((3, 3), key=mx.random.key(1))

    def parts(w: mx.array) -> list[mx.array]:
        value = consistency.value_and_derivative(lambda x, a: mx.tanh(x @ w) * a[:, None], x, angle, v)
        return [value.derivative, consistency.tangent(value, x, angle, v), value.network]

    for i in range(2):
        assert float(mx.abs(mx.grad(lambda w, i=i: parts(w)[i].sum())(weight)).max()) == 0
    plain = mx.grad(lambda w: (mx.tanh(x @ w) * angle[:, None]).sum())(weight)
    np.testing.assert_allclose(mx.grad(lambda w: parts(w)[2].sum())(weight), plain, rtol=1e-5)


# --- boundedness ---


def wobbly(x: mx.array, angle: mx.array) -> mx.array:
    """Some smooth network that is no consistency model: values and derivatives of order one."""
    a = trigflow.per_image(angle, x)
    return mx.sin(1.3 * x + 0.7 * a) + 0.5 * mx.cos(a) * mx.roll(x, 1, -1)


def test_tangent_is_bounded_at_both_ends() -> None:
    x, v = mx.random.normal((2, 2, 8), key=mx.random.key(0))
    angle = mx.array([1e-6, trigflow.NOISE_ANGLE])
    g = full_tangent(wobbly, x, angle, mx.cos(angle)[:, None] * v)
    np.testing.assert_allclose(g[0], v[0] - wobbly(x, angle)[0], atol=1e-4)  # velocity matching at the data
    np.testing.assert_allclose(g[1], np.zeros(8), atol=1e-5)  # no weight at pure noise, and no division by it


def test_a_teacher_that_predicts_noise_is_exact_at_pure_noise() -> None:
    """Its velocity (eps - sin(a) x) / cos(a) is 2e7 times a rounding error there; cos(a) v is not."""
    x, eps = mx.random.normal((2, 3, 8), key=mx.random.key(0))
    angle = mx.array([0.3, 1.5707, trigflow.NOISE_ANGLE])
    cos_velocity = trigflow.cos_velocity_from_eps(x, eps, angle[:, None])
    g = full_tangent(wobbly, x, angle, cos_velocity)
    for i, a in enumerate(angle.tolist()):
        state, cv = (np.array(v[i], np.float64) for v in (x, cos_velocity))

        def move(h: float, a: float = a, state: np.ndarray = state, cv: np.ndarray = cv) -> np.ndarray:
            c, s = math.cos(a), math.sin(a)
            y, b = state + h * s * cv, a + h * s * c
            return np.sin(1.3 * y + 0.7 * b) + 0.5 * math.cos(b) * np.roll(y, 1)

        c, s = math.cos(a), math.sin(a)
        derivative = (move(1e-5) - move(-1e-5)) / 2e-5
        wanted = -c * (c * move(0) - cv) - (c * s * state + derivative)
        np.testing.assert_allclose(g[i], wanted, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(std=st.floats(0.3, 1.6), seed=st.integers(0, 1000))
def test_every_kind_of_teacher_gives_the_same_tangent(std: float, seed: int) -> None:
    """One velocity, told as noise, as data, as itself and as a rectified flow, through TrigFlow's border."""
    x, angle = gaussian_states(0.2, std, [0.1, 0.4, 0.9, 1.3], seed)
    a = angle[:, None]
    v = gaussian_velocity(0.2, std)(x, angle)
    eps = mx.sin(a) * x + mx.cos(a) * v
    x0 = mx.cos(a) * x - mx.sin(a) * v
    flow_state, flow, s = trigflow.trigflow_to_flow(x, v, a)
    from_flow = trigflow.flow_to_trigflow(flow_state, flow, s)[1]
    wanted = np.array(full_tangent(wobbly, x, angle, mx.cos(a) * v))
    for told in (
        trigflow.cos_velocity_from_eps(x, eps, a),
        mx.cos(a) * trigflow.velocity_from_eps(x, eps, a),
        mx.cos(a) * trigflow.velocity_from_x0(x, x0, a),
        mx.cos(a) * from_flow,
    ):
        np.testing.assert_allclose(full_tangent(wobbly, x, angle, told), wanted, atol=2e-5)


# --- what is done to the tangent ---


def test_normalising_gives_every_image_the_same_length_and_keeps_its_direction() -> None:
    g = mx.random.normal((3, 4, 5), key=mx.random.key(0)) * mx.array([100.0, 1.0, 1e-3])[:, None, None]
    found = consistency.rescale(g, "normalize")
    size = np.sqrt((np.array(g) ** 2).mean((1, 2)))
    np.testing.assert_allclose(consistency.rms(found), size / (size + 0.1), rtol=1e-5)
    np.testing.assert_allclose(found[0] / found[0, 0, 0], g[0] / g[0, 0, 0], rtol=1e-4)
    smoother = consistency.rescale(g, "normalize", constant=1.0)
    np.testing.assert_allclose(consistency.rms(smoother), size / (size + 1), rtol=1e-5)


def test_clipping_and_leaving_alone() -> None:
    g = mx.array([[-3.0, -1.0, -0.2], [0.0, 0.7, 40.0]])
    np.testing.assert_allclose(consistency.rescale(g, "clip"), [[-1, -1, -0.2], [0, 0.7, 1]])
    assert consistency.rescale(g, "none").tolist() == g.tolist()
    assert consistency.rescale(g).tolist() == consistency.rescale(g, "normalize").tolist()


def test_an_unknown_treatment_is_refused() -> None:
    with pytest.raises(UserError, match='tangent is "whiten", expected normalize, clip or none'):
        consistency.rescale(mx.zeros((1, 2)), "whiten")


def test_a_zero_tangent_stays_zero() -> None:
    for how in TANGENTS:
        assert not np.array(consistency.rescale(mx.zeros((2, 3)), how)).any()


# --- weight and warm-up ---


def test_the_weight_starts_at_nothing_and_learns_one_over_the_error() -> None:
    """At its optimum e^w times the mean squared error is 1 at every angle (appendix D)."""
    mx.random.seed(0)
    weight = consistency.LossWeight()
    angle = mx.linspace(0, math.pi / 2, 64)
    assert not np.array(weight(angle)).any()
    size = 0.3 + 2 * mx.square(mx.sin(angle))  # root mean square of the tangent at each angle
    g = size[:, None] * mx.array([1.0, -1.0, 1.0, -1.0])
    optimizer = optim.Adam(1e-2)
    both = nn.value_and_grad(
        weight, lambda m: consistency.image_losses(mx.zeros((64, 4)), g, m(angle)).mean()
    )
    for _ in range(400):
        _, gradients = both(weight)
        optimizer.update(weight, gradients)
        mx.eval(weight.parameters(), optimizer.state)
    np.testing.assert_allclose(mx.exp(weight(angle)) * size**2, np.ones(64), atol=0.15)


def test_warmup_rises_evenly_and_stays() -> None:
    assert [tangent_warmup(i, 4) for i in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert tangent_warmup(0, 0) == 1


def test_warmup_scales_the_second_term_alone() -> None:
    x, v = mx.random.normal((2, 3, 8), key=mx.random.key(0))
    angle = mx.array([0.2, 0.8, 1.4])
    cos_velocity = mx.cos(angle)[:, None] * v
    value = consistency.value_and_derivative(wobbly, x, angle, cos_velocity)
    g = [consistency.tangent(value, x, angle, cos_velocity, r) for r in (0.0, 0.25, mx.array(1.0))]
    c = mx.cos(angle)[:, None]
    np.testing.assert_allclose(g[0], -c * c * (wobbly(x, angle) - v), atol=1e-5)
    np.testing.assert_allclose(g[1] - g[0], 0.25 * (g[2] - g[0]), atol=1e-5)


# --- a batch is many images, not one ---


def test_images_of_a_batch_do_not_mix() -> None:
    x, v = mx.random.normal((2, 3, 8), key=mx.random.key(0))
    angle = mx.array([0.2, 0.8, 1.4])
    together = consistency.value_and_derivative(wobbly, x, angle, v)
    for i in range(3):
        alone = consistency.value_and_derivative(wobbly, *(y[i : i + 1] for y in (x, angle, v)))
        np.testing.assert_allclose(together.derivative[i], alone.derivative[0], atol=1e-6)
        np.testing.assert_allclose(together.network[i], alone.network[0], atol=1e-6)
