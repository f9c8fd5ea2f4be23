from __future__ import annotations

import itertools
import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.training.config import OptimizerConfig
from mlx_transfusion.training.optimizer import ema_update, make_optimizer, set_learning_rate
from mlx_transfusion.training.schedule import ema_decay, learning_rate_factor


def flat(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


# --- the learning rate ---


def test_end_points_of_the_schedule() -> None:
    config = OptimizerConfig(warmup=100, final_fraction=0.05)
    assert learning_rate_factor(0, 1000, config) == pytest.approx(0.01)
    assert learning_rate_factor(49, 1000, config) == pytest.approx(0.5)
    assert learning_rate_factor(99, 1000, config) == 1
    assert learning_rate_factor(100, 1000, config) == 1
    middle = (100 + 999) / 2
    assert learning_rate_factor(int(middle), 1000, config) == pytest.approx(0.525, abs=2e-3)
    assert learning_rate_factor(999, 1000, config) == pytest.approx(0.05)
    assert learning_rate_factor(5000, 1000, config) == pytest.approx(0.05)


def test_the_papers_schedule() -> None:
    """Section 4.1: 3e-4 after 4,000 steps, 1.5e-5 after 250,000."""
    config = OptimizerConfig()
    assert config.learning_rate * learning_rate_factor(4000, 250_000, config) == pytest.approx(3e-4)
    assert config.learning_rate * learning_rate_factor(249_999, 250_000, config) == pytest.approx(1.5e-5)


@given(st.integers(1, 300), st.integers(0, 400), st.floats(0, 1))
def test_the_schedule_rises_then_falls(steps: int, warmup: int, final: float) -> None:
    config = OptimizerConfig(warmup=warmup, final_fraction=final)
    factors = [learning_rate_factor(n, steps, config) for n in range(steps)]
    top = min(warmup, steps - 1)
    assert all(0 <= f <= 1 + 1e-12 for f in factors)
    assert all(a <= b for a, b in itertools.pairwise(factors[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(factors[top:]))
    if warmup < steps - 1:
        assert factors[-1] == pytest.approx(final)


# --- the optimisers ---


def gradients_of(model: Transfusion, seed: int = 0) -> Any:
    keys = iter(mx.random.split(mx.random.key(seed), 1000))
    return tree_map(lambda w: mx.random.normal(w.shape, key=next(keys)), model.parameters())


def test_the_first_adamw_step_has_the_full_length(tiny_model: Transfusion) -> None:
    """With bias correction the first step is lr in every element; without it, 0.1 / sqrt(0.05) = 0.45 lr."""
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.0)
    optimizer = make_optimizer(config)
    weights = tiny_model.parameters()
    optimizer.init(weights)
    gradients = gradients_of(tiny_model)
    after = flat(optimizer.apply_gradients(gradients, weights))
    before, g = flat(weights), flat(gradients)
    for name, value in after.items():
        step = np.array(value - before[name])
        # the sums of weights and steps round to 1e-7 or so
        np.testing.assert_allclose(step, -0.01 * np.sign(np.array(g[name])), atol=2e-5, err_msg=name)


def test_weight_decay_is_decoupled(tiny_model: Transfusion) -> None:
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01, weight_decay=0.1))
    weights = tiny_model.parameters()
    optimizer.init(weights)
    after = flat(optimizer.apply_gradients(tree_map(mx.zeros_like, weights), weights))
    for name, value in flat(weights).items():
        np.testing.assert_allclose(after[name], value * (1 - 0.01 * 0.1), atol=1e-6)


def test_muon_moves_the_decoders_matrices_and_nothing_else(any_model: Transfusion) -> None:
    config = OptimizerConfig(name="muon", learning_rate=0.0, muon_learning_rate=0.02)
    optimizer = make_optimizer(config)
    weights = any_model.parameters()
    optimizer.init(weights)
    set_learning_rate(optimizer, config, 1.0)
    after = flat(optimizer.apply_gradients(gradients_of(any_model), weights))
    moved = {name for name, value in flat(weights).items() if mx.abs(after[name] - value).max().item() > 0}
    projections = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert moved == {f"layers.{i}.{p}.weight" for i in range(2) for p in projections}
    assert set(after) == set(flat(weights))


def test_muon_steps_are_orthogonal_matrices(tiny_model: Transfusion) -> None:
    """All singular values of the step are alike, whatever those of the gradient (Newton-Schulz is rough)."""
    config = OptimizerConfig(name="muon")
    optimizer = make_optimizer(config)
    weights = tiny_model.parameters()
    optimizer.init(weights)
    set_learning_rate(optimizer, config, 1.0)
    gradients = tree_map(
        lambda g: g * mx.exp(3 * mx.arange(g.shape[-1]) / g.shape[-1]), gradients_of(tiny_model)
    )
    name = "layers.0.self_attn.q_proj.weight"
    step = np.array(flat(optimizer.apply_gradients(gradients, weights))[name] - flat(weights)[name])
    singular = np.linalg.svd(step / 0.02, compute_uv=False)
    assert singular.max() < 1.4
    assert np.median(singular) > 0.6
    given_ = np.linalg.svd(np.array(flat(gradients)[name]), compute_uv=False)
    assert given_[0] / np.median(given_) > 2 * singular[0] / np.median(singular)


def test_learning_rates_of_both_parts_follow_the_factor() -> None:
    config = OptimizerConfig(name="muon", learning_rate=1e-3, muon_learning_rate=0.05)
    optimizer = make_optimizer(config)
    assert isinstance(optimizer, optim.MultiOptimizer)
    set_learning_rate(optimizer, config, 0.5)
    assert [o.learning_rate.item() for o in optimizer.optimizers] == pytest.approx([0.025, 5e-4])
    plain = make_optimizer(OptimizerConfig(learning_rate=1e-3))
    set_learning_rate(plain, OptimizerConfig(learning_rate=1e-3), 0.5)
    assert plain.learning_rate.item() == pytest.approx(5e-4)


# --- the average ---


def test_ema_is_the_weighted_sum_of_the_past() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 3)).astype(np.float32)
    average: Any = {"a": [mx.array(values[0])]}
    for v in values[1:]:
        average = ema_update(average, {"a": [mx.array(v)]}, mx.array(0.8))
    wanted = 0.8**5 * values[0] + sum(0.2 * 0.8 ** (5 - k) * values[k] for k in range(1, 6))
    np.testing.assert_allclose(average["a"][0], wanted, rtol=1e-5, atol=1e-6)


def test_ema_decay_starts_low_and_stays_at_its_limit() -> None:
    assert ema_decay(0, 0.999) == pytest.approx(0.1)
    decays = [ema_decay(n, 0.99) for n in range(2000)]
    assert all(a <= b for a, b in itertools.pairwise(decays))
    assert decays[-1] == 0.99
    assert ema_decay(5, 0.0) == 0
    # What is left of the random first weights: nothing that counts after a tenth of its horizon.
    assert math.prod(decays[:100]) < 1e-6
