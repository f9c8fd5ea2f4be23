"""MonoFormer against numbers of the official code: both goldens, the sampler, and the interface of every family."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from convert_package import module
from mlx.utils import tree_map

from mlx_transfusion import losses, trigflow
from mlx_transfusion.cli import main
from mlx_transfusion.errors import UserError
from mlx_transfusion.events import Painted, Token
from mlx_transfusion.images import load_pixels
from mlx_transfusion.interleave import complete, describe
from mlx_transfusion.model_io import Loaded, load
from mlx_transfusion.models import ddpm
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.monoformer import MonoFormer
from mlx_transfusion.models.monoformer_config import MonoFormerConfig
from mlx_transfusion.models.patches import patchify
from mlx_transfusion.painting import paint, prefill
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.text_to_image import generate_images

convert, families, sources, table = (module(name) for name in ("monoformer", "families", "sources", "table"))

FIXTURES = Path(__file__).parent / "fixtures"
CODER = FIXTURES / "kl-sd"
TOLERANCE = 1e-4
"""Of the goldens, absolute; relative to the largest value where the random network's samples grow."""


class Golden(NamedTuple):
    """A tiny model of the official code and its numbers."""

    model: MonoFormer
    io: dict[str, mx.array]
    folder: Path


def foreign(folder: Path) -> dict[str, mx.array]:
    """The tensors of a golden and of its autoencoder, by the names of the plan."""
    coder = mx.load(str(CODER / "model.safetensors"))
    return mx.load(str(folder / "model.safetensors")) | {f"{convert.CODER}{n}": x for n, x in coder.items()}


def load_golden(name: str) -> Golden:
    folder = FIXTURES / name
    plan = convert.plan(sources.Source(folder, autoencoder=CODER))
    config = MonoFormerConfig.from_dict(json.loads(json.dumps(plan.config)))
    model = MonoFormer(config)
    weights = table.forward(plan.entries, foreign(folder))
    model.load_weights(list(weights.items()))
    model.eval()
    return Golden(model, mx.load(str(folder / "io.safetensors")), folder)


@pytest.fixture(scope="module", params=["monoformer", "monoformer-clip"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="module")
def clip() -> Golden:
    return load_golden("monoformer-clip")


def assert_close(ours: mx.array, theirs: mx.array, scale: float = 1.0) -> None:
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=0, atol=TOLERANCE * scale)


def patches(latents: mx.array) -> mx.array:
    """[B, C, H, W] -> [B, N, P]."""
    return patchify(latents.transpose(0, 2, 3, 1), 2)


def prefixes(golden: Golden) -> list[list[int]]:
    """What stands before the image's id in the two rows."""
    rows = np.array(golden.io["gen.input_ids"]).tolist()
    return [row[: row.index(golden.model.config.image_token_id)] for row in rows]


def caches(golden: Golden) -> KVCache:
    return prefill(golden.model, prefixes(golden))


def full(golden: Golden, ids: Sequence[int]) -> np.ndarray:
    """Logits [T, V] after every token of a text, read at once and without a cache."""
    model = golden.model
    hidden = model._read(
        model.embed_tokens(mx.array([ids])), np.ones((1, len(ids)), bool), model.new_cache(1), store=False
    )
    return np.array(model.lm_head(hidden)[0])


def greedy(golden: Golden, cache: KVCache, logits: mx.array, count: int) -> list[int]:
    out: list[int] = []
    for _ in range(count):
        out.append(int(mx.argmax(logits[0])))
        logits = golden.model.extend_text(np.array([out[-1:]]), np.array([1]), cache)
    return out


# ---- the golden --------------------------------------------------------------------------------------------


def test_text(golden: Golden) -> None:
    ids = np.array(golden.io["text.input_ids"])
    for row, expected in zip(ids, golden.io["text.logits"], strict=True):
        assert_close(full(golden, row.tolist()), expected)
    for row, expected in zip(ids.tolist(), np.array(golden.io["text.greedy_ids"]).tolist(), strict=True):
        logits, cache = golden.model.prefill(np.array([row]), np.array([len(row)]))
        assert greedy(golden, cache, logits, len(expected)) == expected


def test_text_in_a_padded_batch_and_piece_by_piece(golden: Golden) -> None:
    ids = np.array(golden.io["text.input_ids"])
    expected = np.array(golden.io["text.logits"])
    logits, cache = golden.model.prefill(ids[:, :6], np.array([6, 3]))
    assert_close(logits, mx.array(np.stack([expected[0, 5], expected[1, 2]])))
    rest = np.stack([ids[0, 6:10], ids[1, 3:7]])
    assert_close(
        golden.model.extend_text(rest, np.array([4, 4]), cache),
        mx.array(np.stack([expected[0, 9], expected[1, 6]])),
    )


def test_parts_of_the_picture(golden: Golden) -> None:
    model, io = golden.model, golden.io
    time = model.t_embedder(io["gen.t"])
    assert_close(time, io["gen.time_embed"])
    assert_close(model._time_token(time)[:, 0], io["gen.time_token"])
    embedded = model.x_embedder(patches(io["gen.x_t"]))
    assert_close(embedded.reshape(io["gen.patch_embed"].shape), io["gen.patch_embed"])
    assert_close(model._sines, io["gen.pos_embed"])
    assert_close(model._noisy_tokens(patches(io["gen.x_t"]))[0], embedded[0] + io["gen.pos_embed"])


def test_noise_and_variance(golden: Golden) -> None:
    io = golden.io
    x = patches(mx.concatenate([io["gen.x_t"]] * 2))
    eps, variance = golden.model.predict(x, io["gen.t"], caches(golden))
    assert_close(eps, patches(io["gen.x_out"][:, :4]))
    assert_close(variance, patches(io["gen.x_out"][:, 4:]))


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_official_guidance(golden: Golden, scale: float) -> None:
    io = golden.io
    x = patches(mx.concatenate([io["gen.x_t"]] * 2))
    eps, variance = golden.model.predict(x, io["gen.t"], caches(golden))
    expected = io[f"gen.cfg{scale:g}.x_out"]
    assert_close(golden.model.guided(eps[:1], eps[1:], scale), patches(expected[:1, :4]))
    assert_close(variance, patches(expected[:, 4:]))


def test_logits_behind_a_noisy_picture(golden: Golden) -> None:
    """The golden's row goes on behind the picture; ours does so for a picture at step 0 only: read by hand."""
    model, io = golden.model, golden.io
    start, end = np.array(io["gen.image_token_spans"])[0].tolist()
    time = model.t_embedder(io["gen.t"][:1])
    tokens = mx.concatenate([model._time_token(time), model._noisy_tokens(patches(io["gen.x_t"]))], 1)
    cache = caches(golden).select([0])
    hidden = model._read(tokens, np.ones(tokens.shape[:2], bool), cache, store=True, picture=1)
    assert_close(hidden, io["gen.last_hidden"][:1, start - 1 : end])
    end_id = np.array([[model.config.eoi_token_id]])
    assert_close(model.extend_text(end_id, np.array([1]), cache), io["gen.logits"][:1, end])


def test_training_pass(golden: Golden) -> None:
    io = golden.io
    rows = np.array(io["train.input_ids"]).tolist()
    row = next(i for i, ids in enumerate(rows) if golden.model.config.image_token_id in ids)
    before = rows[row][: rows[row].index(golden.model.config.image_token_id)]
    x = patches(io["train.x_t"][None])
    bar = float(ddpm.linear_alpha_bar()[int(io["train.t"][row])])
    mixed = trigflow.mix(io["train.x_0"], io["train.noise"], trigflow.angle_from_alpha_bar(bar))
    assert_close(mixed, io["train.x_t"])
    eps, variance = golden.model.predict(x, io["train.t"][row : row + 1], prefill(golden.model, [before]))
    assert_close(eps, patches(io["train.x_out"][None, :4]))
    assert_close(variance, patches(io["train.x_out"][None, 4:]))
    assert_close(losses.image_errors(eps, patches(io["train.noise"][None])), io["train.mse"])
    # The language loss leaves out the sample with a picture.
    labels = io["train.labels"][1 - row, 1:]
    logits = golden.model.text_logits(io["train.input_ids"][1 - row : 2 - row])[0, :-1]
    known = labels >= 0
    words = losses.text_loss(logits, mx.where(known, labels, 0), known) / known.sum()
    assert_close(words, io["train.lm_loss"])


# ---- reading pictures --------------------------------------------------------------------------------------


def test_clip_features_and_understanding(clip: Golden) -> None:
    model, io = clip.model, clip.io
    pixels = io["und.pixel_values"].transpose(0, 2, 3, 1)
    for ours, index in zip(model.vision.hidden_states(pixels), range(3), strict=True):
        assert_close(ours, io[f"und.clip.hidden_states.{index}"])
    plain = pixels * mx.array(model.config.vision.image_std) + mx.array(model.config.vision.image_mean)
    assert_close(model.vision(plain), io["und.clip_features"])
    assert_close(model.picture_vectors(plain)[:, 1:], io["und.image_embeds"])
    ids = np.array(io["und.input_ids"])[0].tolist()
    behind = ids[ids.index(model.config.eoi_token_id) + 1 :]
    _, cache = model.prefill(np.array([ids[:1]]), np.array([1]))
    logits = model.read_picture(plain, cache)
    at = io["und.logits"].shape[1] - len(behind) - 1
    assert_close(logits, io["und.logits"][:, at])
    logits = model.extend_text(np.array([behind]), np.array([len(behind)]), cache)
    assert_close(logits, io["und.logits"][:, -1])
    assert greedy(clip, cache, logits, 6) == np.array(io["und.greedy_ids"])[0].tolist()


def test_pictures_as_the_official_processor_makes_them(clip: Golden) -> None:
    image = np.array(clip.io["und.image"]).astype(np.uint8)
    pixels = mx.array(load_pixels(image, *clip.model.input_size)[None].astype(np.float32) / 255)
    ours = np.array(clip.model.vision.normalise(pixels).transpose(0, 3, 1, 2))
    theirs = np.array(clip.io["und.pixel_values"])
    # Another resampling filter: not the same bits, and the same picture.
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.95


def test_the_public_checkpoint_does_not_read_pictures() -> None:
    golden = load_golden("monoformer")
    with pytest.raises(UserError, match="no vision encoder"):
        golden.model.read_picture(mx.zeros((1, 8, 8, 3)), golden.model.new_cache(1))


# ---- DDPM --------------------------------------------------------------------------------------------------


def test_schedule(golden: Golden) -> None:
    io, bar = golden.io, ddpm.linear_alpha_bar()
    for name, count in (("sample", 5), ("sample20", 20)):
        assert ddpm.spaced_steps(1000, count) == np.array(io[f"{name}.timesteps"]).tolist()
    chain = ddpm.respaced(bar, ddpm.spaced_steps(1000, 5))
    np.testing.assert_allclose(chain.betas, np.array(io["sample.betas"]), rtol=1e-5)
    with pytest.raises(UserError, match="at least 2"):
        ddpm.respaced(bar, [3])
    with pytest.raises(UserError, match="choose 1 to 1000"):
        ddpm.spaced_steps(1000, 1001)


def test_official_samples(golden: Golden) -> None:
    """The whole chain of five steps; the random network's states grow, so the errors are relative."""
    io, seen = golden.io, []
    chain = ddpm.respaced(ddpm.linear_alpha_bar(), ddpm.spaced_steps(1000, 5))
    cache = caches(golden)
    x = golden.model.sample_ddpm(
        patches(io["sample.x_T"]), cache.select([0]), cache.select([1]), 4.0, chain,
        lambda i: patches(io["sample.noises"][i]), lambda i, x, x0: seen.append((x, x0)),
    )  # fmt: skip
    assert len(seen) == 5
    for i, (state, x0) in enumerate(seen):
        for ours, name in ((state, "x"), (x0, "pred_xstart")):
            theirs = patches(io[f"sample.step{i}.{name}"])
            assert_close(ours, theirs, float(mx.abs(theirs).max()))
    assert mx.array_equal(x, seen[-1][0])


def test_official_samples_of_the_last_steps(golden: Golden) -> None:
    io, seen = golden.io, []
    whole = ddpm.respaced(ddpm.linear_alpha_bar(), ddpm.spaced_steps(1000, 20))
    last = ddpm.Chain(*(part[:5] for part in whole))
    cache = caches(golden)
    golden.model.sample_ddpm(
        patches(io["gen.x_t"]), cache.select([0]), cache.select([1]), 2.0, last,
        lambda i: patches(io["sample.noises"][i]), lambda i, x, x0: seen.append((x, x0)),
    )  # fmt: skip
    for index, (state, x0) in zip(reversed(range(5)), seen, strict=True):
        assert_close(state, patches(io[f"sample20.index{index}.x"]))
        assert_close(x0, patches(io[f"sample20.index{index}.pred_xstart"]))


def test_ddpm_without_guidance_is_guidance_of_one(golden: Golden) -> None:
    io = golden.io
    chain = ddpm.respaced(ddpm.linear_alpha_bar(), [0, 100, 200])
    cache = caches(golden)

    def run(guide: KVCache | None) -> mx.array:
        return golden.model.sample_ddpm(
            patches(io["gen.x_t"]),
            cache.select([0]),
            guide,
            1.0,
            chain,
            lambda i: patches(io["sample.noises"][i]),
        )

    assert_close(run(None), run(cache.select([1])))


def test_steps_of_angles() -> None:
    table = ddpm.AngleTable(ddpm.linear_alpha_bar())
    knots = table.angles
    # Between two neighbours near the end lie some 500 float32 numbers.
    np.testing.assert_allclose(table.index(mx.array(knots.astype(np.float32))), np.arange(1000), atol=4e-3)
    np.testing.assert_allclose(
        table.index(mx.array([0.0, (knots[400] + knots[401]) / 2, np.pi / 2])), [0, 400.5, 999], atol=4e-3
    )
    expected = trigflow.index_from_angle(np.linspace(0, 1.57, 99), knots)
    np.testing.assert_allclose(table.index(mx.array(np.linspace(0, 1.57, 99))), expected, atol=4e-3)


# ---- the interface of every family -------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 321, 998, 999])
def test_velocity_at_a_step_of_the_schedule(golden: Golden, step: int) -> None:
    angle = golden.model._table.angles[step]
    x = patches(mx.concatenate([golden.io["gen.x_t"]] * 2))
    eps, _ = golden.model.predict(x, mx.full((2,), step), caches(golden))
    v = golden.model.velocity(x, mx.full((2,), angle), caches(golden))
    # The step is known to some 0.004 (above), and eps follows it; near pi/2 what is left of eps is divided by cos.
    assert_close(trigflow.eps_from_velocity(x, v, float(angle)), eps, 2)
    assert_close(np.cos(angle) * v, eps - np.sin(angle) * x, 2)


def test_velocity_leaves_the_cache_alone_and_depends_on_the_prompt(golden: Golden) -> None:
    cache = caches(golden)
    before = [tuple(map(np.array, pair)) for pair in cache.layers]
    x = patches(mx.concatenate([golden.io["gen.x_t"]] * 2))
    v = golden.model.velocity(x, mx.full((2,), 0.9), cache)
    assert float(mx.abs(v[0] - v[1]).max()) > 1e-3
    for pair, old in zip(cache.layers, before, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(pair, old, strict=True))
    alone = golden.model.velocity(x[:1], mx.array([0.9]), prefill(golden.model, prefixes(golden)[:1]))
    assert_close(v[:1], alone)


def test_extend_image_is_a_picture_at_step_0(golden: Golden) -> None:
    """Keys and values behind a picture, read from the cache, are those of one pass over everything."""
    model = golden.model
    cache = caches(golden).select([0])
    tokens = cache.valid.shape[1]
    x0 = patches(golden.io["gen.x_t"])
    model.extend_image(x0, cache)
    assert cache.positions.tolist() == [tokens + 1 + len(x0[0])]
    assert float(mx.abs(model.predict(x0, mx.zeros(1), cache)[0]).max()) > 0
    ids = [[model.config.eoi_token_id, 5, 7]]
    logits = model.extend_text(np.array(ids), np.array([3]), cache)
    text = model.embed_tokens(mx.array([prefixes(golden)[0]]))
    picture = mx.concatenate([model._time_token(model.t_embedder(mx.zeros(1))), model._noisy_tokens(x0)], 1)
    whole = mx.concatenate([text, picture, model.embed_tokens(mx.array(ids))], 1)
    n, start, end = whole.shape[1], tokens + 1, tokens + 1 + len(x0[0])
    mask = np.tril(np.ones((n, n), bool))
    mask[start:end, start:end] = True
    for layer in model.layers:
        whole, _ = layer(whole, mx.array(mask), 0, None)
    assert_close(logits, model.lm_head(model.norm(whole))[:, -1])


def test_jvp_of_velocity_is_the_central_difference(golden: Golden) -> None:
    model, cache = golden.model, caches(golden).select([0])
    x = patches(golden.io["gen.x_t"])
    dx, angle, da = mx.random.normal(x.shape, key=mx.random.key(1)), mx.array([0.83]), mx.array([-0.4])

    def f(x: mx.array, angle: mx.array) -> mx.array:
        return model.velocity(x, angle, cache)

    _, (tangent,) = mx.jvp(f, [x, angle], [dx, da])
    # The step's highest frequency is one radian a step, and a turn of 1e-5 is 0.01 steps; dx is tried by itself.
    h = 2e-3
    _, (only_x,) = mx.jvp(f, [x, angle], [dx, 0 * da])
    difference = (f(x + h * dx, angle) - f(x - h * dx, angle)) / (2 * h)
    np.testing.assert_allclose(only_x, difference, atol=2e-3 * float(mx.abs(difference).max()))
    h = 2e-5
    difference = (f(x, angle + h * da) - f(x, angle - h * da)) / (2 * h)
    only_angle = tangent - only_x
    np.testing.assert_allclose(only_angle, difference, atol=0.02 * float(mx.abs(difference).max()))


def test_gradient_of_a_jvp(golden: Golden) -> None:
    """What distillation asks for: a gradient by the weights beside a tangent."""
    model, cache = golden.model, caches(golden).select([0])
    x = patches(golden.io["gen.x_t"])

    def loss(parameters: dict) -> mx.array:
        model.update(parameters)
        value, tangent = mx.jvp(lambda y: model.velocity(y, mx.array([0.7]), cache), [x], [mx.ones_like(x)])
        return mx.square(value[0] + tangent[0]).mean()

    parameters = model.parameters()
    gradient = mx.grad(loss)(parameters)
    model.update(parameters)
    grads = tree_map(lambda g: float(mx.abs(g).max()), gradient)
    assert grads["x_embedder"]["weight"] > 0
    assert np.isfinite(grads["x_embedder"]["weight"])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m"])
def test_paints_by_every_sampler(golden: Golden, sampler: str) -> None:
    settings = GenerationSettings(sampler=sampler, steps=3, guidance=2.0)
    rows = prefixes(golden)[:1] * 2
    x = paint(golden.model, rows, [1, 2], settings)
    assert x.shape == (2, *golden.model.latent_shape)
    assert bool(mx.isfinite(x).all())
    assert_close(x[:1], paint(golden.model, rows[:1], [1], settings), float(mx.abs(x).max()))


def test_prefixes(golden: Golden) -> None:
    config = golden.model.config
    assert golden.model.image_prefix([7, 8]) == [config.bos_token_id, 7, 8, config.boi_token_id]
    assert prefixes(golden)[1] == golden.model.image_prefix([])
    assert golden.model.guide([[1, 5, 6, config.boi_token_id]]).lengths.tolist() == [2]
    assert golden.model.prompt_text("goldfish") == "Please generate an image of goldfish."


# ---- converting ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of 100 words, among them those of a prompt and a label."""
    words = ["<unk>", "<s>", "</s>", "Please", "generate", "an", "image", "of", "goldfish", "shark", "."]
    vocab = {word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(89))])}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    data = {"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model, "added_tokens": []}
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    file.write_text(json.dumps(data))
    return file


def converted(golden: Golden, tokenizer: Path, output: Path, *arguments: object) -> Loaded:
    command = [
        "convert",
        golden.folder,
        "-o",
        output,
        "--tokenizer",
        tokenizer,
        "--autoencoder",
        CODER,
        *arguments,
    ]
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in command])
    assert exit_.value.code == 0
    return load(output)


def test_convert_and_back_gives_equal_bits(golden: Golden) -> None:
    plan = convert.plan(sources.Source(golden.folder, autoencoder=CODER))
    tensors = foreign(golden.folder)
    back = table.restore(plan.entries, table.forward(plan.entries, tensors))
    unused = {e.source: e.reason for e in plan.entries if e.target is None and not e.optional}
    assert back.keys() | unused.keys() == tensors.keys()
    assert not back.keys() & unused.keys()
    last = golden.model.config.vision.num_hidden_layers - 1 if golden.model.config.vision else None
    assert all(f"layers.{last}." in name or "post_layernorm" in name for name in unused)
    assert all("CLIP's last layer" in reason for reason in unused.values())
    assert bool(unused) == (last is not None)
    for name, value in back.items():
        assert np.array(value).tobytes() == np.array(tensors[name]).tobytes(), name


def test_convert_load_and_generate(golden: Golden, tokenizer: Path, tmp_path: Path) -> None:
    loaded = converted(golden, tokenizer, tmp_path / "out")
    settings = GenerationSettings(steps=2, guidance=1.5)
    image = generate_images(loaded, "goldfish", 3, settings)[0]
    assert image.pixels.shape == (32, 32, 3)
    sentence = loaded.tokenizer.encode("Please generate an image of goldfish.")
    x = paint(golden.model, [golden.model.image_prefix(sentence)], [3], settings)
    np.testing.assert_allclose(image.pixels / 255.0, np.array(golden.model.decode(x)[0]), atol=0.51 / 255)


def test_pictures_pass_the_autoencoder(golden: Golden) -> None:
    """encode is diffusers' mean times 0.18215, and decode takes what it gives."""
    pixels = mx.load(str(CODER / "io.safetensors"))["image"][..., :32]
    x = golden.model.encode((pixels.transpose(0, 2, 3, 1) + 1) / 2)
    assert x.shape[1:] == golden.model.latent_shape
    coder = golden.model.autoencoder
    mean = coder.encode(pixels.transpose(0, 2, 3, 1)).mean
    assert_close(x, patchify(mean * 0.18215, 2))
    assert_close(golden.model.decode(x), mx.clip((coder.decode(mean) + 1) / 2, 0, 1))


def test_describe_with_clip(clip: Golden, tokenizer: Path, tmp_path: Path) -> None:
    loaded = converted(clip, tokenizer, tmp_path / "out")
    image = np.array(clip.io["und.image"]).astype(np.uint8)
    assert isinstance(describe(loaded, image, settings=GenerationSettings(max_tokens=5)), str)


def test_text_goes_on_behind_a_painted_picture(golden: Golden, tokenizer: Path, tmp_path: Path) -> None:
    """The model is made to open a picture: the row of its text head for BOI points where the prompt leads."""
    loaded = converted(golden, tokenizer, tmp_path / "out")
    head = loaded.model.lm_head.weight
    config = loaded.config
    assert isinstance(config, MonoFormerConfig)
    hidden = loaded.model._read(
        loaded.model.embed_tokens(mx.array([[config.bos_token_id, 3]])), np.ones((1, 2), bool),
        loaded.model.new_cache(1), store=False,
    )[0, -1]  # fmt: skip
    rows = np.array(head)
    rows[config.boi_token_id] = 100 * np.array(hidden)
    loaded.model.lm_head.weight = mx.array(rows)
    settings = GenerationSettings(max_tokens=4, max_images=1, steps=2, temperature=0)
    events = list(complete(loaded, "Please", settings=settings))
    assert isinstance(events[0], Painted)
    assert any(isinstance(event, Token) for event in events[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_t_embed": "add_to_patches"}, "decoder_t_embed"),
        ({"learn_sigma": False}, "learn_sigma"),
        ({"image_token_index": "161"}, "expected a whole number"),
        ({"num_attention_heads": 5}, "even multiple"),
        ({"vision_encoder": "dino"}, 'only "clip"'),
    ],
)
def test_configs_that_our_model_is_not(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = tmp_path / "source"
    shutil.copytree(FIXTURES / "monoformer", folder)
    data = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        convert.plan(sources.Source(folder, autoencoder=CODER))


def test_without_the_id_of_a_picture_it_is_the_last_but_two(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(FIXTURES / "monoformer", folder)
    data = json.loads((folder / "config.json").read_text())
    expected = convert.plan(sources.Source(folder, autoencoder=CODER)).config
    del data["image_token_index"]
    (folder / "config.json").write_text(json.dumps(data))
    assert convert.plan(sources.Source(folder, autoencoder=CODER)).config == expected


def test_an_autoencoder_is_asked_for() -> None:
    with pytest.raises(UserError, match="--autoencoder"):
        convert.plan(sources.Source(FIXTURES / "monoformer"))
    model = MonoFormer(dataclasses.replace(load_golden("monoformer").model.config, autoencoder=None))
    with pytest.raises(UserError, match="converted without an autoencoder"):
        model.decode(mx.zeros((1, *model.latent_shape)))


def test_the_family_is_found(golden: Golden) -> None:
    assert families.find(sources.Source(golden.folder)).name == "monoformer"


def test_config_survives_json(golden: Golden) -> None:
    config = golden.model.config
    assert MonoFormerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UserError, match="unknown key"):
        MonoFormerConfig.from_dict(config.to_dict() | {"heads": 3})


def test_half_precision_and_few_bits_go_on_painting(golden: Golden, tokenizer: Path, tmp_path: Path) -> None:
    """bfloat16, and 8 bits in the layers: near the whole numbers' velocity, in float32 outside."""
    converted(
        golden, tokenizer, tmp_path / "out", "--quantize", "8", "--group-size", "32", "--dtype", "bfloat16"
    )
    model = load(tmp_path / "out", dtype=mx.bfloat16).pictures
    x, angle = patches(golden.io["gen.x_t"]), mx.array([0.8])
    before = [prefixes(golden)[0]]
    v = model.velocity(x, angle, prefill(model, before))
    assert v.dtype == mx.float32
    expected = golden.model.velocity(x, angle, prefill(golden.model, before))
    assert float(mx.abs(v - expected).max()) < 0.05 * float(mx.abs(expected).max())
