"""The consistency objective on real batches: how documents split, derivatives, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from distill_tools import both_methods, flat, step_of
from tiny_training import MakeConfig

from mlx_transfusion import consistency, trigflow
from mlx_transfusion.model_io import load
from mlx_transfusion.sequence import Image
from mlx_transfusion.training.config import load_train_config
from mlx_transfusion.training.prefix_arrays import arrays_of
from mlx_transfusion.training.prefix_data import PICTURE_MULTIPLE, count, prefix_batch, prefix_of
from mlx_transfusion.training.teacher_text import divergence
from mlx_transfusion.training.trainer import Trainer, train

# ---- the batch ----


def test_documents_split_at_their_last_picture(config: MakeConfig) -> None:
    data = Trainer(config()).train_data
    documents = [d for step in range(8) for d in data.documents(step, 9)]
    kinds = {prefix_of(d) is not None: d for d in documents}
    assert set(kinds) == {True, False}
    for d in documents:
        prefix, segments = prefix_of(d), d.segments
        if prefix is None:
            assert not (segments and isinstance(segments[-3 if len(segments) > 2 else 0], Image))
            assert count(data, d) == (data.count(d)[0], 0)
        else:
            assert prefix[0] == 1
            assert prefix[-1] == 4
            assert count(data, d) == (len(prefix) - 1, 1)


def test_prefix_batch_holds_every_document_once(config: MakeConfig) -> None:
    data = Trainer(config()).train_data
    documents = data.documents(3, 9)
    batch = prefix_batch(data, documents)
    painted = [p for d in documents if (p := prefix_of(d)) is not None]
    assert len(batch.ids) % PICTURE_MULTIPLE == 0
    assert batch.weight.sum() == len(painted)
    for row, prefix in enumerate(painted):
        assert batch.ids[row, : batch.lengths[row]].tolist() == prefix
    assert batch.text_targets == sum(count(data, d)[0] for d in documents)
    k = int(batch.text_weight.sum())
    flat_ids = batch.ids.reshape(-1)
    wanted = [token for prefix in painted for token in prefix[1:]]
    assert batch.text_target[:k].tolist() == wanted == flat_ids[batch.text_index[:k] + 1].tolist()
    assert batch.rest is not None
    assert len(batch.rest.angle) % PICTURE_MULTIPLE == 0
    # pictures, noise and angles are those that plain training would draw for the same documents
    plain = data.pictures([d for d in documents if prefix_of(d) is not None])
    assert np.array_equal(batch.pictures.noise[: len(painted)], plain.noise)
    assert np.array_equal(batch.pictures.angle[: len(painted)], plain.angle)


# ---- the objective on the model ----


def test_passes_on_arrays_equal_generation(config: MakeConfig) -> None:
    """`read_prefix` and `paint` (padded, batched) give what `prefill` and `velocity` give one by one."""
    trainer = Trainer(config())
    model, batch = trainer.model, prefix_batch(trainer.train_data, trainer.train_data.documents(1, 9))
    p, _ = arrays_of(batch, model)
    _, prefix = model.read_prefix(p.ids)
    out = np.array(model.paint(p.x, p.angle, prefix, p.lengths))
    for row in range(int(batch.weight.sum())):
        length = batch.lengths[row : row + 1]
        _, cache = model.prefill(batch.ids[row : row + 1, : length[0]], length)
        alone = model.velocity(p.x[row : row + 1], p.angle[row : row + 1], cache)
        assert np.abs(np.array(alone)[0] - out[row]).max() < 1e-4


@pytest.mark.parametrize("prediction", ["velocity", "epsilon"])
def test_cos_velocity_is_that_of_generation(config: MakeConfig, prediction: str) -> None:
    import dataclasses

    trainer = Trainer(config())
    model = type(trainer.model)(dataclasses.replace(trainer.model.config, prediction=prediction))
    model.update(trainer.model.parameters())
    p, _ = arrays_of(prefix_batch(trainer.train_data, trainer.train_data.documents(1, 9)), model)
    angle = mx.minimum(p.angle, 1.5)
    _, prefix = model.read_prefix(p.ids)
    got = model.cos_velocity(p.x, angle, prefix, p.lengths)
    _, cache = model.prefill(np.array(p.ids)[:1, : int(p.lengths[0].item())], np.array(p.lengths[:1]))
    wanted = mx.cos(angle[:1, None, None]) * model.velocity(p.x[:1], angle[:1], cache)
    assert mx.abs(got[:1] - wanted).max().item() < 1e-4


def _tangent_of(trainer: Trainer, checkpointing: bool = False) -> tuple[np.ndarray, Any]:
    """J of a batch, and the function that gives F at any state of it."""
    model = trainer.model
    model.gradient_checkpointing = checkpointing
    p, _ = arrays_of(prefix_batch(trainer.train_data, trainer.train_data.documents(1, 9)), model)
    _, prefix = model.read_prefix(p.ids)

    def network(x: mx.array, angle: mx.array) -> mx.array:
        return model.paint(x, angle, prefix, p.lengths)

    value = consistency.value_and_derivative(network, p.x, p.angle, p.sample_velocity)
    return np.array(value.derivative), (network, p)


def test_derivative_equals_central_differences(config: MakeConfig) -> None:
    trainer = Trainer(config())
    derivative, (network, p) = _tangent_of(trainer)
    a, h = p.angle[:, None, None], 5e-3
    cosine = mx.maximum(mx.cos(a), 1e-3)
    v = p.sample_velocity / cosine

    def at(turn: float) -> mx.array:
        x = trigflow.rotate(p.x, v, a, a + turn)  # cos(h) x + sin(h) v
        return network(x, p.angle + turn)

    differences = np.array(mx.sin(a) * cosine * (at(h) - at(-h)) / (2 * h))
    real = slice(0, int(p.weight.sum().item()))
    error = np.linalg.norm(derivative[real] - differences[real]) / np.linalg.norm(derivative[real])
    assert np.linalg.norm(derivative[real]) > 1e-3
    assert error < 3e-3


def _gradients(trainer: Trainer, step: int = 2) -> tuple[dict[str, np.ndarray], np.ndarray]:
    loaded = trainer._load(step)
    total: dict[str, np.ndarray] = {}
    sums = np.zeros(2)
    for part in loaded.parts:
        gradients, part_sums = trainer.step.gradients(
            trainer.state.weights, part, loaded.text_total, loaded.image_total, step
        )
        for name, value in flat(gradients).items():
            total[name] = total.get(name, 0) + value
        sums += np.array(part_sums)
    return total, sums


@pytest.mark.parametrize(
    "overrides", [("gradient_checkpointing=true",), ("compile=false",), ("accumulate=3",)], ids=str
)
@both_methods
def test_ways_to_compute_the_same_gradients(
    config: MakeConfig, overrides: tuple[str, ...], method: str
) -> None:
    chosen = f"consistency.method={method}"
    plain, sums = _gradients(Trainer(config(chosen)))
    other, other_sums = _gradients(Trainer(config(chosen, *overrides)))
    assert np.allclose(sums, other_sums, rtol=1e-4)
    assert plain.keys() == other.keys()
    for name, value in plain.items():
        assert np.linalg.norm(other[name] - value) <= 2e-3 * np.linalg.norm(value) + 1e-7, name
    assert np.linalg.norm(plain["layers.0.self_attn.q_proj.weight"]) > 0


def test_gradient_moves_the_network_along_the_tangent(config: MakeConfig) -> None:
    """Against Algorithm 1 written out: a second forward pass, squared distance to sg(F) + g."""
    trainer = Trainer(config("accumulate=1", "consistency.adaptive_weight=false"))
    step, model = step_of(trainer), trainer.model
    batch = trainer._load(2).parts[0]
    p, texts = arrays_of(batch, model)
    assert trainer.teacher is not None
    teacher = trainer.teacher.model

    def guided() -> mx.array:
        _, prefix = teacher.read_prefix(p.ids)
        cond = teacher.cos_velocity(p.x, p.angle, prefix, p.lengths)
        m = len(p.angle)
        _, alone = teacher.read_prefix(mx.array([[1, 4]] * m))
        null = teacher.cos_velocity(p.x, p.angle, alone, mx.full((m,), 2))
        return null + 2.0 * (cond - null)

    cos_v = guided()

    def network(x: mx.array, angle: mx.array) -> mx.array:
        return model.paint(x, angle, model.read_prefix(p.ids)[1], p.lengths)

    a = p.angle[:, None, None]
    cosine, sine = mx.cos(a), mx.sin(a)
    (f,), (j,) = mx.jvp(network, [p.x, p.angle], [sine * cos_v, mx.sin(p.angle) * mx.cos(p.angle)])
    g = -cosine * (cosine * f - cos_v) - (cosine * sine * p.x + j)
    g = g / (mx.sqrt(g.square().mean((1, 2), keepdims=True)) + 0.1)
    target, total = f + g, float(batch.weight.sum())

    def loss(weights: Any) -> mx.array:
        model.update(weights)
        error = (network(p.x, p.angle) - target).square().mean((1, 2))
        return 5.0 * (error * p.weight).sum() / total

    wanted = flat(mx.grad(loss)(model.parameters()))
    # text alone is left out of the comparison by giving it no weight
    silent = tuple(mx.zeros_like(t) for t in texts)
    gradients, _, _ = step._plain_consistency_gradients(
        trainer.state.weights, tuple(p), silent, None, None, mx.array([0.0, 5.0 / total]), mx.array(1.0)
    )
    for name, value in flat(gradients).items():
        assert np.linalg.norm(value - wanted[name]) <= 1e-3 * np.linalg.norm(wanted[name]) + 1e-6, name


@pytest.mark.parametrize(("method", "recorded"), [("scm", "sct"), ("ect", "ect")])
def test_consistency_training_needs_no_teacher(
    folder: Path, tmp_path: Path, method: str, recorded: str
) -> None:
    text = (folder / "distill.toml").read_text().replace('teacher = "teacher"', "")
    toml = folder / "sct.toml"
    toml.write_text(text.replace("steps = 6", 'steps = 2\ninit = "teacher"'))
    last = train(load_train_config(toml, [f"output={tmp_path / 'sct'}", f"consistency.method={method}"]))
    objective = load(last).extra["objective"]
    assert objective["method"] == recorded
    assert objective["guidance"] == 1.0
    assert objective["teacher"] is None


def test_gradient_of_easy_tuning_is_that_of_two_points(config: MakeConfig) -> None:
    """Against ECT written out in float64: the squared distance of f at both points, f(x', b) held fixed.

    With the rescaling switched off, mean((f(x, a) - f(x', b))^2) / (gap sin(a)^2) has the gradient -2 d dF.
    """
    trainer = Trainer(
        config("consistency.method=ect", "consistency.adaptive_weight=false", "consistency.tangent=none")
    )
    step, model = step_of(trainer), trainer.model
    batch = trainer._load(2).parts[0]
    p, texts = arrays_of(batch, model)
    p = p._replace(angle=mx.clip(p.angle, 0.2, 1.4))
    silent, total = tuple(mx.zeros_like(t) for t in texts), float(batch.weight.sum())
    cos_v = np.array(step._cos_velocity(p))
    at_noise = 0.125
    a = np.array(p.angle, np.float64)
    gap = np.minimum(1, at_noise * (1 + 8 / (1 + np.exp(np.tan(a) / 2))))
    b = np.arctan((1 - gap) * np.tan(a))
    turn = (a - b)[:, None, None]
    moved = np.cos(turn) * np.array(p.x) - np.sin(turn) * cos_v / np.cos(a)[:, None, None]
    x, earlier = mx.array(moved.astype(np.float32)), mx.array(b.astype(np.float32))

    def ends(x: mx.array, angle: mx.array) -> mx.array:
        out = model.paint(x, angle, model.read_prefix(p.ids)[1], p.lengths)
        return trigflow.x0_from_velocity(x, out, angle[:, None, None])

    target = ends(x, earlier)
    scale = mx.array((1 / (gap * np.sin(a) ** 2)).astype(np.float32)) * p.weight * 5.0 / total

    def loss(weights: Any) -> mx.array:
        model.update(weights)
        return ((ends(p.x, p.angle) - target).square().mean((1, 2)) * scale).sum()

    wanted = flat(mx.grad(loss)(model.parameters()))
    model.update(trainer.state.weights)
    gradients, _, _ = step._plain_consistency_gradients(
        trainer.state.weights, tuple(p), silent, None, None, mx.array([0.0, 5.0 / total]), mx.array(at_noise)
    )
    for name, value in flat(gradients).items():
        assert np.linalg.norm(value - wanted[name]) <= 2e-3 * np.linalg.norm(wanted[name]) + 1e-5, name


def test_guidance_changes_the_target_and_one_saves_a_pass(config: MakeConfig) -> None:
    kinds = {}
    for scale in (1.0, 2.0):
        trainer = Trainer(config(f"consistency.guidance={scale}"))
        p, _ = arrays_of(trainer._load(0).parts[0], trainer.model)
        kinds[scale] = np.array(step_of(trainer)._cos_velocity(p))
    assert np.abs(kinds[1.0] - kinds[2.0]).max() > 1e-3


# ---- text that is held to the teacher's ----


def test_divergence_against_its_definition() -> None:
    rng = np.random.default_rng(0)
    logits, wanted = rng.normal(size=(2, 4, 7)) * 3
    weights = np.array([1.0, 0.0, 2.0, 1.0])
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (wanted, logits))
    each = (p * np.log(p / q)).sum(-1)
    arrays = [mx.array(x, mx.float32) for x in (logits, wanted, weights)]
    assert divergence(*arrays).item() == pytest.approx((each * weights).sum(), rel=1e-5)
    gradient = mx.grad(divergence)(*arrays)
    np.testing.assert_allclose(gradient, (q - p) * weights[:, None], atol=1e-5)


def test_text_of_the_teacher_is_where_the_student_begins(config: MakeConfig) -> None:
    """At the teacher's weights every text agrees, before pictures, behind them and alone, and nothing pulls."""

    def gradients(head: float, *overrides: str) -> tuple[dict[str, np.ndarray], float]:
        trainer = Trainer(config("consistency.text=teacher", "image_loss_weight=0", *overrides))
        weights = trainer.state.weights
        weights["lm_head"]["weight"] = head * weights["lm_head"]["weight"]
        found, (text, _) = _gradients(trainer)
        return found, float(text)

    still, text = gradients(1.0)
    assert abs(text) < 1e-4
    assert max(np.abs(g).max() for g in still.values()) < 1e-5
    moved, text = gradients(1.1)
    assert text > 1e-3
    assert np.abs(moved["layers.0.mlp.up_proj.weight"]).max() > 1e-5
    for name, value in gradients(1.1, "accumulate=3", "compile=false")[0].items():
        assert np.linalg.norm(value - moved[name]) <= 2e-3 * np.linalg.norm(moved[name]) + 1e-7, name
