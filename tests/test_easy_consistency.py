"""ECT's objective: its mapping, its two points, and what its gradient does, against closed forms."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion import consistency, easy_consistency, trigflow
from mlx_transfusion.errors import UserError
from mlx_transfusion.pace import stage_gap
from mlx_transfusion.training.consistency_config import ConsistencyConfig

MEAN, STD = 0.3, 0.8
"""Data N(MEAN, STD^2) in every dimension."""
ANGLES = st.floats(0.001, math.pi / 2 - 0.01)
FACTORS = st.sampled_from([2.0, 3.0, 4.0, 16.0])
STAGES = st.integers(0, 2)


def velocity(x: mx.array, a: mx.array) -> mx.array:
    """The exact velocity of the Gaussian; a broadcasts against x."""
    cosine, sine = mx.cos(a), mx.sin(a)
    variance = (STD * cosine) ** 2 + sine**2
    return -sine * MEAN + sine * cosine * (1 - STD**2) / variance * (x - cosine * MEAN)


def optimum(x: mx.array, a: mx.array) -> mx.array:
    """The network of its exact consistency function MEAN + STD (x - cos(a) MEAN) / sqrt(variance)."""
    cosine, sine = mx.cos(a), mx.sin(a)
    end = MEAN + STD * (x - cosine * MEAN) / mx.sqrt((STD * cosine) ** 2 + sine**2)
    return (cosine * x - end) / sine


def batch(n: int = 256, width: int = 8, low: float = 0.05, high: float = 1.5) -> tuple[mx.array, mx.array]:
    """States [n, width] of Gaussian data, and their angles [n]."""
    rng = np.random.default_rng(0)
    a = rng.uniform(low, high, n).astype(np.float32)
    x0, z = MEAN + STD * rng.standard_normal((n, width)), rng.standard_normal((n, width))
    return mx.array((np.cos(a)[:, None] * x0 + np.sin(a)[:, None] * z).astype(np.float32)), mx.array(a)


def direction(
    network: consistency.Network, x: mx.array, angle: mx.array, v: mx.array, gap: mx.array
) -> mx.array:
    """d of a network that takes angles [M]."""
    cos_v = mx.cos(angle)[:, None] * v
    point = easy_consistency.earlier(x, angle, cos_v, gap)
    return easy_consistency.tangent(
        network(x, angle), network(point.x, point.angle), x, angle, cos_v, gap, point
    )


# ---- the mapping ----


@settings(deadline=None, max_examples=40)
@given(ANGLES, FACTORS, STAGES)
def test_mapping_is_that_of_the_paper(angle: float, factor: float, stage: int) -> None:
    """r/t = 1 - (1 + 8 sigmoid(-t)) / q^(stage + 1), at least 0, for the paper's t = tan(a) / 2 (data of std 0.5)."""
    t = 0.5 * math.tan(angle)
    ratio = max(0.0, 1 - (1 + 8 / (1 + math.exp(t))) / factor ** (stage + 1))
    a = mx.array([angle])
    gap = easy_consistency.relative_gap(a, factor ** -(stage + 1.0))
    point = easy_consistency.earlier(mx.zeros((1, 1)), a, mx.zeros((1, 1)), gap)
    assert abs(point.angle.item() - math.atan(ratio * math.tan(angle))) < 2e-6


@settings(deadline=None, max_examples=40)
@given(ANGLES, FACTORS, STAGES)
def test_the_second_point_is_earlier_and_comes_closer_by_stage(
    angle: float, factor: float, stage: int
) -> None:
    a, nothing = mx.array([angle]), mx.zeros((1, 1))
    at = [
        easy_consistency.earlier(
            nothing, a, nothing, easy_consistency.relative_gap(a, factor ** -(s + 1.0))
        ).angle.item()
        for s in (stage, stage + 1)
    ]
    assert 0 <= at[0] <= at[1] < angle
    assert at[0] < at[1] or at[1] == 0  # both cut off at the data


def test_gap_is_full_at_small_angles_first_and_ends_well_defined() -> None:
    a = mx.array([0.0, 1e-6, 1.0, 1.57, math.pi / 2])
    gap = np.array(easy_consistency.relative_gap(a, 0.5))
    assert gap.tolist() == [1, 1, 1, 0.5, 0.5]  # a negative cos(pi/2) would give 1 at the end
    assert np.isclose(np.array(easy_consistency.relative_gap(a, 1 / 256))[0], 5 / 256)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 500), st.integers(1, 12), FACTORS)
def test_stages_are_even_parts_of_the_run(steps: int, stages: int, factor: float) -> None:
    gaps = [stage_gap(n, steps, stages, factor) for n in range(steps)]
    assert gaps[0] == 1 / factor
    assert gaps == sorted(gaps, reverse=True)
    if steps >= stages:
        assert gaps[-1] == factor**-stages
        assert len(set(gaps)) == stages
        lengths = [gaps.count(g) for g in set(gaps)]
        assert max(lengths) - min(lengths) <= 1


# ---- the two points ----


@settings(deadline=None, max_examples=40)
@given(ANGLES, FACTORS, STAGES, st.integers(0, 10))
def test_on_a_sample_the_earlier_point_has_the_same_data_and_noise(
    angle: float, factor: float, stage: int, seed: int
) -> None:
    x0, z = (mx.array(v) for v in np.random.default_rng(seed).standard_normal((2, 1, 6)).astype(np.float32))
    a = mx.array([angle])
    cos_v = mx.cos(a) * trigflow.velocity_target(x0, z, a)
    point = easy_consistency.earlier(
        trigflow.mix(x0, z, a), a, cos_v, easy_consistency.relative_gap(a, factor ** -(stage + 1.0))
    )
    assert mx.abs(point.x - trigflow.mix(x0, z, point.angle)).max().item() < 2e-6
    assert abs(mx.cos(a).item() * point.scale.item() - mx.cos(point.angle).item()) < 2e-6


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([0.0, 1e-7, 1e-3, 1.5, 1.5699, math.pi / 2]), FACTORS, STAGES)
def test_everything_is_bounded_at_both_ends(angle: float, factor: float, stage: int) -> None:
    """States, outputs and cos(a) v of size 1 give terms below 1/0.2 beside the difference quotient of F."""
    rng = np.random.default_rng(0)
    x, here, there, cos_v = (mx.array(rng.choice([-1.0, 1.0], (1, 32)).astype(np.float32)) for _ in range(4))
    a = mx.array([angle])
    gap = easy_consistency.relative_gap(a, factor ** -(stage + 1.0))
    point = easy_consistency.earlier(x, a, cos_v, gap)
    d = easy_consistency.tangent(here, there, x, a, cos_v, gap, point)
    assert mx.abs(point.x).max().item() < 6
    assert 1 / point.scale.item() > 0.2
    assert mx.abs(d).max().item() < 6 + 2 / gap.item()
    same = easy_consistency.tangent(here, here, x, a, cos_v, gap, point)
    assert mx.abs(same).max().item() < 7
    assert mx.abs(easy_consistency.rescale(d)).max().item() <= math.sqrt(32)


def test_at_pure_noise_both_points_are_one() -> None:
    x, cos_v = mx.ones((1, 3)), mx.zeros((1, 3))
    a = mx.array([math.pi / 2])
    gap = easy_consistency.relative_gap(a, 0.25)
    point = easy_consistency.earlier(x, a, cos_v, gap)
    assert point.angle.item() == a.item()
    assert mx.array_equal(point.x, x)
    assert mx.abs(easy_consistency.tangent(x, x, x, a, cos_v, gap, point)).max().item() < 1e-6


def test_formula_is_the_difference_of_consistency_functions() -> None:
    """d gap sin(a) = f(x, a) - f(x', b), for any numbers in the place of F."""
    x, angle = batch(64)
    v = velocity(x, angle[:, None])
    here, there = mx.sin(3 * x), mx.cos(2 * x)
    gap = easy_consistency.relative_gap(angle, 0.125)
    cos_v = mx.cos(angle)[:, None] * v
    point = easy_consistency.earlier(x, angle, cos_v, gap)
    d = easy_consistency.tangent(here, there, x, angle, cos_v, gap, point)
    a, b = angle[:, None], point.angle[:, None]
    difference = trigflow.x0_from_velocity(x, here, a) - trigflow.x0_from_velocity(point.x, there, b)
    assert mx.abs(point.x - trigflow.rotate(x, v, a, b)).max().item() < 5e-6
    assert mx.abs(d * (gap[:, None] * mx.sin(a)) - difference).max().item() < 5e-6


# ---- the optimum ----


@pytest.mark.parametrize("at_noise", [0.5, 0.25, 1 / 64])
def test_loss_is_zero_at_the_exact_function_of_a_single_picture(at_noise: float) -> None:
    """All data are MEAN: every sample lies on a trajectory of its own, so the two points are exact at any gap."""
    rng = np.random.default_rng(1)
    angle = mx.array(rng.uniform(0.1, 1.55, 64).astype(np.float32))
    z, a = mx.array(rng.standard_normal((64, 8)).astype(np.float32)), angle[:, None]
    x, v = trigflow.mix(MEAN, z, a), trigflow.velocity_target(MEAN, z, a)

    def network(x: mx.array, angle: mx.array) -> mx.array:
        sine = mx.maximum(mx.sin(angle), 1e-6)[:, None]  # f is x itself at angle 0, whatever F is
        return (mx.cos(angle)[:, None] * x - MEAN) / sine

    gap = easy_consistency.relative_gap(angle, at_noise)
    d = direction(network, x, angle, v, gap)
    assert mx.abs(d * gap[:, None]).max().item() < 2e-5
    losses = consistency.image_losses(network(x, angle), easy_consistency.rescale(d), mx.zeros((64,)))
    assert losses.max().item() < 1e-5
    wrong = direction(lambda x, angle: network(x, angle) + 0.1 * mx.sin(angle)[:, None], x, angle, v, gap)
    assert easy_consistency.rescale(wrong).square().mean().item() > 0.01


def test_at_the_exact_function_of_a_gaussian_the_rest_vanishes_with_the_gap() -> None:
    """One rotation along the velocity is a first-order step, so |d| falls in proportion to the gap."""
    x, angle = batch()
    rest = []
    for at_noise in (1 / 16, 1 / 32, 1 / 64):
        gap = easy_consistency.relative_gap(angle, at_noise)
        d = direction(lambda x, a: optimum(x, a[:, None]), x, angle, velocity(x, angle[:, None]), gap)
        rest.append(consistency.rms(d).max().item())
    assert rest[0] < 0.3
    assert rest[1] < 0.55 * rest[0]
    assert rest[2] < 0.55 * rest[1]


@pytest.mark.parametrize("at_noise", [1 / 16, 1 / 128])
def test_the_network_moves_towards_the_exact_function(at_noise: float) -> None:
    """Off by an error at `angle` alone, d points back: d = -error/gap."""
    x, angle = batch()
    error = 0.2 * mx.sin(5 * x)
    gap = easy_consistency.relative_gap(angle, at_noise)
    cos_v = mx.cos(angle)[:, None] * velocity(x, angle[:, None])
    point = easy_consistency.earlier(x, angle, cos_v, gap)
    there = optimum(point.x, point.angle[:, None])
    d = easy_consistency.tangent(optimum(x, angle[:, None]) + error, there, x, angle, cos_v, gap, point)
    assert consistency.rms(gap[:, None] * d + error).max().item() < 0.5 * at_noise
    # and the loss's gradient with respect to F is along -d
    gradient = mx.grad(
        lambda f: consistency.image_losses(f, easy_consistency.rescale(d), mx.zeros(256)).sum()
    )(x)
    assert ((gradient * error).sum(1) > 0).all().item()


def test_gradient_is_that_of_the_weighted_pseudo_huber_loss() -> None:
    """2/sin(a) (sqrt(mean D^2 + C^2) - C), C = c gap sin(a), differentiated with f(x', b) held fixed."""
    x, angle = batch(32)
    v, c = velocity(x, angle[:, None]), 0.05
    gap = easy_consistency.relative_gap(angle, 1 / 8)
    cos_v, a = mx.cos(angle)[:, None] * v, angle[:, None]
    point = easy_consistency.earlier(x, angle, cos_v, gap)
    there, here = mx.cos(point.x), mx.sin(2 * x)
    end = trigflow.x0_from_velocity(point.x, there, point.angle[:, None])

    def paper(f: mx.array) -> mx.array:
        square = (trigflow.x0_from_velocity(x, f, a) - end).square().mean(1)
        constant = c * gap * mx.sin(angle)
        return (2 / mx.sin(angle) * (mx.sqrt(square + constant**2) - constant)).sum()

    def ours(f: mx.array) -> mx.array:
        d = easy_consistency.tangent(f, there, x, angle, cos_v, gap, point)
        return consistency.image_losses(f, easy_consistency.rescale(d, constant=c), mx.zeros((32,))).sum()

    wanted, got = mx.grad(paper)(here), mx.grad(ours)(here)
    assert mx.abs(got - wanted).max().item() < 1e-4 * mx.abs(wanted).max().item()


class Small(nn.Module):
    """A smooth network of a state and its angle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width + 2, 32), nn.Linear(32, width)

    def __call__(self, x: mx.array, angle: mx.array) -> mx.array:
        when = mx.stack([mx.cos(angle), mx.sin(angle)], 1)
        return self.fc2(mx.tanh(self.fc1(mx.concatenate([x, when], 1))))


def test_it_tends_to_the_tangent_of_scm() -> None:
    mx.random.seed(0)
    network = Small(8)
    x, angle = batch()
    v = velocity(x, angle[:, None])
    cos_v = mx.cos(angle)[:, None] * v
    g = consistency.tangent(consistency.value_and_derivative(network, x, angle, cos_v), x, angle, cos_v)
    off = []
    for at_noise in (1 / 64, 1 / 128, 1 / 256):
        d = direction(network, x, angle, v, easy_consistency.relative_gap(angle, at_noise))
        off.append((mx.linalg.norm(d - g) / mx.linalg.norm(g)).item())
    assert off[0] < 0.1
    assert off[1] < 0.6 * off[0]
    assert off[2] < 0.6 * off[1]


class Linear(nn.Module):
    """F = p(a) x + q(a) with polynomials p and q: it can nearly express the Gaussian's optimum."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = mx.zeros((6,)), mx.zeros((6,))

    def __call__(self, x: mx.array, angle: mx.array) -> mx.array:
        powers = (angle[:, None] - 0.8) ** mx.arange(6)
        return (powers @ self.p)[:, None] * x + (powers @ self.q)[:, None]


@pytest.mark.parametrize("teacher", [True, False], ids=["distillation", "tuning"])
def test_training_finds_the_exact_function(teacher: bool) -> None:
    """From nothing, through all stages; one step then paints the Gaussian, which its mean velocity does not."""
    model, steps, width = Linear(), 600, 64
    optimizer = optim.Adam(optim.cosine_decay(0.03, 600))
    rng = np.random.default_rng(3)

    def loss(x: mx.array, angle: mx.array, cos_v: mx.array, pace: mx.array) -> mx.array:
        gap = easy_consistency.relative_gap(angle, pace)
        point = easy_consistency.earlier(x, angle, cos_v, gap)
        here, there = model(x, angle), mx.stop_gradient(model(point.x, point.angle))
        d = easy_consistency.tangent(here, there, x, angle, cos_v, gap, point)
        return consistency.image_losses(here, easy_consistency.rescale(d), mx.zeros_like(angle)).mean()

    def step(x0: mx.array, z: mx.array, angle: mx.array, pace: mx.array) -> None:
        a = angle[:, None]
        x = trigflow.mix(x0, z, a)
        v = velocity(x, a) if teacher else trigflow.velocity_target(x0, z, a)
        _, gradients = nn.value_and_grad(model, loss)(x, angle, mx.cos(a) * v, pace)
        optimizer.update(model, gradients)

    state = [model.state, optimizer.state]
    compiled = mx.compile(step, inputs=state, outputs=state)
    for n in range(steps):
        z, data = (mx.array(rng.standard_normal((64, width)).astype(np.float32)) for _ in range(2))
        angle = mx.array(rng.uniform(0.02, math.pi / 2, 64).astype(np.float32))
        pace = mx.array(stage_gap(n, steps, 8, 2.0))
        compiled(MEAN + STD * data, z, angle, pace)
        mx.eval(state)
    noise = mx.array(rng.standard_normal((64, width)).astype(np.float32))
    made = trigflow.x0_from_velocity(noise, model(noise, mx.full((64,), math.pi / 2)), math.pi / 2)
    error = (made - (MEAN + STD * noise)).square().mean().item()
    assert error < 0.01, error  # the posterior mean that training starts towards has 0.64


# ---- options ----


def test_options_of_the_loss() -> None:
    d = mx.array([[3.0, -4.0], [0.0, 0.0]])
    length = math.sqrt(12.5 + 0.1**2)
    assert np.allclose(easy_consistency.rescale(d), [[3 / length, -4 / length], [0, 0]])
    assert easy_consistency.rescale(d, "clip").tolist() == [[1, -1], [0, 0]]
    assert easy_consistency.rescale(d, "none").tolist() == d.tolist()
    with pytest.raises(UserError, match='tangent is "huber", expected normalize, clip or none'):
        easy_consistency.rescale(d, "huber")


def test_gaps_below_single_precision_are_refused() -> None:
    assert ConsistencyConfig(method="ect", gap_factor=4.0, gap_stages=6).gap_stages == 6
    with pytest.raises(
        UserError, match=r"gap_factor 256\.0 to the power of gap_stages 8 is .*, expected at most"
    ):
        ConsistencyConfig(method="ect", gap_factor=256.0)
