"""transfusion-pytorch against its own numbers: both goldens, random models of the package, and the interface."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
from convert_package import module

from mlx_transfusion import losses, trigflow
from mlx_transfusion.cli import main
from mlx_transfusion.errors import UserError
from mlx_transfusion.events import Token
from mlx_transfusion.interleave import complete
from mlx_transfusion.model_io import Loaded, flat_parameters, load
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.lucidrains import Lucidrains
from mlx_transfusion.models.lucidrains_config import LucidrainsConfig, ModalityConfig
from mlx_transfusion.painting import paint, prefill
from mlx_transfusion.sampling import guided
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.text_to_image import generate_images
from mlx_transfusion.tokenizer import Tokenizer

convert, families, sources, table, tokenizer_marks = (
    module(name) for name in ("transfusion_pytorch", "families", "sources", "table", "tokenizer_marks")
)

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 1e-4


class Golden(NamedTuple):
    """A tiny model of the package and its numbers."""

    model: Lucidrains
    io: dict[str, mx.array]
    folder: Path

    def latents(self, name: str) -> mx.array:
        """One picture with channels last, as tokens [1, N, C]; a leading axis of 2 stays a batch."""
        x = self.io[name]
        if self.model.config.modalities[0].channel_first:
            x = x.transpose(1, 2, 0) if x.ndim == 3 else x.transpose(0, 2, 3, 1)
        return x.reshape(-1 if x.ndim == 4 else 1, x.shape[-3] * x.shape[-2], x.shape[-1])

    def shape(self, name: str) -> tuple[int, int]:
        x = self.io[name].shape[-3:]
        return (x[1], x[2]) if self.model.config.modalities[0].channel_first else (x[0], x[1])


def build(config: LucidrainsConfig, weights: dict[str, mx.array]) -> Lucidrains:
    model = Lucidrains(LucidrainsConfig.from_dict(json.loads(json.dumps(config.to_dict()))))
    model.load_weights(list(table.forward(convert.entries(config), weights).items()))
    model.eval()
    return model


@pytest.fixture(scope="module", params=["transfusion-pytorch", "transfusion-pytorch-options"])
def golden(request: pytest.FixtureRequest) -> Golden:
    folder = FIXTURES / request.param
    config = convert.read_config(json.loads((folder / "config.json").read_text()), "config.json")
    model = build(config, mx.load(str(folder / "model.safetensors")))
    return Golden(model, mx.load(str(folder / "io.safetensors")), folder)


def assert_close(ours: mx.array, theirs: mx.array, scale: float = 1.0) -> None:
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=0, atol=TOLERANCE * scale)


Item = np.ndarray | tuple[mx.array, float, tuple[int, ...], int]
"""Token ids, or a noisy picture [1, N, C] with its time, shape and kind."""


def read(model: Lucidrains, items: list[Item]) -> tuple[mx.array, list[mx.array], KVCache]:
    """A document read piece by piece behind the cache: text logits [T, V] of all text, flows of all pictures."""
    cache, logits, flows = model.new_cache(1), [], []
    for item in items:
        if isinstance(item, np.ndarray):
            if item.size:
                hidden = model.read_text(item[None], np.ones((1, item.size), bool), cache)
                logits.append(model.lm_head(hidden[0]))
        else:
            x, time, shape, kind = item
            flows.append(model.flow(x, mx.array([time]), cache, kind, shape, store=True))
    return mx.concatenate(logits), flows, cache


def document(golden: Golden, sample: int) -> list[Item]:
    """Sample 0 or 1 of the golden's mixed batch, as the package lays it out."""
    io, c = golden.io, golden.model.config
    items: list[Item] = [np.array([c.sos_id])]
    names = ["text.0", "image.0", "text.1"], ["text.2", "image.1", "text.3", "image.2", "text.4"]
    image = 0
    for name in names[sample]:
        kind, number = name.split(".")
        if kind == "text":
            items.append(np.array(io[f"mixed.{name}"]))
            continue
        shape, time = golden.shape(f"mixed.{name}"), float(io["mixed.times"][sample, image])
        x, z = golden.latents(f"mixed.{name}"), golden.latents(f"mixed.noise.{number}")
        items.append(np.array(c.opening(0, shape)))
        items.append((time * x + (1 - time) * z, time, shape, 0))
        items.append(np.array([c.eom_id(0)]))
        image += 1
    return [*items, np.array([c.sos_id + 1])]


# ---- the goldens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [0, 1])
def test_mixed_document(golden: Golden, sample: int) -> None:
    """Text, pictures at their times, and text behind them, through the cache, equal one pass over the whole batch."""
    io, items = golden.io, document(golden, sample)
    logits, flows, _ = read(golden.model, items)
    is_text = np.array(io["mixed.is_modality"])[sample] == 0
    count = sum(item.size if isinstance(item, np.ndarray) else item[0].shape[1] for item in items)
    seen = min(
        count, len(is_text)
    )  # the last column of the padded batch is cut, with the longest sample's end
    expected = np.array(io["mixed.text_logits"])[sample][:seen][is_text[:seen]]
    assert_close(logits[: len(expected)], mx.array(expected))
    for flow, index in zip(flows, [0] if sample == 0 else [1, 2], strict=True):
        assert_close(flow, golden.latents(f"mixed.pred_flow.{index}"))


def test_positions_and_ids(golden: Golden) -> None:
    io, items = golden.io, document(golden, 1)
    _, _, cache = read(golden.model, items[:-1])
    width = io["mixed.input_ids"].shape[1]
    assert cache.positions.tolist() == [int(io["mixed.rotary_positions"][1, -1]) + 1]
    assert cache.valid.shape[1] == width
    ids = np.concatenate(
        [i if isinstance(i, np.ndarray) else np.zeros(i[0].shape[1], int) for i in items[:-1]]
    )
    assert ids.tolist() == np.array(io["mixed.input_ids"])[1].tolist()


def test_text(golden: Golden) -> None:
    ids = np.array(golden.io["text.input_ids"])
    hidden = golden.model.read_text(ids, np.ones(ids.shape, bool), golden.model.new_cache(2))
    assert_close(golden.model.lm_head(hidden), golden.io["text.logits"])


def test_losses(golden: Golden) -> None:
    """Of a text, and the flow loss of a batch, with the weights that the package gives them."""
    io, c = golden.io, golden.model.config
    ids = io["text.input_ids"]
    logits = golden.model.text_logits(ids[:, :-1])
    words = logits[..., : c.num_text_tokens].reshape(-1, c.num_text_tokens)  # it leaves out all marks here
    targets = ids[:, 1:].reshape(-1)
    assert_close(losses.text_loss(words, targets, mx.ones(targets.size)) / targets.size, io["text.loss"])
    errors, tokens = [], 0
    for sample in (0, 1):
        items = document(golden, sample)
        tokens += sum(item.size if isinstance(item, np.ndarray) else item[0].shape[1] for item in items)
        for flow, index in zip(read(golden.model, items)[1], [0] if sample == 0 else [1, 2], strict=True):
            wanted = golden.latents(f"mixed.flow_target.{index}")
            errors.append(losses.image_errors(flow, wanted) * wanted.size)
    assert_close(mx.concatenate(errors).sum() / tokens, io["mixed.loss.flow"])


def test_pictures_alone(golden: Golden) -> None:
    io = golden.io
    flow = golden.model.flow_alone(
        golden.latents("image_only.noised"), io["image_only.times"], shape=golden.shape("image_only.noised")
    )
    assert_close(flow, golden.latents("image_only.pred_flow"))


@pytest.mark.parametrize("scale", [1, 3])
def test_sampling(golden: Golden, scale: int) -> None:
    """The package's midpoint rule over our flow and our guide, of a picture of another shape than the default."""
    io, model = golden.io, golden.model
    shape, name = tuple(io["sample.shape"].tolist()), f"sample.cfg{scale}"
    prefix = np.array(io["sample.prefix_ids"]).tolist()
    c = model.config
    assert prefix == [c.sos_id, *io["sample.prompt"].tolist(), *c.opening(0, shape)]
    cache = prefill(model, [prefix])
    guide = model.guide([prefix])

    def flow(x: mx.array, t: float) -> mx.array:
        conditional = model.flow(x, mx.array([t]), cache, shape=shape)
        if scale == 1:
            return conditional
        return guided(conditional, model.flow(x, mx.array([t]), guide, shape=shape), scale)

    x, times = io["sample.init_noise"][None], io["sample.times"].tolist()
    assert_close(flow(x, times[0]), golden.latents(f"{name}.flow_t0"))
    assert_close(flow(x, times[2]), golden.latents(f"{name}.flow_t2"))
    trajectory = [x]
    for start, end in pairwise(times):
        half = x + (end - start) / 2 * flow(x, start)
        x = x + (end - start) * flow(half, (start + end) / 2)
        trajectory.append(x)
    for ours, theirs in zip(trajectory, golden.latents(f"{name}.trajectory"), strict=True):
        assert_close(ours[0], theirs, 5)
    assert_close(x, golden.latents(f"{name}.image"), 5)


# ---- converting ---------------------------------------------------------------------------------------------


def converted(source: Path, output: Path, *arguments: object) -> Loaded:
    run_command("convert", source, "--output", output, *arguments)
    return load(output)


def run_command(*arguments: object) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert exit_.value.code == 0


def test_convert_and_back_gives_equal_bits(golden: Golden) -> None:
    plan = convert.plan(sources.Source(golden.folder))
    tensors = mx.load(str(golden.folder / "model.safetensors"))
    ours = table.forward(plan.entries, tensors)
    back = table.restore(plan.entries, ours)
    assert back.keys() == tensors.keys()  # every tensor is used
    for name, value in tensors.items():
        assert np.array(back[name]).tobytes() == np.array(value).tobytes(), name


def test_convert_load_and_paint(golden: Golden, tmp_path: Path) -> None:
    """Without a tokenizer a prompt is ids; the converted model's latents are those of the plain functions."""
    loaded = converted(golden.folder, tmp_path / "out")
    prompt = golden.io["sample.prompt"].tolist()
    ids = loaded.tokenizer.encode(" ".join(map(str, prompt)))
    assert ids == prompt
    config = loaded.config
    assert isinstance(config, LucidrainsConfig)
    assert loaded.tokenizer.vocab_size == config.vocab_size
    settings = GenerationSettings(sampler="midpoint", spacing="flow", steps=3, guidance=3.0)
    prefix = loaded.pictures.image_prefix(ids)
    x = paint(loaded.pictures, [prefix, prefix[:3] + prefix[4:]], [5, 6], settings)
    assert x.shape == (2, *loaded.pictures.latent_shape)
    assert_close(x[:1], paint(golden.model, [prefix], [5], settings), 5)
    text = "".join(
        event.text
        for event in complete(loaded, "1 2 3", settings=GenerationSettings(max_tokens=4, max_images=0))
        if isinstance(event, Token)
    )
    assert all(0 <= int(word) < config.num_text_tokens for word in text.split())


def test_a_prompt_that_is_no_ids(golden: Golden, tmp_path: Path) -> None:
    loaded = converted(golden.folder, tmp_path / "out")
    assert loaded.tokenizer.encode("a cat, 3;4") == [3, 4]
    assert loaded.tokenizer.encode("a cat") == []
    c = golden.model.config
    assert loaded.tokenizer.encode(f"1 {c.num_text_tokens}") in ([1], [1, c.sos_id])
    assert loaded.tokenizer.decode([3, 4, c.meta_id, c.sos_id]).split() == ["3", "4"]


def test_the_family_is_found(golden: Golden) -> None:
    assert families.find(sources.Source(golden.folder)).name == "transfusion_pytorch"


def with_tensors(golden: Golden, folder: Path, tensors: dict[str, mx.array]) -> sources.Source:
    folder.mkdir()
    shutil.copy(golden.folder / "config.json", folder)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return sources.Source(folder)


def test_averaged_weights_and_what_is_left_out(golden: Golden, tmp_path: Path) -> None:
    """The state of an EMA wrapper around a model with the user's own encoder of pixels."""
    tensors = mx.load(str(golden.folder / "model.safetensors"))
    state = {f"ema_model.{n}": x + 1 for n, x in tensors.items()} | {
        f"online_model.{n}": x for n, x in tensors.items()
    }
    state |= {
        "initted": mx.array(True),
        "step": mx.array(3),
        "ema_model.modality_encoder.0.weight": mx.zeros((2, 2)),
    }
    source = with_tensors(golden, tmp_path / "ema", state)
    assert families.find(source).name == "transfusion_pytorch"
    plan = convert.plan(source)
    reasons = {e.source: e.reason for e in plan.entries if e.target is None}
    assert reasons["step"] == "bookkeeping of the EMA"
    assert "user's own code" in reasons["ema_model.modality_encoder.0.weight"]
    assert "averaged" in reasons["online_model.text_embed.weight"]
    assert {e.source for e in plan.entries} == state.keys()
    loaded = converted(source.path, tmp_path / "out")
    assert_close(loaded.model.norm.gamma, tensors["transformer.norm.gamma"] + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_text_token": 3}, "unknown argument 'num_text_token'"),
        ({"transformer": {"dim": 32, "depth": 2, "layers": 3}}, "transformer: unknown argument 'layers'"),
        ({"transformer": {"dim": 32}}, "not the arguments"),
        ({"transformer": 7}, "expected an object"),
        ({"pre_post_transformer_enc_dec": [1, 2]}, "U-Net"),
        ({"modality_default_shape": [2, 2, 2]}, "does not have 2 axes"),
        ({"num_text_tokens": "many"}, "num_text_tokens"),
    ],
)
def test_arguments_that_cannot_be_converted(golden: Golden, change: dict[str, object], message: str) -> None:
    data = json.loads((golden.folder / "config.json").read_text())
    with pytest.raises(UserError, match=message):
        convert.read_config(data | change, "config.json")


def test_a_state_dict_without_its_arguments(golden: Golden, tmp_path: Path) -> None:
    source = sources.Source(shutil.copy(golden.folder / "model.safetensors", tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="constructor's keyword arguments"):
        convert.plan(source)
    named = sources.Source(source.path, config=golden.folder / "config.json")
    assert convert.plan(named).config == golden.model.config.to_dict()
    own = tmp_path / "own.json"
    own.write_text(json.dumps(golden.model.config.to_dict()))
    assert convert.plan(sources.Source(source.path, config=own)).config == golden.model.config.to_dict()


@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
def test_a_tokenizer_gets_the_marks(golden: Golden, tmp_path: Path, kind: str) -> None:
    c = golden.model.config
    if kind == "json":
        file = tmp_path / "tokenizer.json"
        vocab = {"<unk>": 0, "red": 1, "heart": 2}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        file.write_text(
            json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model})
        )
    else:
        file = tmp_path / "tokenizer.model"
        # Bytes take 256 tokens of a vocabulary, and these models have fewer: words alone.
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(["red heart green heart"] * 9), model_writer=(out := io.BytesIO()), vocab_size=24,
            model_type="bpe", minloglevel=2,
        )  # fmt: skip
        file.write_bytes(out.getvalue())
    before = Tokenizer.load(file, special=tokenizer_marks.NO_IDS)
    loaded = converted(golden.folder, tmp_path / "out", "--tokenizer", file)
    ids = loaded.tokenizer.encode("red heart")
    assert ids == before.encode("red heart")
    assert loaded.tokenizer.vocab_size == c.vocab_size
    everything = [c.sos_id, *ids, c.meta_id, *c.opening(0, (3, 4)), c.eom_id(0)]
    assert loaded.tokenizer.decode(everything).split() == ["red", "heart"]
    big = tokenizer_marks.with_marks(file, 200, ["<|a|>"])
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / big[0]).write_bytes(big[1])
    with pytest.raises(UserError, match=r"the model \d+ of text"):
        convert.plan(sources.Source(golden.folder, tokenizer=tmp_path / "big"))


# ---- the interface of every family --------------------------------------------------------------------------


def prefix(golden: Golden) -> list[int]:
    return golden.model.image_prefix(golden.io["sample.prompt"].tolist())


def test_velocity_is_the_flow_of_the_network(golden: Golden) -> None:
    """Against the definition, at a flow's state: x0 and z that belong to it give the flow back."""
    model, cache = golden.model, prefill(golden.model, [prefix(golden)])
    state = mx.random.normal((1, *model.latent_shape), key=mx.random.key(3))
    for time in (0.0, 0.3, 0.8, 1.0):
        flow = model.flow(state, mx.array([time]), cache)
        data, noise = state + (1 - time) * flow, state - time * flow
        angle = float(trigflow.angle_from_flow_time(1 - time))
        x = trigflow.mix(data, noise, angle)
        v = model.velocity(x, mx.array([angle]), cache)
        scale = max(1.0, float(mx.abs(flow).max()))
        assert_close(v, trigflow.velocity_target(data, noise, angle), scale)


def test_cached_reading_equals_one_pass(golden: Golden) -> None:
    """A finished picture at time 1, then text: the pieces, and token by token."""
    model, c = golden.model, golden.model.config
    x0 = mx.random.normal((1, *model.latent_shape), key=mx.random.key(4))
    behind = np.array([[c.eom_id(0), 3, 4, 5]])
    _, cache = model.prefill(np.array([prefix(golden)]), np.array([len(prefix(golden))]))
    model.extend_image(x0, cache)
    assert cache.positions.tolist() == [len(prefix(golden)) + 1]  # one for the whole picture
    alone = cache.snapshot()
    logits = model.extend_text(behind, np.array([4]), cache)
    for token in behind[0]:
        one = model.extend_text(np.array([[token]]), np.array([1]), alone)
    assert_close(logits, one)
    again = model.new_cache(1)
    for token in prefix(golden):
        model.extend_text(np.array([[token]]), np.array([1]), again)
    model.extend_image(x0, again)
    assert_close(model.extend_text(behind, np.array([4]), again), logits)


def test_rows_of_different_lengths(golden: Golden) -> None:
    model = golden.model
    long, short = prefix(golden), model.image_prefix([1])
    both, x = prefill(model, [long, short]), mx.random.normal((2, *model.latent_shape), key=mx.random.key(5))
    angles = mx.array([0.4, 1.2])
    v = model.velocity(x, angles, both)
    for row, ids in enumerate((long, short)):
        alone = model.velocity(x[row : row + 1], angles[row : row + 1], prefill(model, [ids]))
        assert_close(v[row : row + 1], alone, max(1.0, float(mx.abs(alone).max())))


def test_guide_is_null_text(golden: Golden) -> None:
    model, c = golden.model, golden.model.config
    guide = model.guide([prefix(golden), model.image_prefix([1])])
    assert guide.lengths.tolist() == [len(prefix(golden)), len(model.image_prefix([1]))]
    nulls = prefill(model, [[c.null_id] * len(prefix(golden))])
    for (k, v), (k0, v0) in zip(guide.layers, nulls.layers, strict=True):
        assert_close(k[:1], k0)
        assert_close(v[:1], v0)
    negative = model.guide([prefix(golden)], model.image_prefix([2, 3]))
    assert negative.lengths.tolist() == [len(model.image_prefix([2, 3]))]


def test_jvp_of_velocity_is_the_central_difference(golden: Golden) -> None:
    model, cache = golden.model, prefill(golden.model, [prefix(golden)])
    x = mx.random.normal((1, *model.latent_shape), key=mx.random.key(6))
    dx, angle, da = mx.random.normal(x.shape, key=mx.random.key(7)), mx.array([0.9]), mx.array([0.3])

    def f(x: mx.array, angle: mx.array) -> mx.array:
        return model.velocity(x, angle, cache)

    _, (tangent,) = mx.jvp(f, [x, angle], [dx, da])
    h = 2e-3
    difference = (f(x + h * dx, angle + h * da) - f(x - h * dx, angle - h * da)) / (2 * h)
    np.testing.assert_allclose(tangent, difference, atol=5e-3 * float(mx.abs(difference).max()))


def test_pictures_are_pixels_where_latents_are(golden: Golden) -> None:
    c = golden.model.config
    pixels = mx.random.uniform(shape=(2, 6, 8, 1), key=mx.random.key(8))
    modality = ModalityConfig(4, shape=(3, 4))
    model = Lucidrains(dataclasses.replace(c, modalities=(modality,), patch_size=2))
    assert model.picture_size == (6, 8)
    assert model.picture_channels == 1
    latents = model.encode(pixels)
    assert latents.shape == (2, *model.latent_shape)
    # The order of the package's own example: rows, columns of tokens; in each, rows and columns of pixels.
    assert_close(latents[0, 5], pixels[0, 2:4, 2:4, 0].reshape(-1) * 2 - 1)
    assert_close(model.decode(latents), pixels)
    cache = model.new_cache(2)
    assert model.read_picture(pixels, cache).shape == (2, c.vocab_size)
    assert cache.lengths.tolist() == [len(c.opening(0, (3, 4))) + 12 + 1] * 2


def test_a_modality_that_is_no_picture(golden: Golden) -> None:
    c = dataclasses.replace(golden.model.config, modalities=(ModalityConfig(4, shape=(7,)),))
    with pytest.raises(UserError, match="no default shape of two axes"):
        _ = Lucidrains(c).latent_shape


@pytest.mark.parametrize(
    "change",
    [{"dim": 7}, {"dim_head": 3}, {"depth": 0}, {"painted": 4}, {"patch_size": 3}, {"softcap": 0.0},
     {"modalities": (ModalityConfig(4, axial_positions=True),)}, {"modalities": (ModalityConfig(0),)},
     {"modalities": (ModalityConfig(1, axes=1, shape=(2, 3)),)}, {"modalities": ()}],
)  # fmt: skip
def test_impossible_configs(golden: Golden, change: dict[str, object]) -> None:
    with pytest.raises(UserError, match="model config"):
        dataclasses.replace(golden.model.config, **change)


def latents_folder(arguments: Path, folder: Path) -> Path:
    """A checkpoint of a random model of latents of four channels, with the other arguments of a golden."""
    data = json.loads(arguments.read_text()) | {"dim_latent": 4, "modality_default_shape": [4, 6]}
    config = convert.read_config(data, "config.json")
    weights = table.restore(convert.entries(config), flat_parameters(Lucidrains(config)))
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def test_latents_of_an_autoencoder(golden: Golden, tmp_path: Path) -> None:
    """A model of four channels, converted with an AutoencoderKL, paints pictures."""
    source = latents_folder(golden.folder / "config.json", tmp_path / "source")
    loaded = converted(source, tmp_path / "out", "--autoencoder", FIXTURES / "kl-sd")
    image = generate_images(loaded, "1 2 3", 4, GenerationSettings(steps=2, guidance=2))[0]
    assert image.pixels.shape == (16, 24, 3)
    pixels = mx.random.uniform(shape=(1, 16, 24, 3), key=mx.random.key(9))
    coder = loaded.model.autoencoder
    latents = loaded.pictures.encode(pixels)
    assert_close(latents, 0.18215 * coder.encode(pixels * 2 - 1).mean.reshape(1, 24, 4))
    assert_close(
        loaded.pictures.decode(latents),
        mx.clip((coder.decode(coder.encode(pixels * 2 - 1).mean) + 1) / 2, 0, 1),
    )
    with pytest.raises(UserError, match="latent channels"):
        convert.plan(sources.Source(golden.folder, autoencoder=FIXTURES / "kl-sd"))


def test_half_precision_and_few_bits_go_on_painting(golden: Golden, tmp_path: Path) -> None:
    """bfloat16, and 8 bits in the layers: near the whole numbers' velocity, in float32 outside."""
    converted(golden.folder, tmp_path / "out", "--quantize", "8", "--group-size", "32", "--dtype", "bfloat16")
    model = load(tmp_path / "out", dtype=mx.bfloat16).pictures
    x, angle = mx.random.normal((1, *model.latent_shape), key=mx.random.key(2)), mx.array([1.1])
    v = model.velocity(x, angle, prefill(model, [prefix(golden)]))
    assert v.dtype == mx.float32
    expected = golden.model.velocity(x, angle, prefill(golden.model, [prefix(golden)]))
    assert float(mx.abs(v - expected).max()) < 0.08 * float(mx.abs(expected).max())
