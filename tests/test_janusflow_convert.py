"""The official JanusFlow folder -> a model folder that paints, describes and writes; every tensor has its place."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from janusflow_tools import (
    BOI,
    BOS,
    CODER,
    EOI,
    FIXTURE,
    autoencoder_folder,
    config,
    golden,
    janusflow,
    official_folder,
    table,
    tokenizer,
    weights,
)
from PIL import Image

from mlx_transfusion import generate_images
from mlx_transfusion.cli import main
from mlx_transfusion.errors import UserError
from mlx_transfusion.images import read_record
from mlx_transfusion.model_io import build, flat_parameters, load
from mlx_transfusion.models.convnext import ConvNextConfig
from mlx_transfusion.models.janusflow import JanusFlow
from mlx_transfusion.models.janusflow_config import JanusFlowConfig
from mlx_transfusion.models.siglip import SiglipConfig
from mlx_transfusion.settings import GenerationSettings

try:
    from mlx_transfusion.convert import janusflow_config, sources, synthetic
except ModuleNotFoundError:  # only the tree is on the path, the package is not installed
    from convert import janusflow_config, sources, synthetic  # type: ignore[no-redef]

Cli = Callable[..., Any]
TOKENIZER = tokenizer().to_str()


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official folder; tests do not write into it."""
    return official_folder(tmp_path_factory.mktemp("hub") / "JanusFlow-tiny")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return autoencoder_folder(tmp_path_factory.mktemp("hub") / "sdxl-vae")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, official: Path, vae: Path) -> Path:
    """What the verb `convert` made of both."""
    out = tmp_path_factory.mktemp("models") / "janusflow"
    with pytest.raises(SystemExit) as done:
        main(["convert", str(official), "--autoencoder", str(vae), "--output", str(out)])
    assert done.value.code == 0
    return out


# ---- the table ----


def test_the_table_holds_every_tensor_and_gives_its_bits_back() -> None:
    entries = janusflow.entries(config())
    assert {e.source for e in entries if not e.optional} == set(weights())
    ours = table.forward(entries, weights())
    back = table.restore(entries, ours)
    used = [e.source for e in entries if e.target is not None]
    assert sorted(back) == sorted(used)
    assert all(mx.array_equal(back[name], weights()[name]) for name in used)
    left = {e.source for e in entries if e.target is None and not e.optional}
    assert left == {name for name in weights() if ".attn_pool." in name}


def test_the_public_sizes_come_out_of_the_same_table(tmp_path: Path) -> None:
    """Parameters of the published 1.3B: 4.09 GB of bfloat16, and its picture encoder's and decoder's own counts."""
    folder = official_folder(tmp_path / "public")
    (folder / "config.json").write_text(json.dumps(public_config()))
    public = janusflow_config.read_config(sources.Source(folder))
    assert public.vision == SiglipConfig(384, 16, 1024, 24, 16, 4096)
    assert public.painting == ConvNextConfig(4, latent_size=48, patch_size=2, channels=768, blocks=2)
    entries = [e for e in janusflow.entries(public) if not e.optional]

    def count(part: str) -> int:
        return sum(prod(e.shape) for e in entries if e.source.startswith(part))

    assert count("vision_gen_enc_model.") == 21_614_336
    assert count("vision_gen_dec_model.") == 50_561_296
    assert round(2 * count("") / 1e9, 2) == 4.09
    assert {e.target: e.target_shape for e in entries if e.target} == {
        name: value.shape for name, value in flat_parameters(JanusFlow(public)).items()
    }
    assert public.layout.picture_tokens == 578


# ---- the config ----


def test_the_official_config_is_read(official: Path) -> None:
    found = janusflow_config.read_config(sources.Source(official))
    before, after = build(found).describe_prompt()
    empty: dict[str, Any] = dict.fromkeys(
        ["picture_before", "question", "question_before", "question_after"], ()
    )
    assert replace(found, **empty) == config()
    words = tokenizer()
    assert words.decode(before).endswith("natural language.\n\nUser: ")
    assert words.decode(after) == "\nDescribe this image in detail.\n\nAssistant:"


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        (
            "language_config",
            "rope_scaling",
            {"type": "linear", "factor": 2.0},
            "has a rope_scaling or hidden_act of another kind",
        ),
        ("vision_gen_enc_config", "kernel_size", 4, "kernel_size is 4 for 2"),
        ("vision_gen_dec_config", "upsamples", 2, "upsamples is 2 for 1"),
        ("vision_gen_dec_config", "in_channels", 64, "in_channels is 64 for 32"),
        ("vision_und_enc_config", "model_name", None, "config.json: not the config"),
        ("vision_gen_enc_config", "stride", "two", "stride is 'two' for 2"),
        ("vision_gen_enc_config", "block_out_channels", 32, "config.json: not the config"),
        ("vision_gen_dec_config", "block_out_channels", [], "config.json: not the config"),
        ("vision_gen_dec_config", "in_channels", "32", "in_channels is '32' for 32"),
    ],
)
def test_another_form_is_refused_by_name(
    tmp_path: Path, part: str, key: str, value: object, message: str
) -> None:
    folder = official_folder(tmp_path / "other")
    data = json.loads((folder / "config.json").read_text())
    place = data[part].get("params", data[part])
    if value is None:
        del place[key]
    else:
        place[key] = value
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        janusflow_config.read_config(sources.Source(folder))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5000) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_config_ends_in_a_traceback(data: st.DataObject) -> None:
    """One value of the official config, at any depth, is replaced or left out."""
    official = json.loads((FIXTURE / "config.json").read_text())
    table_ = official
    while True:
        key = data.draw(st.sampled_from(sorted(table_)))
        if not isinstance(table_[key], dict) or data.draw(st.integers(0, 4)) == 0:
            break
        table_ = table_[key]
    if data.draw(st.booleans()):
        table_[key] = data.draw(JSON)
    else:
        del table_[key]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(official))
        (Path(folder) / "tokenizer.json").write_text(TOKENIZER)
        (Path(folder) / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
        source = sources.Source(Path(folder))
        janusflow.detect(source)
        with contextlib.suppress(UserError):
            found = janusflow_config.read_config(source)
            with contextlib.suppress(UserError):
                JanusFlowConfig.from_dict(found.to_dict())


def test_a_tokenizer_without_the_picture_tokens_is_refused(tmp_path: Path) -> None:
    folder = official_folder(tmp_path / "other")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<begin_of_image>", "<something_else>"))
    with pytest.raises(UserError, match="has no token '<begin_of_image>'"):
        janusflow_config.read_config(sources.Source(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        janusflow_config.read_config(sources.Source(folder))


def test_only_janusflow_is_taken_for_it(tmp_path: Path, official: Path) -> None:
    assert janusflow.detect(sources.Source(official))
    pro = tmp_path / "pro"
    pro.mkdir()
    (pro / "config.json").write_text(json.dumps({"model_type": "multi_modality", "gen_vision_config": {}}))
    assert not janusflow.detect(sources.Source(pro))
    assert not janusflow.detect(sources.Source(tmp_path))


# ---- the verbs ----


def test_the_converted_model_has_the_official_weights(converted: Path) -> None:
    loaded = load(converted)
    assert isinstance(loaded.model, JanusFlow)
    ours = flat_parameters(loaded.model)
    back = table.restore(janusflow.entries(config()), ours)
    assert all(mx.array_equal(back[name], weights()[name]) for name in back)
    card = (converted / "README.md").read_text()
    assert "DeepSeek Model License" in card


def test_it_paints_from_the_command_line(cli: Cli, converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "red.png"
    flags = ["--seed", "7", "--steps", "3"]  # the rest is the official program's, in the folder
    assert cli("generate", "a red heart", "--model", converted, *flags, "--output", out).code == 0
    with Image.open(out) as image:
        assert image.size == (16, 16)
        pixels = np.asarray(image)
    assert pixels.std() > 1  # something is painted
    record = read_record(out)
    assert (record["sampler"], record["spacing"], record["guidance"]) == ("ddim", "flow", 2.0)
    how = GenerationSettings(sampler="ddim", spacing="flow", steps=3, guidance=2.0)
    (again,) = generate_images(load(converted), "a red heart", 7, how)
    assert np.array_equal(again.pixels, pixels)
    (other,) = generate_images(load(converted), "a blue star", 7, how)
    assert not np.array_equal(other.pixels, pixels)


def test_the_prompt_stands_in_the_user_turn(converted: Path) -> None:
    from mlx_transfusion.text_to_image import image_prefix

    loaded = load(converted)
    prefix = image_prefix(loaded, " a red heart ")
    assert prefix[0] == BOS
    assert loaded.tokenizer.decode(prefix[1:]) == "User: a red heart\n\nAssistant:"


def test_it_describes_from_the_command_line(cli: Cli, converted: Path, tmp_path: Path) -> None:
    picture = tmp_path / "wide.png"
    wide = np.array(golden()["processor.image_wide"]).astype(np.uint8)
    Image.fromarray(wide).save(picture)
    flags = ["--model", converted, "--max-tokens", 6, "--json"]
    result = cli("describe", picture, "--question", " How many hearts?", *flags)
    assert result.code == 0
    said = json.loads(result.out)["text"]
    assert json.loads(cli("describe", picture, *flags).out)["text"] != said
    assert "the question is empty" in cli("describe", picture, "--question", " ", *flags).err
    # By hand: BOS, the system message, the picture, the question; then the likeliest letters.
    question = "\nHow many hearts?\n\nAssistant:"
    loaded = load(converted)
    model, c = loaded.model, loaded.config
    assert isinstance(model, JanusFlow)
    from mlx_transfusion.images import pad_square

    cache = model.new_cache(1)
    before = [BOS, *c.picture_before]
    model.extend_text(np.array([before]), np.array([len(before)]), cache)
    pixels = pad_square(Image.fromarray(wide), 24).astype(np.float32) / 255
    model.read_picture(mx.array(pixels)[None], cache)
    ids = loaded.tokenizer.encode(question)
    written: list[int] = []
    for _ in range(6):
        logits = np.array(model.extend_text(np.array([ids]), np.array([len(ids)]), cache)[0])
        logits[list(c.layout.banned)] = -np.inf
        ids = [int(logits.argmax())]
        if ids[0] in c.layout.eos:
            break
        written += ids
    assert said == loaded.tokenizer.decode(written).strip()


def test_it_writes_from_the_command_line(cli: Cli, converted: Path) -> None:
    result = cli("complete", "red", "--model", converted, "--max-tokens", 4, "--json")
    assert result.code == 0


def test_quantised_it_still_paints_much_the_same(cli: Cli, official: Path, vae: Path, tmp_path: Path) -> None:
    out = tmp_path / "q8"
    flags = ["--quantize", 8, "--group-size", 32, "--autoencoder", vae, "--output", out]
    assert cli("convert", official, *flags).code == 0
    data = json.loads((out / "config.json").read_text())
    assert data["quantization"]["bits"] == 8
    stored = mx.load(str(out / "model.safetensors"))
    assert "vision_gen_enc_model.mid_block.res_blocks.0.channelwise_linear_1.scales" in stored
    assert "vision_und_enc_model.blocks.0.mlp.fc1.scales" in stored
    assert not [name for name in stored if name.startswith("autoencoder.") and name.endswith("scales")]
    model = load(out).model
    assert isinstance(model, JanusFlow)
    z = mx.moveaxis(golden()["gen.noise"][:1], 1, -1)
    ids = np.array(golden()["gen.prompt_ids"])[None, :-1]
    cache = model.prefill(ids, np.array([ids.shape[1]]))[1]
    expected = mx.moveaxis(golden()["gen.t250.v_cond"][:1], 1, -1)
    assert mx.abs(model.flow(z, mx.array([0.25]), cache) - expected).max().item() < 0.2


def test_the_real_size_is_accounted_for_and_predicted(cli: Cli, tmp_path: Path) -> None:
    """A checkpoint of the published sizes, made of holes: 4.09 GB of names and shapes, every one with its place."""
    folder, vae = tmp_path / "JanusFlow-1.3B", tmp_path / "sdxl-vae"
    official_folder(folder)
    (folder / "config.json").write_text(json.dumps(public_config()))
    vae.mkdir()
    sizes = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "scaling_factor": 0.13025}
    (vae / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "act_fn": "silu"} | sizes))
    synthetic.write_zeros(synthetic.plan_from_config(folder, autoencoder=vae))
    assert (folder / "model.safetensors").stat().st_size == pytest.approx(4.09e9, rel=1e-3)
    result = cli("convert", folder, "--autoencoder", vae, "--dry-run", "--quantize", 4, "--json")
    assert result.code == 0
    said = json.loads(result.out)
    assert said["tensors"]["in the checkpoint"] == said["tensors"]["used"] + 13  # the pooling head
    assert 1.3e9 < said["weights"] < 1.5e9


def public_config() -> dict[str, Any]:
    """config.json with the sizes of the published 1.3B, which names its vision tower and no latent size."""
    data = json.loads((FIXTURE / "config.json").read_text())
    data["language_config"] = {
        "model_type": "llama", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_position_embeddings": 16384,
    }  # fmt: skip
    data["vision_und_enc_config"]["params"] = {
        "image_size": 384, "model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1,
    }  # fmt: skip
    data["vision_gen_enc_config"]["params"] |= {"block_out_channels": [768], "hidden_size": 2048}
    data["vision_gen_dec_config"]["params"] |= {
        "block_out_channels": [768],
        "in_channels": 768,
        "hidden_size": 2048,
    }
    return data


# ---- bad input ----


def test_without_an_autoencoder_nothing_is_written(cli: Cli, official: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("convert", official, "--output", out)
    assert result.code == 2
    assert "name it with --autoencoder" in result.err
    assert not out.exists()


def test_another_autoencoder_is_refused(official: Path, tmp_path: Path) -> None:
    other = autoencoder_folder(tmp_path / "flux")
    data = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(data | {"latent_channels": 16}))
    with pytest.raises(UserError, match="has 16 latent channels and the model paints 4"):
        janusflow.plan(sources.Source(official, autoencoder=other))


def test_a_missing_tensor_is_named(cli: Cli, vae: Path, tmp_path: Path) -> None:
    folder = official_folder(tmp_path / "broken")
    kept = {name: value for name, value in weights().items() if name != "beg_of_und_embed"}
    mx.save_safetensors(str(folder / "model.safetensors"), kept)
    result = cli("convert", folder, "--autoencoder", vae, "--output", tmp_path / "out")
    assert result.code == 2
    assert "missing beg_of_und_embed" in result.err
    assert list(tmp_path.iterdir()) == [folder]


def test_a_model_without_an_autoencoder_says_why_it_cannot_paint() -> None:
    model = build(config())
    for ask in (lambda: model.picture_size, lambda: model.decode(mx.zeros((1, 16, 16)))):
        with pytest.raises(UserError, match="converted without an autoencoder"):
            ask()


def test_pictures_survive_the_autoencoder(converted: Path) -> None:
    """decode(encode(x)) is what the autoencoder makes of a picture, and the scale of the latents is its own."""
    model = load(converted).model
    assert isinstance(model, JanusFlow)
    assert model.picture_size == (16, 16)
    pixels = mx.random.uniform(shape=(2, 16, 16, 3), key=mx.random.key(0))
    coder = model.autoencoder
    mean = coder.encode(pixels * 2 - 1).mean
    patches = model.encode(pixels)
    assert patches.shape == (2, *model.latent_shape)
    assert mx.allclose(patches[0, 0, :4], mean[0, 0, 0] * CODER.scaling_factor, atol=1e-6)
    assert mx.allclose(model.decode(patches), mx.clip((coder.decode(mean) + 1) / 2, 0, 1), atol=1e-5)


def test_the_fixture_is_the_official_one() -> None:
    """Its ids are those that the tools' tokenizer has."""
    ids = np.array(golden()["und.raw_ids.0"]).tolist()
    assert ids[0] == BOS
    words = tokenizer()
    assert words.token_to_id("<begin_of_image>") == BOI
    assert words.token_to_id("<end_of_image>") == EOI
    assert json.loads((FIXTURE / "config.json").read_text())["model_type"] == "multi_modality"
