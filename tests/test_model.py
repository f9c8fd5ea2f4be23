from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from full_forward import full_forward, random_images, train_arrays
from mlx.utils import tree_flatten, tree_map

from mlx_transfusion import sequence
from mlx_transfusion.config import PRESETS, ModelConfig, preset
from mlx_transfusion.models.layers import MLP, Attention
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.quantization import parameter_count
from mlx_transfusion.sequence import Image, Segment, Text

MakeModel = Callable[..., Transfusion]


def story(model: Transfusion) -> list[list[Segment]]:
    """Four documents with four pictures, which pack into two rows of 32."""
    n = model.config.patches_per_image
    bodies: list[list[Segment]] = [
        [Text((40, 41)), Image(0, n), Text((42, 43, 44)), Image(1, n), Text((45,))],
        [Image(2, n), Text((50, 51))],
        [Text((60, 61, 62))],
        [Text((70,)), Image(3, n)],
    ]
    return [sequence.document(b, model.config) for b in bodies]


# --- who is influenced by whom ---


def test_a_change_reaches_exactly_the_positions_that_may_see_it(any_model: Transfusion) -> None:
    """Tokens: itself and later ones of its document. A patch: its whole picture and later ones. Nobody else."""
    patches, angle = random_images(any_model, 4)
    logits, prediction, packed = full_forward(any_model, story(any_model), 32, patches, angle)
    assert packed.ids.shape == (2, 32)
    n = any_model.config.patches_per_image
    places = packed.patch_index.reshape(4, n)  # flat positions of every picture's patches

    def check(changed: PackedResult, row: int, column: int) -> None:
        difference = np.abs(changed[0] - logits).max(-1)  # [B, T]
        expected = np.zeros(difference.shape, bool)
        seen_from = sequence.attention_mask(packed.document, packed.image)[row, 0, :, column]
        expected[row] = seen_from
        np.testing.assert_array_equal(difference > 1e-5, expected)
        assert difference[~expected].max() == 0
        moved = np.abs(changed[1] - prediction).max(-1)
        np.testing.assert_array_equal(moved > 1e-5, expected.reshape(-1)[places])

    for row, column in zip(*np.nonzero(packed.modality == sequence.TEXT), strict=True):
        ids = packed.ids.copy()
        ids[row, column] = 99
        batch = dataclasses.replace(packed, ids=ids)
        check(run(any_model, batch, patches, angle), int(row), int(column))
    for m in range(4):
        for k in range(n):
            other = patches.copy()
            other[m, k, 0] += 1
            row, column = divmod(int(places[m, k]), 32)
            check(run(any_model, packed, other, angle), row, column)
        turned = angle.copy()
        turned[m] += 0.1
        check(run(any_model, packed, patches, turned), row, column)


PackedResult = tuple[np.ndarray, np.ndarray]


def run(
    model: Transfusion, packed: sequence.PackedBatch, patches: np.ndarray, angle: np.ndarray
) -> PackedResult:
    logits, prediction = model(train_arrays(packed, patches, angle))
    return np.array(logits).reshape(*packed.ids.shape, -1), np.array(prediction)


def test_ids_under_patches_and_padding_are_never_read(tiny_model: Transfusion) -> None:
    patches, angle = random_images(tiny_model, 4)
    logits, prediction, packed = full_forward(tiny_model, story(tiny_model), 32, patches, angle)
    ids = np.where(packed.modality == sequence.TEXT, packed.ids, 99)
    other_logits, other = run(tiny_model, dataclasses.replace(packed, ids=ids), patches, angle)
    real = packed.modality != sequence.PAD
    np.testing.assert_array_equal(other_logits[real], logits[real])
    np.testing.assert_array_equal(other, prediction)


def test_a_document_alone_is_the_document_in_company(any_model: Transfusion) -> None:
    documents = story(any_model)
    patches, angle = random_images(any_model, 4)
    logits, prediction, packed = full_forward(any_model, documents, 32, patches, angle)
    together = [
        logits[r][packed.document[r] == d] for r in range(2) for d in range(packed.document[r].max() + 1)
    ]
    assert len(together) == len(documents)
    for d in documents:
        images = [s.index for s in d if isinstance(s, Image)]
        renamed = [Image(images.index(s.index), s.patches) if isinstance(s, Image) else s for s in d]
        length = sequence.length(d)
        alone, own, _ = full_forward(any_model, [renamed], length, patches[images], angle[images])
        match = [t for t in together if len(t) == length and np.abs(t - alone[0]).max() < 1e-5]
        assert len(match) == 1
        if images:
            np.testing.assert_allclose(own, prediction[images], atol=1e-5)


def test_text_alone_needs_no_picture_in_the_batch(tiny_model: Transfusion) -> None:
    """A part of an accumulated batch, or a whole corpus, may hold no picture."""
    document = story(tiny_model)[2]
    patches, angle = random_images(tiny_model, 0)
    logits, prediction, _ = full_forward(tiny_model, [document], 8, patches, angle)
    assert prediction.shape == patches.shape
    prompt = [i for s in document if isinstance(s, Text) for i in s.ids]
    wanted, _ = tiny_model.prefill(np.array([prompt]), np.array([len(prompt)]))
    np.testing.assert_allclose(logits[0, len(prompt) - 1], wanted[0], atol=1e-4)


# --- options of the architecture ---


def test_grouped_queries_are_shared_keys_and_values(tiny_config: ModelConfig) -> None:
    grouped = Attention(dataclasses.replace(tiny_config, num_key_value_heads=2))
    full = Attention(tiny_config)
    e = tiny_config.head_dim
    assert grouped.k_proj.weight.shape == (2 * e, tiny_config.hidden_size)
    full.update(tree_map(lambda w: w, grouped.parameters()))
    for name in ("k_proj", "v_proj"):  # heads 0 and 1 read group 0, heads 2 and 3 group 1
        heads = grouped[name].weight.reshape(2, 1, e, -1)
        full[name].weight = mx.broadcast_to(heads, (2, 2, e, heads.shape[-1])).reshape(4 * e, -1)
    x = mx.random.normal((2, 7, tiny_config.hidden_size), key=mx.random.key(0))
    np.testing.assert_allclose(grouped(x, "causal")[0], full(x, "causal")[0], atol=1e-5)


def test_qk_norm_takes_the_scale_out_of_the_scores(tiny_config: ModelConfig) -> None:
    x = mx.random.normal((1, 6, tiny_config.hidden_size), key=mx.random.key(0))
    for on in (True, False):
        attention = Attention(dataclasses.replace(tiny_config, qk_norm=on))
        assert ("q_norm" in attention) == on
        before = attention(x, None)[0]
        attention.q_proj.weight = attention.q_proj.weight * 7
        change = mx.abs(attention(x, None)[0] - before).max().item()
        assert change < 1e-4 if on else change > 1e-2


@pytest.mark.parametrize("act", ["silu", "relu"])
def test_the_gate_and_its_gradient(tiny_config: ModelConfig, act: str) -> None:
    mlp = MLP(dataclasses.replace(tiny_config, hidden_act=act))
    plain = {"silu": lambda g: g * mx.sigmoid(g), "relu": lambda g: mx.maximum(g, 0)}[act]

    def wanted(x: mx.array) -> mx.array:
        return (plain(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T

    x = mx.random.normal((3, 5, tiny_config.hidden_size), key=mx.random.key(0))
    np.testing.assert_allclose(mlp(x), wanted(x), atol=1e-5)
    got = mx.grad(lambda x: mlp(x).square().sum())(x)
    np.testing.assert_allclose(got, mx.grad(lambda x: wanted(x).square().sum())(x), atol=1e-4)


def test_velocity_of_an_epsilon_model(tiny_config: ModelConfig, make_model: MakeModel) -> None:
    """Equal weights, read as noise or as velocity: v = (eps - sin(a) x) / cos(a)."""
    velocity = make_model(dataclasses.replace(tiny_config, prediction="velocity", patch_skip=True), seed=3)
    epsilon = make_model(dataclasses.replace(tiny_config, prediction="epsilon", patch_skip=True), seed=3)
    ids, lengths = np.array([[1, 40, 4], [1, 41, 4]]), np.array([3, 3])
    x, angle = random_images(velocity, 2)
    raw = np.array(velocity.velocity(mx.array(x), mx.array(angle), velocity.prefill(ids, lengths)[1]))
    got = epsilon.velocity(mx.array(x), mx.array(angle), epsilon.prefill(ids, lengths)[1])
    a = angle[:, None, None]
    np.testing.assert_allclose(got, (raw - np.sin(a) * x) / np.cos(a), atol=1e-4)
    noise = epsilon.velocity(mx.array(x), mx.full((2,), math.pi / 2), epsilon.prefill(ids, lengths)[1])
    assert mx.isfinite(noise).all().item()


def test_the_skip_adds_a_gain_of_the_angle_times_the_noisy_patch(
    tiny_config: ModelConfig, make_model: MakeModel
) -> None:
    model = make_model(dataclasses.replace(tiny_config, patch_skip=True))
    patches, angle = random_images(model, 4)
    _, with_skip, packed = full_forward(model, story(model), 32, patches, angle)
    gain = np.array(model.patch_decoder.skip_gain(nn.silu(model.angle_embedding(mx.array(angle)))))
    zeros = tree_map(mx.zeros_like, model.patch_decoder.skip_gain.parameters())
    model.patch_decoder.skip_gain.update(zeros)
    _, without = run(model, packed, patches, angle)
    np.testing.assert_allclose(with_skip - without, gain[:, None] * patches, atol=1e-4)


def test_a_fresh_model_predicts_zero_and_sees_its_text(tiny_config: ModelConfig) -> None:
    model = Transfusion(dataclasses.replace(tiny_config, patch_skip=True))
    patches, angle = random_images(model, 4)
    logits, prediction, _ = full_forward(model, story(model), 32, patches, angle)
    assert np.abs(prediction).max() == 0  # the mean of eps and of the velocity
    assert 0.1 < logits.std() < 2


# --- derivatives ---


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("act", ["silu", "relu"])
def test_jvp_of_the_velocity_through_a_cache(
    any_model: Transfusion, make_model: MakeModel, act: str, ragged: bool
) -> None:
    """Consistency training needs d/dt of the network in forward mode (arXiv 2410.11081, 4.1)."""
    model = make_model(dataclasses.replace(any_model.config, hidden_act=act), seed=2)
    ids = np.array([[1, 40, 41, 4], [1, 50, 51, 4]])
    _, cache = model.prefill(ids, np.array([4, 3 if ragged else 4]))
    assert isinstance(cache.offset(), mx.array) == ragged
    x, angle = map(mx.array, random_images(model, 2))
    dx = mx.random.normal(x.shape, key=mx.random.key(5))
    da = mx.array([1.0, -0.5])

    def f(x: mx.array, angle: mx.array) -> mx.array:
        return model.velocity(x, angle, cache)

    (value,), (tangent,) = mx.jvp(f, [x, angle], [dx, da])
    np.testing.assert_allclose(value, f(x, angle), atol=1e-5)
    h = 5e-3 if act == "silu" else 1e-3  # a shorter step crosses fewer kinks of ReGLU
    difference = (f(x + h * dx, angle + h * da) - f(x - h * dx, angle - h * da)) / (2 * h)
    assert mx.abs(difference).mean().item() > 0.1
    assert mx.abs(tangent - difference).mean().item() < 5e-3 * mx.abs(difference).mean().item()


def test_jvp_of_the_training_forward(tiny_model: Transfusion) -> None:
    patches, angle = random_images(tiny_model, 4)
    packed = sequence.pack(story(tiny_model), 32)

    def f(x: mx.array, a: mx.array) -> mx.array:
        return tiny_model(train_arrays(packed, patches, angle)._replace(patches=x, angle=a))[1]

    x, a = mx.array(patches), mx.array(angle)
    dx, da = mx.random.normal(x.shape, key=mx.random.key(5)), mx.array([1.0, -0.5, 0.3, 0.2])
    (_,), (tangent,) = mx.jvp(f, [x, a], [dx, da])
    h = 5e-3
    difference = (f(x + h * dx, a + h * da) - f(x - h * dx, a - h * da)) / (2 * h)
    assert mx.abs(tangent - difference).max().item() < 5e-3 * mx.abs(difference).max().item()


def test_gradient_checkpointing_changes_no_gradient(
    any_model: Transfusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches, angle = random_images(any_model, 4)
    arrays = train_arrays(sequence.pack(story(any_model), 32), patches, angle)
    calls = []
    original = nn.utils.checkpoint
    monkeypatch.setattr(nn.utils, "checkpoint", lambda layer: calls.append(layer) or original(layer))

    def gradients() -> dict[str, mx.array]:
        def loss(w: dict) -> mx.array:
            any_model.update(w)
            logits, prediction = any_model(arrays)
            return logits.square().mean() + prediction.square().mean()

        w = any_model.parameters()
        try:
            return dict(tree_flatten(mx.grad(loss)(w)))
        finally:
            any_model.update(w)

    plain = gradients()
    assert not calls
    any_model.gradient_checkpointing = True
    try:
        again = gradients()
    finally:
        any_model.gradient_checkpointing = False
    assert len(calls) == any_model.config.num_hidden_layers
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        assert mx.abs(value).max().item() > 0, name  # every weight takes part
        np.testing.assert_allclose(again[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_half_precision_weights_give_a_half_precision_decoder(
    tiny_config: ModelConfig, make_model: MakeModel
) -> None:
    """The float32 sines of the angle must not lift every product behind them to float32."""
    model = make_model(tiny_config)
    model.set_dtype(mx.bfloat16)
    patches, angle = random_images(model, 4)
    arrays = train_arrays(sequence.pack(story(model), 32), patches, angle)
    for x in (arrays.patches, arrays.patches.astype(mx.bfloat16)):
        logits, _ = model(arrays._replace(patches=x))
        assert logits.dtype == mx.bfloat16
    _, cache = model.prefill(np.array([[1, 40, 4]]), np.array([3]))
    model.extend_image(mx.array(patches[:1]), cache)
    assert all(k.dtype == v.dtype == mx.bfloat16 for k, v in cache.layers if k is not None)


# --- the paper's sizes ---

SIZES = {"0.16b": 0.162, "0.37b": 0.374, "0.76b": 0.778, "1.4b": 1.364, "7b": 6.738}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_papers_sizes_and_take_no_memory(name: str) -> None:
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    config = preset(name)
    model = Transfusion(config)
    images = sum(
        parameter_count(model[part]) for part in ("patch_encoder", "patch_decoder", "angle_embedding")
    )
    transformer = parameter_count(model) - images
    assert round(transformer / 1e9, 3) == SIZES[name]
    assert images / transformer < 0.005  # section 3.3: the linear patch layers add less than 0.5%
    assert config.patches_per_image == 256
    mx.synchronize()
    assert mx.get_active_memory() - before < 1 << 20
    assert mx.get_peak_memory() - before < 1 << 20


def test_every_preset_is_tested() -> None:
    assert set(SIZES) == set(PRESETS)
    assert not preset("7b").qk_norm
    assert preset("7b").prediction == "epsilon"
