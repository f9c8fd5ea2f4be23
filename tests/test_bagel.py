"""BAGEL against numbers of the official code: reading, writing, painting, editing; and the contract of a family."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from converted_tools import assert_close, assert_forward_mode, convert_in_memory
from mlx.utils import tree_flatten

from mlx_transfusion import sampling, trigflow
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.bagel import Bagel
from mlx_transfusion.models.bagel_config import BagelConfig
from mlx_transfusion.models.bagel_guidance import RENORMS, BagelGuidance, flow_times, paint_flow
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.patches import patchify, unpatchify
from mlx_transfusion.painting import prefill

try:
    from mlx_transfusion.convert import bagel as convert
except ModuleNotFoundError:  # only the tree is on the path, the package is not installed
    from convert import bagel as convert

FOLDER = Path(__file__).parent / "fixtures" / "bagel"
SAMPLES = 5e-4
"""The golden's tolerance of samples; `assert_close` has that of states, logits and velocities."""


GRID = (3, 4)
"""Rows and columns of the picture that is edited."""


class Golden(NamedTuple):
    """The official code's tiny model, and its numbers."""

    model: Bagel
    io: dict[str, mx.array]


def load_golden(**fields: int) -> Bagel:
    """The converted model, with other sizes of pictures."""
    return convert_in_memory(convert, FOLDER, BagelConfig, Bagel, **fields)


@pytest.fixture(scope="module")
def golden() -> Golden:
    """Its pictures have the size of the golden's text to image."""
    model = load_golden(image_height=40, image_width=24, input_height=24, input_width=16)
    return Golden(model, mx.load(str(FOLDER / "io.safetensors")))


def pixels(x: mx.array) -> mx.array:
    """Official pixels [3, H, W] in [-1, 1] -> ours [1, H, W, 3] in [0, 1]."""
    return (x.transpose(1, 2, 0)[None] + 1) / 2


def read(model: Bagel, ids: mx.array, cache: KVCache) -> mx.array:
    return model.extend_text(np.array(ids)[None], np.array([ids.size]), cache)


def greedy(model: Bagel, cache: KVCache, count: int) -> tuple[list[int], mx.array]:
    """Official writing: BOS is the first token read and stored; logits after each of `count` tokens."""
    tokens, logits = [model.config.bos_token_id], []
    for _ in range(count):
        logits.append(read(model, mx.array(tokens[-1:]), cache)[0])
        tokens.append(int(mx.argmax(logits[-1])))
    return tokens[:count], mx.stack(logits)


def columns(cache: KVCache, layer: int, of: int) -> mx.array:
    """Keys (0) or values (1) of one layer in the official order of axes: [S, K, E]."""
    past = cache.layers[layer]
    assert past is not None
    return past[of][0].transpose(1, 0, 2)


# ---- the golden ---------------------------------------------------------------------------------------------------


def test_text(golden: Golden) -> None:
    model, io = golden
    ids = np.array(io["text.ids"])[None]
    x = model.embed_tokens(mx.array(ids))
    assert_close(x[0], io["text.embeddings"])
    turn = model.decoder.turn(mx.arange(ids.size)[None])
    states = [x]
    for layer in model.decoder.layers:
        states.append(layer(states[-1], ids.size, turn, "causal")[0])
    assert_close(states[1][0], io["text.layer0"])
    assert_close(states[-1][0], io["text.last_layer"])
    assert_close(model.decoder.norm(states[-1])[0], io["text.final_norm"])
    assert_close(model.lm_head(model.decoder.norm(states[-1]))[0], io["text.logits"])

    logits, cache = model.prefill(ids, np.array([ids.size]))
    assert_close(logits[0], io["text.logits"][-1])
    assert_close(columns(cache, 0, 0), io["text.cache_k_layer0"])
    assert_close(columns(cache, 0, 1), io["text.cache_v_layer0"])
    assert cache.positions.tolist() == io["text_greedy.start_position"].tolist()
    tokens, steps = greedy(model, cache, 8)
    assert tokens == io["text_greedy.tokens"].tolist()
    assert_close(steps, io["text_greedy.step_logits"])


@pytest.mark.parametrize(("name", "images"), [("und", 1), ("und2", 2)])
def test_understanding(golden: Golden, name: str, images: int) -> None:
    model, io = golden
    cache = model.new_cache(1)
    for i in range(images):
        key = f"{name}.image{i}"
        picture = io[f"{key}.pixels"].transpose(1, 2, 0)[None]
        vision, places = model.vision, io[f"{key}.vit_position_ids"]
        features = vision(picture, places)
        assert_close(features[0], io[f"{key}.vit_output"])
        assert_close(model.connector(features)[0], io[f"{key}.connector"])
        assert_close(model.feature_vectors(picture)[0], io[f"{key}.llm_input"][1:-1])
        assert io[f"{key}.llm_position_ids"].tolist() == [i] * (places.size + 2)
        model.read_picture(pixels(io[f"{key}.pixels"]), cache)
    assert cache.positions.tolist() == [images]
    logits = read(model, io[f"{name}.text_ids"], cache)
    assert_close(logits[0], io[f"{name}.text_logits"][-1])
    assert cache.positions.tolist() == io[f"{name}.rope"].tolist()
    assert cache.lengths.tolist() == io[f"{name}.kv_len"].tolist()
    assert_close(columns(cache, -1, 0), io[f"{name}.cache_k_last"])
    assert_close(columns(cache, -1, 1), io[f"{name}.cache_v_last"])
    tokens, steps = greedy(model, cache, io[f"{name}.greedy_tokens"].size)
    assert tokens == io[f"{name}.greedy_tokens"].tolist()
    assert_close(steps, io[f"{name}.greedy_step_logits"])


def prompt(golden: Golden) -> KVCache:
    """The full context of text to image."""
    return golden.model.prefill(np.array(golden.io["t2i.prompt_ids"])[None], np.array([10]))[1]


def test_noisy_block(golden: Golden) -> None:
    model, io = golden
    cache, x = prompt(golden), io["t2i.noise"][None]
    for key in ("t2i.t0", "t2i.t1"):
        t = io[f"{key}.timestep"][None]
        assert_close(model.time_embedder(t)[0], io[f"{key}.time_embed"])
        assert_close(model.vae2llm(x)[0], io[f"{key}.vae2llm"])
        assert_close(model.latent_vectors(x, t, model.config.grid)[0], io[f"{key}.llm_input"][1:-1])
        hidden = model._read_picture_block(
            model.latent_vectors(x, t, model.config.grid), cache, latents=True, store=False
        )
        official = mx.concatenate([hidden[:, :1], hidden[:, 2:], hidden[:, 1:2]], 1)
        assert_close(official[0], io[f"{key}.final_norm"])
        assert_close(model.flow(x, t, cache)[0], io[f"{key}.v_cond"])
        assert_close(model.flow(x, t, model.guide([[]]))[0], io[f"{key}.v_cfg_text_branch"])
    assert cache.lengths.tolist() == io["t2i.kv_len"].tolist(), "painting has written into the cache"


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("least", [0.0, 0.6])
@pytest.mark.parametrize("images", ["text", "text_img"])
def test_guidance(golden: Golden, renorm: str, least: float, images: str) -> None:
    io = golden.io
    scale = float(io["edit.sample.cfg_img_scale"]) if images == "text_img" else 1.0
    guidance = BagelGuidance(float(io["t2i.sample.cfg_text_scale"]), scale, renorm=renorm, minimum=least)
    for key in ("t2i.t0", "t2i.t1", "edit.t0"):
        v, text, image = (io[f"{key}.v_{n}"][None] for n in ("cond", "cfg_text_branch", "cfg_img_branch"))
        assert_close(guidance(v, text, image)[0], io[f"{key}.v_{images}_{renorm}_min{least}"])


def settings(io: dict[str, mx.array], key: str) -> tuple[BagelGuidance, list[float]]:
    def number(name: str) -> float:
        return float(io[f"{key}.{name}"])

    low, high = io[f"{key}.cfg_interval"].tolist()
    guidance = BagelGuidance(
        number("cfg_text_scale"), number("cfg_img_scale"), (low, high),
        RENORMS[int(number("cfg_renorm_type"))], number("cfg_renorm_min"),
    )  # fmt: skip
    times = flow_times(int(number("num_timesteps")), number("timestep_shift"))
    np.testing.assert_allclose(times[:-1], np.array(io[f"{key}.timesteps"]), atol=1e-6)
    return guidance, times


@pytest.mark.parametrize("name", ["sample", "sample_plain"])
def test_painting(golden: Golden, name: str) -> None:
    model, io = golden
    guidance, times = settings(io, f"t2i.{name}")
    x = paint_flow(model, io["t2i.noise"][None], times, prompt(golden), model.guide([[]]), guidance=guidance)
    assert_close(x[0], io[f"t2i.{name}.final_latent_tokens"], SAMPLES)


def test_autoencoder(golden: Golden) -> None:
    coder, io = golden.model.autoencoder, golden.io
    moments = coder.encode(io["ae.pixels"].transpose(0, 2, 3, 1))
    assert_close(mx.concatenate(moments, -1).transpose(0, 3, 1, 2), io["ae.encoder_moments"])
    z = coder.normalize(moments.sample(io["ae.posterior_noise"].transpose(0, 2, 3, 1)))
    assert_close(z.transpose(0, 3, 1, 2), io["ae.latent"])
    decoded = coder.decode(coder.denormalize(io["ae.latent"].transpose(0, 2, 3, 1)))
    assert_close(decoded.transpose(0, 3, 1, 2), io["ae.decoded"], SAMPLES)


def test_patches_of_the_latent(golden: Golden) -> None:
    model, io = golden
    tokens, key = io["t2i.sample.final_latent_tokens"][None], "t2i.sample"
    latents = unpatchify(tokens, 10, 6, 2)
    assert mx.array_equal(latents.transpose(0, 3, 1, 2), io[f"{key}.final_latent_map"])
    shown = model.decode(tokens)
    assert_close(shown.transpose(0, 3, 1, 2), mx.clip(io[f"{key}.decoded"] / 2 + 0.5, 0, 1), SAMPLES)
    levels = np.floor(np.array(shown[0]) * 255)
    assert np.abs(levels - np.array(io[f"{key}.image_uint8"]).astype(int)).max() <= 1


class Edit(NamedTuple):
    """The three contexts of the golden's edit."""

    full: KVCache
    without_text: KVCache
    without_image: KVCache


@pytest.fixture(scope="module")
def edit(golden: Golden) -> Edit:
    model, io = golden
    coder = model.autoencoder
    noise = io["edit.posterior_noise"].transpose(0, 2, 3, 1)
    moments = coder.encode(io["edit.vae_pixels"].transpose(1, 2, 0)[None])
    x0 = patchify(coder.normalize(moments.sample(noise)), 2)
    assert_close(model.vae2llm(x0)[0], io["edit.vae_block.vae2llm"])
    full = model.new_cache(1)
    model.read_latents(x0, full, GRID)
    assert full.positions.tolist() == [1]
    model.read_picture(pixels(io["edit.vit_pixels"]), full)
    assert full.positions.tolist() == io["edit.rope_after_image"].tolist()
    without_text = full.snapshot()
    read(model, io["edit.prompt_ids"], full)
    assert full.positions.tolist() == io["edit.rope_after_text"].tolist()
    without_image = model.new_cache(1)
    read(model, io["edit.prompt_ids"], without_image)
    return Edit(full, without_text, without_image)


def test_editing_contexts(golden: Golden, edit: Edit) -> None:
    model, io = golden
    assert edit.full.lengths.tolist() == io["edit.kv_len"].tolist()
    assert edit.without_text.lengths.tolist() == io["edit.cfg_text_kv_len"].tolist()
    assert edit.without_image.lengths.tolist() == io["edit.cfg_img_kv_len"].tolist()
    # We hold the picture's end behind its begin, the official cache behind its latents.
    official = mx.array([0, *range(2, 14), 1, *range(14, 49)])
    for layer, name in ((0, "layer0"), (-1, "last")):
        for of, letter in enumerate("kv"):
            assert_close(columns(edit.full, layer, of)[official], io[f"edit.cache_{letter}_{name}"])
    x, t = io["edit.noise"][None], io["edit.t0.timestep"][None]
    branches = ("v_cond", "v_cfg_text_branch", "v_cfg_img_branch")
    for cache, name in zip(edit, branches, strict=True):
        assert_close(model.flow(x, t, cache, GRID)[0], io[f"edit.t0.{name}"])
        assert cache.positions[0] == io[f"edit.{QUERY[name]}query_position_ids"][0].item()


QUERY = {"v_cond": "", "v_cfg_text_branch": "cfg_text_", "v_cfg_img_branch": "cfg_img_"}


@pytest.mark.parametrize("name", ["sample", "sample_global"])
def test_editing(golden: Golden, edit: Edit, name: str) -> None:
    model, io = golden
    guidance, times = settings(io, f"edit.{name}")
    x = paint_flow(model, io["edit.noise"][None], times, *edit, guidance=guidance, grid=GRID)
    assert_close(x[0], io[f"edit.{name}.final_latent_tokens"], SAMPLES)


# ---- training masks -----------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """The official packing of three samples, with latents last."""

    order: np.ndarray
    """Packed index of each of our tokens."""
    plain: int
    mask: mx.array
    positions: mx.array
    t: list[float]
    """Time of each of the three latent pictures."""


def packed(io: dict[str, mx.array]) -> Packed:
    text, vit, vae = (
        np.array(io[f"train.packed_{n}"]) for n in ("text_indexes", "vit_token_indexes", "vae_token_indexes")
    )
    order = np.concatenate([text, vit, vae])
    mask = np.zeros((order.size, order.size), bool)
    start = 0
    for i in range(3):
        block = np.array(io[f"train.mask{i}"]) > 0
        mask[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    logits = np.array(io["train.packed_timesteps"])
    firsts = np.cumsum([0, *(rows * columns for rows, columns in io["train.latent_shapes"].tolist())])[:-1]
    even = 1 / (1 + np.exp(-logits[firsts].astype(np.float64)))
    return Packed(
        order,
        text.size + vit.size,
        mx.array(mask[order][:, order][None, None]),
        mx.array(np.array(io["train.packed_position_ids"])[order][None]),
        (3 * even / (1 + 2 * even)).tolist(),
    )


def training_vectors(model: Bagel, io: dict[str, mx.array], t: list[float]) -> mx.array:
    """All token vectors of the three samples: text, pictures to read, latents. [1, T, D]"""
    parts = [model.embed_tokens(io["train.packed_text_ids"])[None]]
    start = 0
    for length in io["train.vit_token_seqlens"].tolist():
        places = np.array(io["train.packed_vit_position_ids"])[start : start + length]
        rows, columns = places.max() // 8 + 1, (places % 8).max() + 1
        patches = io["train.packed_vit_tokens"][None, start : start + length]
        parts.append(model.feature_vectors(unpatchify(patches, 4 * rows, 4 * columns, 4)))
        start += length
    start = 0
    for i, (rows, columns) in enumerate(io["train.latent_shapes"].tolist()):
        latent = io["train.padded_latent"][i, :, : 2 * rows, : 2 * columns].transpose(1, 2, 0)
        x0 = patchify(latent[None], 2)
        noise = io["train.flow_noise"][None, start : start + rows * columns]
        parts.append(model.latent_vectors((1 - t[i]) * x0 + t[i] * noise, mx.array([t[i]]), (rows, columns)))
        start += rows * columns
    return mx.concatenate(parts, 1)


def losses(model: Bagel, io: dict[str, mx.array], p: Packed) -> tuple[mx.array, mx.array]:
    """Cross-entropies of the texts with loss, squared errors of the noisy latents."""
    x = training_vectors(model, io, p.t)
    hidden = model.decoder(x, p.plain, p.positions, p.mask, [None] * len(model.decoder.layers))[0][0]
    place = np.argsort(p.order)  # of our tokens, by packed index
    said = model.lm_head(hidden[mx.array(place[np.array(io["train.ce_loss_indexes"])])])
    ce = nn.losses.cross_entropy(said, io["train.packed_label_ids"])
    flow = model.llm2vae(hidden[mx.array(place[np.array(io["train.mse_loss_indexes"])])])
    wanted, start = [], 0
    for i, (rows, columns) in enumerate(io["train.latent_shapes"].tolist()):
        if p.t[i] > 0:
            latent = io["train.padded_latent"][i, :, : 2 * rows, : 2 * columns].transpose(1, 2, 0)
            noise = io["train.flow_noise"][start : start + rows * columns]
            wanted.append(noise - patchify(latent[None], 2)[0])
        start += rows * columns
    return ce, mx.square(flow - mx.concatenate(wanted))


def test_training(golden: Golden) -> None:
    """Three packed samples under the official masks: inputs, states, both losses, and gradients of all parts."""
    model, io = golden
    p = packed(io)
    x = training_vectors(model, io, p.t)
    assert_close(x[0], io["train.llm_input"][mx.array(p.order)])
    first = model.decoder.layers[0](x, p.plain, model.decoder.turn(p.positions), p.mask)[0]
    assert_close(first[0], io["train.layer0"][mx.array(p.order)])
    hidden = model.decoder(x, p.plain, p.positions, p.mask, [None] * len(model.decoder.layers))[0]
    assert_close(hidden[0], io["train.final_norm"][mx.array(p.order)])
    ce, mse = losses(model, io, p)
    assert_close(ce, io["train.ce"])
    assert_close(mse, io["train.mse"])

    def total(weights: dict) -> mx.array:
        model.update(weights)
        ce, mse = losses(model, io, p)
        return ce.mean() + mse.mean()

    weights = model.trainable_parameters()
    value, gradient = mx.value_and_grad(total)(weights)
    model.update(weights)
    assert_close(value, io["train.total"])
    ours = dict(tree_flatten(gradient))
    names = {e.source: e.target for e in convert.entries(model.config)}
    known = [key for key in io if key.startswith("train.grad.")]
    assert len(known) == 7
    for key in known:
        theirs = np.array(io[key])
        mine = np.array(ours[names[key.removeprefix("train.grad.")]])
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-3 * np.abs(theirs).max())


# ---- the interface of every family --------------------------------------------------------------------------------


def test_velocity_is_the_flow_in_trigflow(golden: Golden) -> None:
    """Euler's steps of the flow are DDIM's at its angles, so the shared sampler paints the official picture."""
    model, io = golden
    cache = prompt(golden)
    _, times = settings(io, "t2i.sample_plain")
    angles = [trigflow.angle_from_flow_time(t) for t in times]
    np.testing.assert_allclose(angles, sampling.angle_schedule(5, spacing="flow"), atol=1e-12)
    x = sampling.ddim(lambda x, a: model.velocity(x, mx.full((1,), a), cache), io["t2i.noise"][None], angles)
    assert_close(x[0], io["t2i.sample_plain.final_latent_tokens"], SAMPLES)


def test_the_shared_sampler_paints_the_official_guided_picture(golden: Golden) -> None:
    """Shifted times, guidance inside its interval, and the norm held back, all through the family's interface."""
    model, io = golden
    cache = prompt(golden).stack(model.guide([[]]))
    angles = sampling.angle_schedule(5, spacing="shifted")
    _, times = settings(io, "t2i.sample")
    np.testing.assert_allclose(angles, [trigflow.angle_from_flow_time(t) for t in times], atol=1e-7)
    low = trigflow.angle_from_flow_time(io["t2i.sample.cfg_interval"][0].item())

    def velocity(x: mx.array, angle: float) -> mx.array:
        v = model.velocity(mx.concatenate([x, x]), mx.full((2,), angle), cache)
        scale = float(io["t2i.sample.cfg_text_scale"])
        return model.guided(v[:1], v[1:], scale, x, angle) if angle > low else v[:1]

    x = sampling.ddim(velocity, io["t2i.noise"][None], angles)
    assert_close(x[0], io["t2i.sample.final_latent_tokens"], SAMPLES)


def test_rows_of_different_lengths_do_not_mix(golden: Golden) -> None:
    """Prompts, and a guide that holds nothing, in one batch: each as by itself."""
    model, io = golden
    prefixes = [model.image_prefix([5, 6, 7]), model.image_prefix([9])]
    both = prefill(model, prefixes).stack(model.guide(prefixes))
    x = mx.concatenate([io["t2i.noise"][None] * s for s in (1.0, 0.5, 1.5)])
    angles = mx.array([1.3, 0.4, 0.9])
    out = model.velocity(x, angles, both)
    singles = [*(prefill(model, [p]) for p in prefixes), model.guide(prefixes)]
    for i, cache in enumerate(singles):
        assert_close(out[i], model.velocity(x[i : i + 1], angles[i : i + 1], cache)[0], 1e-5)
    logits = model.extend_text(np.array([[3, 4, 5], [6, 0, 0], [7, 8, 0]]), np.array([3, 1, 2]), both)
    for i, (cache, ids) in enumerate(zip(singles, ([3, 4, 5], [6], [7, 8]), strict=True)):
        assert_close(logits[i], read(model, mx.array(ids), cache)[0], 1e-5)
    assert both.positions.tolist() == [8, 4, 2]


def test_cached_equals_uncached(golden: Golden) -> None:
    """Text read token by token, or at once, or behind pictures in one pass without a cache."""
    model, io = golden
    ids = np.array(io["und.text_ids"])
    one, many = model.new_cache(1), model.new_cache(1)
    for cache in (one, many):
        model.read_picture(pixels(io["und.image0.pixels"]), cache)
    at_once = read(model, mx.array(ids), many)
    for token in ids:
        step = read(model, mx.array([int(token)]), one)
    assert_close(step, at_once, 1e-5)

    picture = model.feature_vectors(io["und.image0.pixels"].transpose(1, 2, 0)[None])
    ends = model.embed_tokens(mx.array([[153, 154]]))
    x = mx.concatenate([ends[:, :1], picture, ends[:, 1:], model.embed_tokens(mx.array(ids[None]))], 1)
    n, t = picture.shape[1] + 2, x.shape[1]
    mask = np.tril(np.ones((t, t), bool))
    mask[:n, :n] = True
    positions = np.concatenate([np.zeros(n), 1 + np.arange(ids.size)])[None]
    hidden, _ = model.decoder(x, t, mx.array(positions), mx.array(mask[None, None]), [None] * 2)
    assert_close(model.lm_head(hidden[:, -1]), at_once, 1e-5)


def test_forward_mode(golden: Golden) -> None:
    cache, x = prompt(golden), golden.io["t2i.noise"][None]
    assert_forward_mode(golden.model, x, cache, "decoder.layers.0.generate.q_proj.weight")


def test_sizes_of_pictures() -> None:
    with pytest.raises(UserError, match="image_width is 44, expected a multiple of 8 up to 64"):
        load_golden(image_width=44)
    with pytest.raises(UserError, match="input_height is 36, expected a multiple of 4 up to 32"):
        load_golden(input_height=36)


def test_half_precision() -> None:
    """bfloat16 weights stay what they are through the whole model, and its numbers near those of float32."""
    model = load_golden(image_height=40, image_width=24)
    x = mx.random.normal((1, *model.latent_shape), key=mx.random.key(0))
    angle, prompt = mx.array([0.9]), [model.image_prefix([5, 6, 7])]
    full = model.velocity(x, angle, prefill(model, prompt))
    model.set_dtype(mx.bfloat16)
    cache = prefill(model, prompt)
    half = model.velocity(x, angle, cache)
    model.extend_image(x, cache)
    assert all(past[0].dtype == past[1].dtype == mx.bfloat16 for past in cache.layers if past)
    assert 0 < float(mx.abs(full - half).max()) < 0.05 * float(mx.abs(full).max())
