"""The consistency objective on a real, tiny Transfusion: a picture behind a prefix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from full_forward import random_images
from mlx.utils import tree_flatten

from mlx_transfusion import consistency, sequence, trigflow
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.sequence import Image, Text

PREFIXES = [[1, 40, 41, 4], [1, 4], [1, 50, 4]]
"""Of different lengths, so that rows are padded and turned by RoPE at different places."""
IDS = mx.array([[*row, *[0] * (4 - len(row))] for row in PREFIXES])
LENGTHS = mx.array([len(row) for row in PREFIXES])
VARIANTS = {
    "plain": {},
    "bundled": {"qk_norm": True, "patch_skip": True, "hidden_act": "relu", "patch_positions": "learned"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(
    request: pytest.FixtureRequest, tiny_config: ModelConfig, make_model: Callable[..., Transfusion]
) -> Transfusion:
    """Weights small enough that the network bends on the scale of its inputs, as a trained one does."""
    return make_model(dataclasses.replace(tiny_config, **VARIANTS[request.param]), scale=0.12)


def states(model: Transfusion) -> tuple[mx.array, mx.array, mx.array]:
    """Noisy pictures x [3, N, P], angles [3] and velocities [3, N, P]."""
    x, angle = random_images(model, 3)
    v, _ = random_images(model, 3, seed=1)
    return mx.array(x), mx.array(angle), mx.array(v)


def network_of(model: Transfusion) -> Callable[[mx.array, mx.array], mx.array]:
    _, prefix = model.read_prefix(IDS)
    return lambda x, angle: model.paint(x, angle, prefix, LENGTHS)


def derivative(model: Transfusion) -> mx.array:
    """dF/da of `states`, with the factor cos(a) sin(a) of the objective taken out again."""
    x, angle, v = states(model)
    cos_velocity = mx.cos(angle)[:, None, None] * v
    value = consistency.value_and_derivative(network_of(model), x, angle, cos_velocity)
    return value.derivative / (mx.cos(angle) * mx.sin(angle))[:, None, None]


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_derivative_equals_central_differences_along_the_trajectory(model: Transfusion) -> None:
    """x(a +- h) = cos(h) x +- sin(h) v. In float32 h = 5e-3 balances rounding against curvature.

    Differences step over a kink of ReLU now and then, a derivative never does.
    """
    x, angle, v = states(model)
    network, h = network_of(model), 5e-3
    tolerance = 1e-2 if model.config.hidden_act == "relu" else 1e-3
    ahead, behind = (network(math.cos(s) * x + math.sin(s) * v, angle + s) for s in (h, -h))
    assert relative(np.array(derivative(model)), np.array((ahead - behind) / (2 * h))) < tolerance


def test_derivative_equals_torchs_forward_mode(model: Transfusion) -> None:
    """torch.func.jvp in float64 over the WHOLE sequence, so the prefix's derivative is not assumed to be zero."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import torch_reference as reference

    c = model.config
    weights = {k: torch.tensor(np.array(w)).double() for k, w in tree_flatten(model.parameters())}
    found = np.array(derivative(model))
    for i, (x, angle, v) in enumerate(zip(*(np.array(s) for s in states(model)), strict=True)):
        packed = sequence.pack([[Text(tuple(PREFIXES[i])), Image(0, c.patches_per_image)]], 16)
        names = ("ids", "image", "document", "position", "patch_row")
        batch = {name: torch.tensor(getattr(packed, name)).long() for name in names}

        def predict(x: object, angle: object, batch: dict = batch) -> object:
            return reference.forward(weights, c, batch, x, angle)[1]

        primals, tangents = ((x[None], angle[None]), (v[None], np.ones(1)))
        _, wanted = torch.func.jvp(
            predict, *(tuple(torch.tensor(y).double() for y in pair) for pair in (primals, tangents))
        )
        assert relative(found[i], wanted.numpy()[0]) < 1e-5


def test_value_equals_the_models_velocity_after_a_prefilled_cache(model: Transfusion) -> None:
    x, angle, v = states(model)
    value = consistency.value_and_derivative(network_of(model), x, angle, v)
    _, cache = model.prefill(np.array(IDS), np.array(LENGTHS))
    np.testing.assert_allclose(value.network, model.velocity(x, angle, cache), atol=1e-5)


def test_pictures_of_a_batch_do_not_mix_their_tangents(model: Transfusion) -> None:
    x, angle, v = states(model)
    together = consistency.value_and_derivative(network_of(model), x, angle, v)
    still = mx.concatenate([mx.zeros_like(v[:1]), v[1:]])
    other = consistency.value_and_derivative(network_of(model), x, angle, still)
    np.testing.assert_array_equal(together.derivative[1:], other.derivative[1:])
    assert float(mx.abs(together.derivative[0] - other.derivative[0]).max()) > 1e-3


def gradients(model: Transfusion, checkpointing: bool) -> dict[str, np.ndarray]:
    """Gradients of the consistency loss plus a text loss on the prefix, as in training."""
    x, angle, v = states(model)
    cos_velocity = mx.cos(angle)[:, None, None] * v

    def loss(m: Transfusion) -> mx.array:
        hidden, prefix = m.read_prefix(IDS)
        text = nn.losses.cross_entropy(m.lm_head(hidden[:, :-1]), IDS[:, 1:]).mean()
        value = consistency.value_and_derivative(
            lambda x, a: m.paint(x, a, prefix, LENGTHS), x, angle, cos_velocity
        )
        g = consistency.rescale(consistency.tangent(value, x, angle, cos_velocity))
        return consistency.image_losses(value.network, g, mx.zeros_like(angle)).mean() + 0.1 * text

    model.gradient_checkpointing = checkpointing
    try:
        _, found = nn.value_and_grad(model, loss)(model)
        return {name: np.array(g) for name, g in tree_flatten(found)}
    finally:
        model.gradient_checkpointing = False


def test_gradient_checkpointing_changes_no_gradient(model: Transfusion) -> None:
    """A derivative that is differentiated would silently be zero under checkpointing (so it is a constant)."""
    plain, recomputed = gradients(model, False), gradients(model, True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        np.testing.assert_allclose(recomputed[name], gradient, atol=1e-6, rtol=1e-5, err_msg=name)


def test_every_weight_learns_from_the_picture_or_the_text(model: Transfusion) -> None:
    """The prefix is constant for the tangent but not for the gradient: captions still learn from pictures."""
    x, angle, v = states(model)

    def image_loss(m: Transfusion) -> mx.array:
        _, prefix = m.read_prefix(IDS)
        value = consistency.value_and_derivative(lambda x, a: m.paint(x, a, prefix, LENGTHS), x, angle, v)
        g = consistency.tangent(value, x, angle, v)
        return consistency.image_losses(value.network, g, mx.zeros_like(angle)).mean()

    _, found = nn.value_and_grad(model, image_loss)(model)
    silent = [name for name, g in tree_flatten(found) if not np.array(g).any()]
    assert silent == ["lm_head.weight"]
    embedding = np.abs(np.array(found["embed_tokens"]["weight"])).max(1) > 0
    assert np.flatnonzero(embedding).tolist() == [1, 4, 40, 41, 50]  # the prefixes' tokens, never the padding


def test_the_step_of_a_consistency_function_ends_at_the_data(model: Transfusion) -> None:
    """f(x, 0) = x for any weights: the boundary condition is built in."""
    x, _, _ = states(model)
    zero = mx.zeros((3,))
    np.testing.assert_array_equal(trigflow.x0_from_velocity(x, network_of(model)(x, zero), 0.0), x)
