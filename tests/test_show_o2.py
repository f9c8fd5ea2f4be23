"""Show-o2 against numbers of the official code: reading, writing, painting, training; a family's contract."""

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
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.patches import patchify, unpatchify
from mlx_transfusion.models.show_o2 import ShowO2, _whole_rows
from mlx_transfusion.models.show_o2_config import ShowO2Config
from mlx_transfusion.models.show_o2_vision import cubic_weights
from mlx_transfusion.painting import prefill

try:
    from mlx_transfusion.convert import show_o2 as convert
except ModuleNotFoundError:  # only the tree is on the path, the package is not installed
    from convert import show_o2 as convert

FOLDER = Path(__file__).parent / "fixtures" / "show-o2"
GUIDED, SAMPLES = 3e-4, 5e-4
"""The golden's tolerances: of guided velocities; of samples and pictures. `assert_close` has that of states."""
SCALE = 5.0
"""Guidance of the golden."""


class Golden(NamedTuple):
    """The official code's tiny model, and its numbers."""

    model: ShowO2
    io: dict[str, mx.array]


def load_golden(**fields: int) -> ShowO2:
    """The converted model, with another grid if need be."""
    return convert_in_memory(convert, FOLDER, ShowO2Config, ShowO2, **fields)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden(load_golden(), mx.load(str(FOLDER / "io.safetensors")))


def to_patches(latents: mx.array) -> mx.array:
    """Official latents [B, C, H, W] -> ours [B, N, P]."""
    return patchify(latents.transpose(0, 2, 3, 1), 2)


def to_latents(patches: mx.array, height: int = 8, width: int = 8) -> mx.array:
    """The way back."""
    return unpatchify(patches, height, width, 2).transpose(0, 3, 1, 2)


def read(model: ShowO2, ids: list[int], cache: KVCache) -> mx.array:
    return model.extend_text(np.array([ids]), np.array([len(ids)]), cache)[0]


def greedy(model: ShowO2, cache: KVCache, logits: mx.array, count: int) -> list[int]:
    out: list[int] = []
    for _ in range(count):
        out.append(int(mx.argmax(logits)))
        logits = read(model, out[-1:], cache)
    return out


def prefixes(io: dict[str, mx.array], key: str) -> list[list[int]]:
    """What stands before the picture in each row."""
    starts = [spans[-1][0] for spans in io[f"{key}.modality_positions"].tolist()]
    return [ids[:start] for ids, start in zip(io[f"{key}.ids"].tolist(), starts, strict=True)]


# ---- the golden ---------------------------------------------------------------------------------------------------


def test_text(golden: Golden) -> None:
    model, io = golden
    x = model.model.embed_tokens(io["text.ids"])
    assert_close(x, io["text.llm_input"])
    states = [x]
    for layer in model.model.layers:
        states.append(layer(states[-1], "causal")[0])
    assert_close(states[1], io["text.llm_layer0"])
    assert_close(states[-1], io["text.llm_last_layer"])
    assert_close(model.model.norm(states[-1]), io["text.llm_final_norm"])
    assert_close(model.logits(model.model.norm(states[-1])), io["text.logits"])
    cache = model.new_cache(1)
    logits = read(model, io["text.ids"][0].tolist(), cache)
    assert_close(logits, io["text.logits"][0, -1])
    assert greedy(model, cache, logits, 6) == io["text_greedy.tokens"].tolist()


def test_understanding_as_questions_are_answered(golden: Golden) -> None:
    model, io = golden
    patches = to_patches(io["mmu.latents"])
    vision = model.vision
    assert_close(vision.embed_und(patches), io["mmu.embed_und"])
    assert_close(vision.embed_gen(patches), io["mmu.embed_gen"])
    assert_close(
        vision.layers[0](vision.embed_und(patches) + vision.table((4, 4), False)), io["mmu.und_layer0"]
    )
    assert_close(vision.semantic(patches, (4, 4), False), io["mmu.und_output"])
    assert_close(vision(patches, (4, 4), False), io["mmu.fused"])
    assert_close(model.time_embed(mx.ones(1)), io["mmu.time_embed"][0])
    vectors = model.picture_vectors(patches, mx.ones(1))
    assert_close(vectors[:, :1], io["mmu.time_embed_proj"])
    assert_close(vectors, io["mmu.inputs_embeds"][:, 6:23])

    cache = model.new_cache(1)
    read(model, io["mmu.ids_before"][0].tolist(), cache)
    boi, eoi, *question = io["mmu.ids_after"][0].tolist()
    assert (boi, eoi) == (model.config.boi_token_id, model.config.eoi_token_id)
    assert_close(model.read_latents(patches, cache)[0], io["mmu.logits"][0, 23])
    logits = read(model, question, cache)
    assert_close(logits, io["mmu.logits"][0, -1])
    assert greedy(model, cache, logits, 6) == io["mmu.greedy_tokens"].tolist()


@pytest.mark.parametrize("time", [1.0, 0.0])
def test_understanding_as_in_training(golden: Golden, time: float) -> None:
    model, io = golden
    (ids,), ((start, length),) = io["und_only.ids"].tolist(), io["und_only.modality_positions"][0].tolist()
    cache = model.new_cache(1)
    read(model, ids[:start], cache)
    hidden = model._read_painted(to_patches(io["und_only.latents"]), mx.array([time]), cache)
    logits = read(model, ids[start + length :], cache)
    if time == io["und_only.t"].item():
        assert_close(model.logits(hidden), io["und_only.logits"][:, start : start + length])
        assert_close(logits, io["und_only.logits"][0, -1])
    else:
        assert greedy(model, cache, logits, 5) == io["und_only.greedy_tokens_t0"].tolist()


def test_head(golden: Golden) -> None:
    """All parts of a velocity, for two prompts of different length and two rows without one in a single batch."""
    model, io = golden
    noise, t = io["t2i.noise"], io["t2i.t1.t"]
    patches = to_patches(mx.concatenate([noise, noise]))
    cache = prefill(model, prefixes(io, "t2i"))
    vectors = model.picture_vectors(patches, t)
    assert_close(model.vision.semantic(patches, (4, 4), False), io["t2i.t1.und_output"])
    assert_close(vectors[:, 1:], io["t2i.t1.fused"])
    assert_close(vectors[:, 0], io["t2i.t1.time_embed_proj"])
    hidden, _ = model._run(
        vectors, mx.array(cache.visible(np.ones(vectors.shape[:2], bool))[:, None, None]), cache
    )
    row, kinds, mask, back = _whole_rows(cache, hidden)
    times = mx.stack([model.time_embed(t), model.time_embed(mx.ones_like(t))], 1)
    assert_close(times[:, 0], io["t2i.t1.time_embed"])
    x = model.flow_head.enter(row)
    states = [x, *(x := layer(x, times, kinds, mask) for layer in model.flow_head.layers)]
    out = model.flow_head.leave(states[-1], times, kinds)
    for i, (start, length) in enumerate(spans[0] for spans in io["t2i.modality_positions"].tolist()):
        end = start + length
        assert back[i].tolist() == list(range(start, end))
        visible = np.array(io["t2i.visible0"])[:end, :end] > 0
        assert i > 0 or (np.array(mask)[0, 0, :end, :end] == visible).all()
        assert_close(row[i, :end], io["t2i.t1.llm_final_norm"][i, :end])
        assert_close(states[0][i, :end], io["t2i.t1.diff_proj"][i, :end])
        assert_close(states[1][i, :end], io["t2i.t1.head_layer0"][i, :end])
        assert_close(states[2][i, :end], io["t2i.t1.head_layer1"][i, :end])
        assert_close(out[i, start:end], io["t2i.t1.head_output"][i, start:end])


@pytest.mark.parametrize(("key", "grid"), [("t2i", (4, 4)), ("t2i_res2", (5, 3))])
def test_painting(golden: Golden, key: str, grid: tuple[int, int]) -> None:
    """Velocities and samples, by the shared sampler; the second size resizes the table of positions."""
    io = golden.io
    model = golden.model if key == "t2i" else load_golden(grid_height=grid[0], grid_width=grid[1])
    noise = io[f"{key}.noise"]
    size = noise.shape[2:]
    prompts = prefixes(io, key)
    pictures = len(noise)
    both = prefill(model, prompts)
    if key != "t2i":
        assert_close(model.vision.table(grid, True), io[f"{key}.interpolated_position_table"], 1e-6)
    x = to_patches(mx.concatenate([noise, noise]))
    for step in ("t0", "t1"):
        v = model.flow(x, io[f"{key}.{step}.t"], both)
        assert_close(to_latents(v, *size), io[f"{key}.{step}.v"])
        guided = sampling.guided(v[:pictures], v[pictures:], SCALE)
        assert_close(to_latents(guided, *size), io[f"{key}.{step}.v_guided"], GUIDED)

    angles = [trigflow.angle_from_flow_time(1 - t) for t in io[f"{key}.sample.timesteps"].tolist()]
    angles[0], angles[-1] = trigflow.NOISE_ANGLE, 0.0
    np.testing.assert_allclose(sampling.angle_schedule(len(angles) - 1, spacing="shifted"), angles, atol=1e-6)

    def guided_velocity(x: mx.array, angle: float) -> mx.array:
        v = model.velocity(mx.concatenate([x, x]), mx.full((2 * pictures,), angle), both)
        return sampling.guided(v[:pictures], v[pictures:], SCALE)

    def plain_velocity(x: mx.array, angle: float) -> mx.array:
        return model.velocity(x, mx.full((pictures,), angle), both.select(list(range(pictures))))

    for name, velocity in (("sample", guided_velocity), ("sample_plain", plain_velocity)):
        x0 = sampling.ddim(velocity, to_patches(noise), angles)
        assert_close(to_latents(x0, *size), io[f"{key}.{name}.final_latent"], SAMPLES)
        if f"{key}.{name}.decoded" in io:
            shown = model.decode(x0[:1]).transpose(0, 3, 1, 2)
            assert_close(shown, io[f"{key}.{name}.decoded"] / 2 + 0.5, SAMPLES)


def test_painting_behind_a_picture(golden: Golden) -> None:
    """The second picture of a row sees the first one, clean, and the text between them."""
    model, io = golden
    (ids, without), latents = io["mixed.ids"].tolist(), to_patches(io["mixed.latents"])
    (first, length), (second, _) = io["mixed.modality_positions"][0].tolist()
    cache = model.new_cache(1)
    read(model, ids[:first], cache)
    model.extend_image(latents[:1], cache)
    read(model, ids[first + length : second], cache)
    guide = model.guide([[]])
    assert guide.lengths.tolist() == [2]
    assert without[:2] == [model.config.bos_token_id, model.config.boi_token_id]
    t = mx.array([0.3])
    v = model.flow(latents[1:2], t, cache)
    u = model.flow(latents[3:4], t, guide)
    assert_close(to_latents(sampling.guided(v, u, SCALE)), io["mixed.v_guided_t03"][1:2], GUIDED)


def test_autoencoder(golden: Golden) -> None:
    coder, io = (
        golden.model.autoencoder,
        {n: v[:, :, 0].transpose(0, 2, 3, 1) for n, v in golden.io.items() if n.startswith("vae.")},
    )
    mean, logvar = coder.encode(io["vae.pixels"])
    assert_close(mean, io["vae.mean_normalised"])
    assert_close(logvar, io["vae.log_var"])
    assert_close(mean + mx.exp(logvar / 2) * io["vae.posterior_noise"], io["vae.latent"])
    assert_close(coder.decode(io["vae.latent"]), io["vae.decoded"], SAMPLES)
    with pytest.raises(UserError, match="expected multiples of 8"):
        coder.encode(mx.zeros((1, 24, 20, 3)))


# ---- training -----------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Two rows of two slots for pictures; an idle slot has length 0."""

    spans: list[list[tuple[int, int]]]
    kinds: mx.array
    mask: mx.array


def training_rows(io: dict[str, mx.array]) -> Rows:
    spans = io["train.modality_positions"].tolist()
    kinds = np.zeros(io["train.ids"].shape, np.int32)
    for row, slots in zip(kinds, spans, strict=True):
        for k, (start, length) in enumerate(slots):
            row[start : start + length] = 1 + k
    same = (kinds[:, :, None] == kinds[:, None]) & (kinds[:, :, None] > 0)
    mask = same | np.tril(np.ones(same.shape[1:], bool))
    return Rows(spans, mx.array(kinds), mx.array(mask[:, None]))


def training_vectors(model: ShowO2, io: dict[str, mx.array], rows: Rows) -> mx.array:
    """Embedded rows with pictures in their spans; an idle slot still writes its time over the first token."""
    pictures = model.picture_vectors(to_patches(io["train.xt"]), io["train.t"])
    out = []
    for i, x in enumerate(model.model.embed_tokens(io["train.ids"])):
        for k, (start, length) in enumerate(rows.spans[i]):
            written = max(length, 1)
            x = mx.concatenate([x[:start], pictures[2 * i + k, :written], x[start + written :]])
        out.append(x)
    return mx.stack(out)


def training_losses(
    model: ShowO2, io: dict[str, mx.array], rows: Rows
) -> tuple[mx.array, mx.array, mx.array]:
    """Logits, next-token loss, and squared error of the velocity."""
    hidden, _ = model.model.run(training_vectors(model, io, rows), rows.mask)
    times = model.time_embed(io["train.t"]).reshape(2, 2, -1)
    states = model.flow_head(hidden, times, rows.kinds, rows.mask)
    out = model.flow_head.leave(states, times, rows.kinds)
    logits, labels = model.logits(hidden), io["train.text_labels"][:, 1:]
    ce = nn.losses.cross_entropy(logits[:, :-1], mx.maximum(labels, 0))
    text = labels >= 0
    errors = []
    for i, slots in enumerate(rows.spans):
        for k, (start, length) in enumerate(slots):
            if length:
                strips = io["train.ut"][2 * i + k].transpose(1, 2, 0).reshape(length - 1, -1)
                errors.append(mx.square(out[i, start + 1 : start + length] - strips))
    return logits, (ce * text).sum() / text.sum(), mx.concatenate(errors).mean()


def test_training(golden: Golden) -> None:
    model, io = golden
    rows = training_rows(io)
    logits, words, flow = training_losses(model, io, rows)
    assert_close(logits, io["train.logits"])
    assert_close(words, io["train.loss_ntp"])
    assert_close(flow, io["train.loss_flow"])

    def total(weights: dict) -> mx.array:
        model.update(weights)
        _, words, flow = training_losses(model, io, rows)
        return 0.5 * words + flow

    weights = model.trainable_parameters()
    gradient = dict(tree_flatten(mx.grad(total)(weights)))
    model.update(weights)
    entries = {e.source: e for e in convert.entries(model.config)}
    known = [key for key in io if key.startswith("train.grad.")]
    assert len(known) == 8
    for key in known:
        entry = entries[key.removeprefix("train.grad.")]
        assert entry.target is not None
        mine, theirs = np.array(entry.op.back(gradient[entry.target], entry.shape)), np.array(io[key])
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-3 * np.abs(theirs).max(), err_msg=key)


# ---- the interface of every family --------------------------------------------------------------------------------


def test_cached_equals_uncached(golden: Golden) -> None:
    """A row read in pieces, padded among others, and in one piece: the same velocity and the same words."""
    model, io = golden
    prompts = [[162, 5, 6, 7, 163], [162, 163]]
    pieces = model.new_cache(2)
    model.extend_text(np.array([[162, 5], [162, 0]]), np.array([2, 1]), pieces)
    model.extend_text(np.array([[6, 7, 163], [163, 0, 0]]), np.array([3, 1]), pieces)
    assert not pieces.valid.all()
    x = to_patches(mx.concatenate([io["t2i.noise"][:1]] * 2))
    angles = mx.array([1.2, 0.5])
    out = model.velocity(x, angles, pieces)
    for i, prompt in enumerate(prompts):
        alone = prefill(model, [prompt])
        assert_close(out[i], model.velocity(x[i : i + 1], angles[i : i + 1], alone)[0], 1e-5)
    model.extend_image(x, pieces)
    out = model.velocity(x, angles, pieces)
    words = model.extend_text(np.array([[164, 9], [164, 0]]), np.array([2, 1]), pieces)
    for i, prompt in enumerate(prompts):
        alone = prefill(model, [prompt])
        model.extend_image(x[i : i + 1], alone)
        assert_close(out[i], model.velocity(x[i : i + 1], angles[i : i + 1], alone)[0], 1e-5)
        assert_close(words[i], read(model, [164, 9] if i == 0 else [164], alone), 1e-5)


def test_forward_mode(golden: Golden) -> None:
    model, io = golden
    cache, x = prefill(model, prefixes(io, "t2i")[:1]), to_patches(io["t2i.noise"][:1])
    assert_forward_mode(
        model, x, cache, "vision.layers.0.mlp.fc1.weight", "flow_head.layers.0.mlp.up_proj.weight",
        "time_embed.fc1.weight",
    )  # fmt: skip


@pytest.mark.parametrize("size", [(4, 7), (4, 4), (9, 4)])
def test_resizing_keeps_constants_and_lines(size: tuple[int, int]) -> None:
    old, new = size
    weights = cubic_weights(old, new)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    if old == new:
        np.testing.assert_allclose(weights, np.eye(old), atol=1e-6)
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    inside = (centres >= 1) & (centres <= old - 2)
    np.testing.assert_allclose((weights @ np.arange(old))[inside], centres[inside], atol=0.1)


def test_a_table_that_is_no_square_fits_its_own_grid_alone() -> None:
    with pytest.raises(UserError, match="expected those of the grid or a square"):
        load_golden(position_rows=15)


def test_half_precision() -> None:
    """bfloat16 weights stay what they are through the whole model, and its numbers near those of float32."""
    model = load_golden()
    x = mx.random.normal((1, *model.latent_shape), key=mx.random.key(0))
    angle, prompt = mx.array([0.9]), [model.image_prefix([5, 6, 7])]
    full = model.velocity(x, angle, prefill(model, prompt))
    model.set_dtype(mx.bfloat16)
    cache = prefill(model, prompt)
    half = model.velocity(x, angle, cache)
    model.extend_image(x, cache)
    assert all(past[0].dtype == mx.bfloat16 for past in cache.layers if past)
    assert 0 < float(mx.abs(full - half).max()) < 0.05 * float(mx.abs(full).max())
