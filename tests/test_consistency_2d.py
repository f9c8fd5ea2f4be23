"""The two-dimensional example: its teacher is exact, its distance measures, its script runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_transfusion import trigflow

FOLDER = Path(__file__).parent.parent / "examples" / "consistency_2d"


@pytest.fixture(scope="module")
def ring() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        import ring

        return ring
    finally:
        sys.path.remove(str(FOLDER))


def test_the_data_has_the_variance_of_the_noise(ring: ModuleType) -> None:
    x = ring.sample(20_000, 0)
    np.testing.assert_allclose(np.cov(x.T), np.eye(2), atol=0.03)
    assert np.hypot(*x.T).mean() == pytest.approx(ring.RADIUS, abs=0.01)
    assert not np.array_equal(ring.sample(5, 1), ring.sample(5, 2))


@pytest.mark.parametrize("angle", [0.3, 0.9, 1.3])
def test_the_teacher_is_the_mean_velocity_of_samples_that_pass_by(ring: ModuleType, angle: float) -> None:
    """Against importance weights over exact samples: E[v | x] without the formula for mixtures."""
    x0 = ring.sample(40_000, 3).astype(np.float64)
    states = np.array([[0.9, 0.4], [-0.2, 0.7]])
    for state, v in zip(states, np.array(ring.velocity(mx.array(states), mx.full(2, angle))), strict=True):
        z = (state - math.cos(angle) * x0) / math.sin(angle)
        weight = np.exp(-(z**2).sum(1) / 2)
        wanted = (weight[:, None] * trigflow.velocity_target(x0, z, angle)).sum(0) / weight.sum()
        np.testing.assert_allclose(v, wanted, atol=0.05)


def test_the_teacher_is_finite_at_both_ends(ring: ModuleType) -> None:
    x = mx.array([[0.0, 0.0], [3.0, -4.0], [1.4, 0.0]])
    for angle in (0.0, 1e-6, trigflow.NOISE_ANGLE):
        assert np.isfinite(np.array(ring.velocity(x, mx.full(3, angle)))).all()
    np.testing.assert_allclose(ring.velocity(x, mx.full(3, math.pi / 2)), np.zeros((3, 2)), atol=1e-6)


def test_many_steps_of_the_teacher_end_in_the_data_and_two_do_not(ring: ModuleType) -> None:
    exact, z = mx.array(ring.sample(1024, 0)), mx.random.normal((1024, 2), key=mx.random.key(0))
    many = ring.energy_distance(ring.ddim(z, 100)[-1], exact)
    assert abs(many) < 0.01
    assert ring.energy_distance(ring.ddim(z, 2)[-1], exact) > 0.1


def test_energy_distance_equals_its_definition(ring: ModuleType) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 40, 2))
    y += [0.5, -1.0]

    def pairs(p: np.ndarray, q: np.ndarray, same: bool) -> float:
        lengths = [math.dist(a, b) for i, a in enumerate(p) for j, b in enumerate(q) if not same or i != j]
        return sum(lengths) / len(lengths)

    wanted = 2 * pairs(x, y, False) - pairs(x, x, True) - pairs(y, y, True)
    assert ring.energy_distance(mx.array(x), mx.array(y)) == pytest.approx(wanted, rel=1e-4)


def test_the_script_trains_and_writes_its_results_and_figure(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "run.py"), "--quick", "--output", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["experiments"]) == {"sCD", "sCT"}
    for record in results["experiments"].values():
        history = [distance for _, distance in record["energy_distance_by_step"]]
        assert history[-1] < history[0]
        assert 0 < record["tangent"]["max"] < math.inf
    assert abs(results["teacher"]["100"]) < 0.02 < results["teacher"]["2"]
    with Image.open(tmp_path / "consistency_2d.png") as figure:
        assert len(figure.convert("RGB").getcolors(1 << 20)) > 3
