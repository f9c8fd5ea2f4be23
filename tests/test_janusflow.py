"""JanusFlow: equal to the official code's numbers, through the interface that generation uses."""

from __future__ import annotations

import json
import math
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from janusflow_tools import (
    BOS,
    EOS,
    LATENT,
    PLACEHOLDER,
    channels_last,
    config,
    golden,
    model,
)
from PIL import Image

from mlx_transfusion import sampling, trigflow
from mlx_transfusion.errors import UserError
from mlx_transfusion.images import pad_square
from mlx_transfusion.model_io import flat_parameters
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.janusflow import JanusFlow
from mlx_transfusion.models.janusflow_config import JanusFlowConfig
from mlx_transfusion.models.patches import patchify

TOLERANCE = 1e-4
PATCH = 2


def close(found: mx.array, expected: mx.array | str, tolerance: float = TOLERANCE) -> None:
    """Equal to an array, or to the golden's of that name."""
    wanted = golden()[expected] if isinstance(expected, str) else expected
    assert found.shape == wanted.shape
    error = mx.abs(found - wanted).max().item()
    assert error < tolerance, f"{expected if isinstance(expected, str) else ''}: {error:.2e}"


# ---- reading pictures ----


@pytest.mark.parametrize(("index", "name"), [(0, "wide"), (1, "tall")])
def test_pictures_are_padded_as_the_official_processor_does(index: int, name: str) -> None:
    image = Image.fromarray(np.array(golden()[f"processor.image_{name}"]).astype(np.uint8))
    pixels = pad_square(image, 24, least=4)
    expected = channels_last(golden()["processor.pixel_values"])[index]
    close(mx.array(pixels.astype(np.float32)) / 255 * 2 - 1, expected, 1e-6)


def test_a_strip_keeps_a_shortest_side_and_grey_is_around_it() -> None:
    pixels = pad_square(Image.new("RGB", (1000, 3), (255, 0, 0)), 48)
    assert pixels.shape == (48, 48, 3)
    assert (pixels[17:31] == (255, 0, 0)).all()  # 14 of 48 rows
    assert (np.delete(pixels, range(17, 31), 0) == 127).all()


def test_picture_vectors_are_the_official_ones() -> None:
    pixels = channels_last(golden()["und.pixel_values"]).reshape(6, 24, 24, 3)
    vectors = model().picture_vectors(pixels)
    close(vectors[:, 1:], "und.aligned")
    assert mx.array_equal(vectors[3, 0], model().beg_of_und_embed[0])


def read_document(row: int) -> tuple[KVCache, list[tuple[int, mx.array]]]:
    """A golden document through the family's interface: its cache, and (tokens so far, logits after them)."""
    ids = np.array(golden()[f"und.raw_ids.{row}"]).tolist()
    pictures = iter(channels_last(golden()["und.pixel_values"])[row])
    cache, stops = model().new_cache(1), []
    while ids:
        end = ids.index(PLACEHOLDER) if PLACEHOLDER in ids else len(ids)
        if end:
            logits = model().extend_text(np.array([ids[:end]]), np.array([end]), cache)
            stops.append((int(cache.lengths[0]), logits[0]))
        if end < len(ids):
            logits = model().read_picture((next(pictures)[None] + 1) / 2, cache)
            stops.append((int(cache.lengths[0]), logits[0]))
        ids = ids[end + 1 :]
    return cache, stops


@pytest.mark.parametrize("row", range(3))
def test_documents_give_the_official_logits_and_greedy_tokens(row: int) -> None:
    cache, stops = read_document(row)
    mask = np.array(golden()["und.attention_mask"])[row]
    first = int(mask.argmax())  # the official batch is padded on the left
    assert stops[-1][0] == mask.sum()
    assert len(stops) == (3, 5, 1)[row]
    for length, logits in stops:
        close(logits, golden()["und.logits"][row, first + length - 1])
    written, logits = [], stops[-1][1]
    for _ in range(6):
        written.append(int(mx.argmax(mx.where(mx.arange(160) == EOS, -mx.inf, logits)).item()))
        logits = model().extend_text(np.array([[written[-1]]]), np.array([1]), cache)[0]
    assert written == np.array(golden()["und.greedy_ids"])[row].tolist()


def test_rows_of_a_batch_are_read_as_alone() -> None:
    rows = [[BOS, 7, 9, 30], [BOS, 61], [BOS, 5, 5, 5, 90, 100]]
    lengths = np.array([len(row) for row in rows])
    ids = np.array([row + [0] * (lengths.max() - len(row)) for row in rows])
    logits, _ = model().prefill(ids, lengths)
    for i, row in enumerate(rows):
        close(logits[i], model().prefill(np.array([row]), np.array([len(row)]))[0][0], 1e-5)


# ---- painting ----


def prompt() -> list[int]:
    """What is read before the picture: the golden's prompt without the token whose place the time takes."""
    official = np.array(golden()["gen.prompt_ids"]).tolist()
    assert official[0] == BOS
    return model().image_prefix(official[1:-1])


@cache
def prompt_and_guide() -> KVCache:
    """Two rows behind the prompt, then two of the guide."""
    ids = np.array([prompt(), prompt()])
    rows = model().prefill(ids, np.full(2, ids.shape[1]))[1]
    return rows.stack(model().guide([prompt(), prompt()]))


def noise() -> mx.array:
    """[2, 8, 8, 4]"""
    return channels_last(golden()["gen.noise"])


def test_what_the_language_model_reads_of_a_noisy_picture_is_the_official() -> None:
    z = mx.concatenate([noise(), noise()])
    t = mx.full((4,), 0.25)
    close(model().vision_gen_enc_model.time_embed.sinusoid(t * 1000), "gen.t250.time_sinusoid")
    vectors, grid, time = model().noisy_vectors(z, t)
    close(time, "gen.t250.t_emb")
    close(grid, channels_last(golden()["gen.t250.enc_out"]))
    close(vectors[:, 0], "gen.t250.t_emb")
    close(vectors[:, 1:], "gen.t250.z_tokens")
    embedded = model().language_model.model.embed_tokens(mx.array([prompt()] * 2))
    close(mx.concatenate([embedded, vectors[:2]], 1), golden()["gen.t250.llm_in"][:2])


@pytest.mark.parametrize(("t", "name"), [(0.25, "t250"), (0.0, "t0")])
def test_the_flow_is_the_official_with_and_without_the_prompt(t: float, name: str) -> None:
    z = mx.concatenate([noise(), noise()])
    flow = model().flow(z, mx.full((4,), t), prompt_and_guide())
    close(flow[:2], channels_last(golden()[f"gen.{name}.v_cond"]))
    close(flow[2:], channels_last(golden()[f"gen.{name}.v_uncond"]))


def test_guidance_is_the_official() -> None:
    z = mx.concatenate([noise(), noise()])
    flow = model().flow(z, mx.full((4,), 0.25), prompt_and_guide())
    close(sampling.guided(flow[:2], flow[2:], 2.0), channels_last(golden()["gen.t250.v_cfg2"]))


def test_the_guide_keeps_the_prompts_distance() -> None:
    prefixes = [prompt(), prompt()[:3]]
    guide = model().guide(prefixes)
    assert guide.lengths.tolist() == [1, 1]
    assert guide.positions.tolist() == [7, 3]
    # The official code reads padding there and masks it: the same numbers in many more columns.
    cache = model().new_cache(1)
    model().extend_text(np.array([[BOS, *[PLACEHOLDER] * 6]]), np.array([7]), cache)
    cache.valid = np.arange(7)[None] < 1
    z, t = noise()[:1], mx.array([0.25])
    close(model().flow(z, t, guide.select([0])), model().flow(z, t, cache), 1e-5)
    near = guide.select([0])
    near.positions = np.array([1])
    assert mx.abs(model().flow(z, t, near) - model().flow(z, t, cache)).max().item() > 1e-3


def test_a_negative_prompt_is_read_like_a_prompt() -> None:
    guide = model().guide([prompt()], [BOS, 9, 9])
    assert guide.lengths.tolist() == guide.positions.tolist() == [3]


@pytest.mark.parametrize(("scale", "tolerance"), [(1, 5e-4), (2, 5e-4), (5, 1e-3)])
def test_ddim_on_flow_angles_is_the_official_euler_sampler(scale: int, tolerance: float) -> None:
    steps = int(golden()["gen.sample.num_steps"].item())
    states = []

    def velocity(x: mx.array, angle: float) -> mx.array:
        v = model().velocity(mx.concatenate([x, x]), mx.full((4,), angle), prompt_and_guide())
        return sampling.guided(v[:2], v[2:], scale)

    angles = sampling.angle_schedule(steps, spacing="flow")
    assert angles == pytest.approx([math.atan2(steps - i, i) for i in range(steps + 1)])
    sampling.ddim(velocity, patchify(noise(), PATCH), angles, callback=lambda *step: states.append(step[2]))
    close(states[-1], patchify(channels_last(golden()[f"gen.sample.cfg{scale}.final"]), PATCH), tolerance)
    if scale == 2:  # a state between is the official one at unit deviation, not at the flow's
        unit = math.sin(angles[1]) + math.cos(angles[1])
        close(states[0] / unit, patchify(channels_last(golden()["gen.sample.cfg2.step0"]), PATCH), tolerance)


@settings(max_examples=10, deadline=None)
@given(angle=st.floats(0.0, math.pi / 2))
def test_velocity_and_flow_are_two_views_of_one_prediction(angle: float) -> None:
    """The picture and the noise that the flow points at, at its own scale, are those of the velocity."""
    z = noise()[:1]
    t = 1 - trigflow.flow_time_from_angle(angle)
    cache = prompt_and_guide().select([0])
    flow = model().flow(z, mx.array([t]), cache)
    x = patchify(z, PATCH) * (math.sin(angle) + math.cos(angle))
    v = model().velocity(x, mx.array([angle]), cache)
    close(trigflow.x0_from_velocity(x, v, angle), patchify(z + (1 - t) * flow, PATCH))
    close(trigflow.eps_from_velocity(x, v, angle), patchify(z - t * flow, PATCH))


def test_velocity_behind_a_cache_is_that_of_one_long_row() -> None:
    z, t = noise()[:1], mx.array([0.25])
    vectors, grid, time = model().noisy_vectors(z, t)
    row = mx.concatenate([model().language_model.model.embed_tokens(mx.array([prompt()])), vectors], 1)
    hidden, _ = model().language_model.model.run(row)
    close(model().flow_from_hidden(hidden[:, -grid.shape[1] * grid.shape[2] :], grid, time),
          model().flow(z, t, prompt_and_guide().select([0])), 1e-5)  # fmt: skip


def test_velocity_has_a_derivative_in_forward_mode() -> None:
    """What consistency distillation differentiates: along the state, the angle, and both (central differences)."""
    keys = mx.random.split(mx.random.key(3), 3)
    x, dx, weight = (mx.random.normal((1, *model().latent_shape), key=k) for k in keys)
    cache = prompt_and_guide().select([0])
    angle, da = mx.array([0.8]), mx.array([1e-3])  # the time is told in thousandths: one step is about 1

    def velocity(x: mx.array, angle: mx.array) -> mx.array:
        return model().velocity(x, angle, cache)

    value, tangent = (a[0] for a in mx.jvp(velocity, [x, angle], [dx, da]))
    close(value, velocity(x, angle), 1e-6)
    h = 3e-3
    differences = (velocity(x + h * dx, angle + h * da) - velocity(x - h * dx, angle - h * da)) / (2 * h)
    assert mx.abs(tangent).mean().item() > 0.1
    close(tangent, differences, 5e-3)

    def loss(
        x: mx.array,
    ) -> mx.array:  # and the gradient of a value whose derivative is taken too, as in training
        value, tangent = (a[0] for a in mx.jvp(velocity, [x, angle], [dx, da]))
        return (value * weight).sum() + 0 * tangent.sum()

    slope = (mx.grad(loss)(x) * dx).sum()
    expected = (velocity(x + h * dx, angle) - velocity(x - h * dx, angle)) * weight / (2 * h)
    assert slope.item() == pytest.approx(expected.sum().item(), rel=2e-2)


def test_half_precision_stays_half_precision_inside() -> None:
    """What is stored in bfloat16 is computed in it, and the sampler's state stays float32."""
    half = JanusFlow(config())
    half.load_weights(list(flat_parameters(model()).items()))
    half.set_dtype(mx.bfloat16)
    ids = np.array([prompt()])
    cache = half.prefill(ids, np.array([ids.shape[1]]))[1]
    assert cache.layers[0] is not None
    assert cache.layers[0][0].dtype == mx.bfloat16
    z, t = noise()[:1], mx.array([0.25])
    assert half.flow(z, t, cache).dtype == mx.bfloat16
    x, angle = patchify(z, PATCH), mx.array([1.2])
    found = half.velocity(x, angle, cache)
    assert found.dtype == mx.float32
    close(found, model().velocity(x, angle, prompt_and_guide().select([0])), 0.1)
    half.read_picture(mx.full((1, 24, 24, 3), 0.5), cache)
    assert cache.layers[0][0].dtype == mx.bfloat16


# ---- the family ----


def test_what_generation_asks_for() -> None:
    family = model()
    assert family.latent_shape == (16, 16)
    assert family.pads_input
    assert family.input_size == (24, 24)
    assert family.prompt_text("  a red heart ") == "User: a red heart\n\nAssistant:"
    layout = family.config.layout
    assert layout.boi is None
    assert layout.eos == (EOS,)
    assert layout.picture_tokens == 38  # begin, 36 patches, end: reading one takes more than painting one
    assert not family.predicts_noise
    assert math.prod(family.latent_shape) == LATENT**2 * 4


def test_the_config_survives_json() -> None:
    text = json.dumps(config().to_dict())
    assert JanusFlowConfig.from_dict(json.loads(text)) == config()
    with pytest.raises(UserError, match="unknown key"):
        JanusFlowConfig.from_dict(json.loads(text) | {"widht": 1})
