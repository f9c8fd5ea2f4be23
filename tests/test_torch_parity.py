"""The MLX model, its losses, gradients and optimiser against an independent PyTorch implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")

import torch_reference as reference  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

from mlx_transfusion import sequence, trigflow  # noqa: E402
from mlx_transfusion.config import ModelConfig  # noqa: E402
from mlx_transfusion.models.patches import patchify  # noqa: E402
from mlx_transfusion.models.transfusion import Transfusion  # noqa: E402
from mlx_transfusion.sequence import Image, PackedBatch, Segment, Text  # noqa: E402
from mlx_transfusion.training.config import DataConfig, OptimizerConfig, SourceConfig, TrainConfig  # noqa: E402
from mlx_transfusion.training.data import Batch  # noqa: E402
from mlx_transfusion.training.optimizer import make_optimizer  # noqa: E402
from mlx_transfusion.training.step import Step, evaluate_batch  # noqa: E402

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"prediction": "epsilon"},
    "velocity": {"prediction": "velocity", "patch_skip": True, "hidden_act": "relu"},
    "grouped": {"num_key_value_heads": 2, "qk_norm": True, "patch_positions": "learned"},
}


@pytest.fixture(params=VARIANTS)
def model(
    request: pytest.FixtureRequest, tiny_config: ModelConfig, make_model: Callable[..., Any]
) -> Transfusion:
    return make_model(dataclasses.replace(tiny_config, **VARIANTS[request.param]))


def make_batch(model: Transfusion) -> Batch:
    """Four documents with four pictures in two rows, padding included."""
    c = model.config
    n = c.patches_per_image
    bodies: list[list[Segment]] = [
        [Text((40, 41)), Image(0, n), Text((42, 43, 44)), Image(1, n), Text((45,))],
        [Image(2, n), Text((50, 51))],
        [Text((60, 61, 62))],
        [Text((70,)), Image(3, n)],
    ]
    packed = sequence.pack([sequence.document(b, c) for b in bodies], 32, text_multiple=16)
    rng = np.random.default_rng(0)
    shape = (4, c.image_height, c.image_width, 3)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    noise = rng.normal(size=shape).astype(np.float32)
    return Batch(packed, pixels, noise, rng.uniform(0.1, 1.4, 4).astype(np.float32))


def to_torch(packed: PackedBatch) -> dict[str, Any]:
    names = ("ids", "image", "document", "position", "patch_row")
    return {name: torch.tensor(getattr(packed, name)).long() for name in names}


def run_reference(model: Transfusion, batch: Batch, gradients: bool = False) -> dict[str, Any]:
    c = model.config
    w = {k: torch.tensor(np.array(v), requires_grad=gradients) for k, v in tree_flatten(model.parameters())}
    arrays = to_torch(batch.packed)
    x0 = torch.tensor(np.array(model.encode(mx.array(batch.pixels).astype(mx.float32) / 255)))
    noise = torch.tensor(np.array(patchify(mx.array(batch.noise), c.patch_size)))
    angle = torch.tensor(batch.angle)
    a = angle[:, None, None]
    x = a.cos() * x0 + a.sin() * noise
    logits, prediction = reference.forward(w, c, arrays, x, angle)
    text, image = reference.losses(logits, prediction, arrays, x0, noise, angle, c.prediction)
    if gradients:
        (text + 5 * image).backward()
    return {"w": w, "x": x, "logits": logits, "prediction": prediction, "text": text, "image": image}


def train_config(**changes: Any) -> TrainConfig:
    return TrainConfig("", "", DataConfig((SourceConfig(""),)), {}, **changes)


def test_logits_velocity_and_losses(model: Transfusion) -> None:
    batch = make_batch(model)
    wanted = run_reference(model, batch)
    from full_forward import train_arrays

    arrays = train_arrays(batch.packed, wanted["x"].numpy(), batch.angle)
    logits, prediction = model(arrays)
    real = (batch.packed.modality != sequence.PAD).reshape(-1)
    np.testing.assert_allclose(
        np.array(logits)[real], wanted["logits"].flatten(0, 1).numpy()[real], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(prediction, wanted["prediction"].numpy(), rtol=1e-5, atol=1e-5)
    text, tokens, image, images = evaluate_batch(model, batch)
    assert text / tokens == pytest.approx(wanted["text"].item(), rel=1e-6)
    assert image / images == pytest.approx(wanted["image"].item(), rel=1e-6)


def test_velocity_behind_a_cache(model: Transfusion) -> None:
    c = model.config
    ids = [1, 40, 41, 4]
    packed = sequence.pack([[Text(tuple(ids)), Image(0, c.patches_per_image)]], 8)
    x = np.random.default_rng(1).normal(size=(1, c.patches_per_image, c.patch_dim)).astype(np.float32)
    angle = np.array([0.8], np.float32)
    w = {k: torch.tensor(np.array(v)) for k, v in tree_flatten(model.parameters())}
    _, raw = reference.forward(w, c, to_torch(packed), torch.tensor(x), torch.tensor(angle))
    wanted = raw.numpy()
    if c.prediction == "epsilon":
        wanted = trigflow.velocity_from_eps(x, wanted, 0.8)
    _, cache = model.prefill(np.array([ids]), np.array([4]))
    np.testing.assert_allclose(
        model.velocity(mx.array(x), mx.array(angle), cache), wanted, rtol=1e-5, atol=1e-5
    )


def test_gradients(model: Transfusion) -> None:
    batch = make_batch(model)
    wanted = run_reference(model, batch, gradients=True)
    step = Step(model, make_optimizer(OptimizerConfig()), train_config(compile=False))
    gradients, sums = step.gradients(model.parameters(), batch, batch.text_targets, len(batch.angle), 0)
    assert sums[0].item() / batch.text_targets == pytest.approx(wanted["text"].item(), rel=1e-6)
    flat = dict(tree_flatten(gradients))
    assert flat.keys() == wanted["w"].keys()
    for name, value in flat.items():
        g = wanted["w"][name].grad.numpy()
        error = np.linalg.norm(np.array(value) - g) / np.linalg.norm(g)
        assert error < 1e-4, name


@pytest.mark.parametrize("compiled", [False, True])
def test_ten_steps_of_adamw(tiny_config: ModelConfig, make_model: Callable[..., Any], compiled: bool) -> None:
    """Clipping, bias correction, decoupled weight decay and a changing learning rate, from equal gradients."""
    model = make_model(tiny_config)
    config = train_config(
        compile=compiled, optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip=1.0)
    )
    optimizer = make_optimizer(config.optimizer)
    weights = model.parameters()
    optimizer.init(weights)
    step = Step(model, optimizer, config)
    start = {k: np.array(v) for k, v in tree_flatten(weights)}
    theirs = {k: torch.tensor(v, requires_grad=True) for k, v in start.items()}
    adamw = torch.optim.AdamW(theirs.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    rng = np.random.default_rng(0)
    ema = weights
    for n in range(10):
        gradients = {
            k: rng.normal(size=v.shape).astype(np.float32) * 10 ** rng.uniform(-4, 0)
            for k, v in start.items()
        }
        rate = 1e-2 * (n + 1) / 10
        optimizer.learning_rate = rate
        tree = tree_unflatten([(k, mx.array(g)) for k, g in gradients.items()])
        weights, ema, norm = step.update(tree, weights, ema, 0.9)
        mx.eval(weights, ema, optimizer.state)
        for k, g in gradients.items():
            theirs[k].grad = torch.tensor(g)
        their_norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        assert norm.item() == pytest.approx(their_norm.item(), rel=1e-5)
    for name, value in tree_flatten(weights):
        ours, wanted = np.array(value) - start[name], theirs[name].detach().numpy() - start[name]
        assert np.linalg.norm(wanted) > 0
        assert np.linalg.norm(ours - wanted) / np.linalg.norm(wanted) < 1e-4, name
