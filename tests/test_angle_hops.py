"""Hops of a fixed angle: where they land, and what the network is told there, against closed forms."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion import angle_hops, consistency, trigflow
from mlx_transfusion.errors import UserError
from mlx_transfusion.training.consistency_config import ConsistencyConfig
from mlx_transfusion.training.tangents import ContinuousTime, method_of
from tests.test_easy_consistency import batch, optimum, velocity


def arrays(seed: int, count: int, shape: tuple[int, ...]) -> list[mx.array]:
    return [
        mx.array(a) for a in np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)
    ]


def exact(x: mx.array, angle: mx.array) -> mx.array:
    """cos(a) v of the Gaussian of test_easy_consistency."""
    a = angle[:, None]
    return mx.cos(a) * velocity(x, a)


@settings(deadline=None, max_examples=40)
@given(st.floats(0.0, math.pi / 2 - 1e-3), st.floats(0.01, math.pi / 2), st.integers(0, 10))
def test_with_fixed_data_and_noise_a_hop_of_any_length_is_exact(angle: float, by: float, seed: int) -> None:
    x0, z = arrays(seed, 2, (1, 6))

    def sample(x: mx.array, angle: mx.array) -> mx.array:
        return mx.cos(angle) * trigflow.velocity_target(x0, z, angle)

    a = mx.array([angle])
    to = angle_hops.hop(trigflow.mix(x0, z, a), a, sample(x0, a), sample, by)
    assert abs(to.angle.item() - max(0.0, angle - by)) < 1e-6
    tolerance = 4e-6 + 4e-7 / math.cos(angle)  # cos(a) v is divided by cos(a)
    assert mx.abs(to.x - trigflow.mix(x0, z, to.angle)).max().item() < tolerance


@settings(deadline=None, max_examples=40)
@given(st.floats(0.05, math.pi / 2), st.floats(0.01, 1.0), st.integers(0, 10))
def test_with_d_added_both_ends_agree(angle: float, by: float, seed: int) -> None:
    x, here, there = arrays(seed, 3, (1, 6))
    a = mx.array([angle])
    to = angle_hops.hop(x, a, exact(x, a), exact, by)
    d = angle_hops.tangent(here, there, x, a, to)
    f_here = trigflow.x0_from_velocity(x, here + d, a)
    f_there = trigflow.x0_from_velocity(to.x, there, to.angle)
    assert mx.abs(f_here - f_there).max().item() < 1e-5


def test_at_the_exact_function_the_rest_is_of_third_order() -> None:
    x, angle = batch(low=0.9, high=1.55)
    rest = []
    for by in (0.4, 0.2, 0.1):
        to = angle_hops.hop(x, angle, exact(x, angle), exact, by)
        here, there = optimum(x, angle[:, None]), optimum(to.x, to.angle[:, None])
        rest.append(mx.abs(angle_hops.tangent(here, there, x, angle, to)).max().item())
    assert rest[0] > 6 * rest[1] > 6**2 * rest[2] > 0


@pytest.mark.parametrize("angle", [0.0, 1e-7, math.pi / 2])
def test_the_ends_are_finite(angle: float) -> None:
    x, here, there = arrays(0, 3, (1, 6))
    a = mx.array([angle])
    d = angle_hops.tangent(here, there, x, a, angle_hops.hop(x, a, exact(x, a), exact, 0.3))
    assert mx.abs(d).max().item() < 10
    if angle < 1:
        assert mx.abs(d).max().item() == 0  # f is x itself there


def test_below_the_angle_it_is_scm_and_above_it_the_hop() -> None:
    x, angle = batch(32)
    a = angle[:, None]

    def network(x: mx.array, angle: mx.array) -> mx.array:
        return mx.sin(2 * x) * mx.cos(angle)[:, None]

    plain = ConsistencyConfig(method="scm_hops", teacher="t", tangent="none", hops_above=0.9, hop=0.4)
    method = method_of(plain, 10)
    at = method.states(x, angle, exact(x, angle), exact)
    mixed = method.tangent(network, at, mx.array(1.0))
    scm = ContinuousTime(plain).tangent(network, at, mx.array(1.0))
    to = angle_hops.hop(x, angle, exact(x, angle), exact, 0.4)
    d = angle_hops.tangent(network(x, angle), network(to.x, to.angle), x, angle, to)
    wanted = mx.where(a < 0.9, scm.rescaled, d)
    assert 0 < (angle < 0.9).sum().item() < 32
    assert mx.array_equal(mixed.rescaled, wanted)
    assert mx.array_equal(mixed.network, scm.network)
    capped = method_of(ConsistencyConfig(method="scm_hops", teacher="t"), 10).tangent(
        network, at, mx.array(1.0)
    )
    assert consistency.rms(capped.rescaled).max().item() <= 1


def test_without_a_teacher_there_is_nothing_to_hop_along() -> None:
    with pytest.raises(UserError, match=r"scm_hops.*name a teacher"):
        ConsistencyConfig(method="scm_hops")


def test_below_the_anchor_the_velocity_is_all_that_is_learned() -> None:
    x, angle = batch(64)
    config = ConsistencyConfig(tangent="none", anchor_below=0.6)
    method = method_of(config, 10)

    def network(x: mx.array, angle: mx.array) -> mx.array:
        return mx.sin(2 * x) * mx.cos(angle)[:, None]

    at = method.states(x, angle, exact(x, angle), exact)
    found = method.tangent(network, at, mx.array(1.0)).raw
    whole = method_of(ConsistencyConfig(tangent="none"), 10).tangent(network, at, mx.array(1.0)).raw
    cosine = mx.cos(angle)[:, None]
    drift = cosine * (cosine * network(x, angle) - exact(x, angle))
    low = angle[:, None] < 0.6
    assert 0 < low.sum().item() < 64
    assert mx.allclose(found, mx.where(low, -drift, whole), atol=1e-6)
