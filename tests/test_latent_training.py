"""A model trained on cached latents: data, a whole run, its checkpoints, and pictures from them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from autoencoder_tools import randomize
from mlx.utils import tree_flatten
from PIL import Image

from mlx_transfusion.autoencoder.folder import load_autoencoder, save_autoencoder
from mlx_transfusion.autoencoder.latents import write_cache
from mlx_transfusion.autoencoder.preview import Preview
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import load
from mlx_transfusion.models.autoencoder import AutoencoderConfig, AutoencoderKL
from mlx_transfusion.models.autoencoder_vq import AutoencoderVQ
from mlx_transfusion.text_to_image import step_reporter
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import load_train_config
from mlx_transfusion.training.image_store import ImageRef, open_images
from mlx_transfusion.training.latents import LatentCache
from mlx_transfusion.training.step import clean_patches
from mlx_transfusion.training.trainer import Trainer, train

SIZE, CHANNELS, COUNT = 16, 4, 6


def coder(seed: int) -> AutoencoderKL:
    """16x16 pixels to 8x8x4 latents."""
    config = AutoencoderConfig(
        block_out_channels=(8, 8), latent_channels=CHANNELS, layers_per_block=1, norm_num_groups=4
    )
    model = AutoencoderKL(config)
    randomize(model, seed)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """Pictures, two autoencoders, latents of the first, and a training TOML."""
    folder = tmp_path_factory.mktemp("latents")
    rng = np.random.default_rng(0)
    with (folder / "rows.jsonl").open("w") as rows:
        for i in range(COUNT):
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(folder / f"{i}.png")
            rows.write(json.dumps({"image": f"{i}.png", "text": "red heart"}) + "\n")
    Image.new("RGB", (SIZE, SIZE)).save(folder / "new.png")
    (folder / "new.jsonl").write_text('{"image": "new.png", "text": "moon"}\n')
    for seed, name in enumerate(("vae", "other")):
        colours = np.random.default_rng(seed).normal(size=(CHANNELS, 3)).astype(np.float32)
        save_autoencoder(folder / name, coder(seed), preview=Preview(colours, np.zeros(3, np.float32)))
    (folder / "vae" / "optimizer.safetensors").write_bytes(b"of its training")
    store = open_images(folder)
    refs = [ImageRef(store, f"{i}.png") for i in range(COUNT)]
    write_cache(folder / "latents.safetensors", load_autoencoder(folder / "vae"), refs, (SIZE, SIZE))
    vq = AutoencoderVQ(AutoencoderConfig.from_dict(coder(0).config.to_dict() | {"quantizer": {"codes": 16}}))
    save_autoencoder(folder / "vq", vq)
    write_cache(folder / "codes.safetensors", load_autoencoder(folder / "vq"), refs, (SIZE, SIZE))
    tiny_tokenizer.save(folder)
    (folder / "train.toml").write_text(
        """
output = "run"
tokenizer = "tokenizer.model"
steps = 3
batch_size = 4
sequence_length = 64
save_every = 1
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 48
image_height = 8
image_width = 8
image_channels = 4
image_mean = [0.0, 0.0, 0.0, 0.0]
patch_size = 4
[data]
latents = ["latents.safetensors"]
autoencoder = "vae"
[[data.train]]
rows = "rows.jsonl"
[optimizer]
warmup = 0
"""
    )
    return folder


@pytest.fixture(scope="module")
def trained(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(place, tmp_path_factory.mktemp("out")))


def config(place: Path, output: Path, *overrides: str) -> Any:
    return load_train_config(place / "train.toml", [f"output={output}", *overrides])


def test_a_run_reads_the_latents_that_encoding_gives(place: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(place, tmp_path))
    documents = [d for d in trainer.train_data.documents(0, 4) if d.images]
    pictures = trainer.train_data.pictures(documents).pixels
    assert (pictures.dtype, pictures.shape[1:]) == (np.float32, (8, 8, CHANNELS))
    first = np.array(Image.open(place / documents[0].images[0].name))[None]
    expected = trainer.model.encode(mx.array(first).astype(mx.float32) / 255)
    np.testing.assert_allclose(clean_patches(trainer.model, pictures)[:1], expected, atol=1e-5)


def test_checkpoints_carry_the_autoencoder_and_paint(cli: Any, trained: Path, tmp_path: Path) -> None:
    loaded = load(trained)
    assert loaded.transfusion.coder is not None
    names = [name for name, _ in tree_flatten(loaded.model.parameters())]
    assert not any(name.startswith("coder") for name in names)
    out = tmp_path / "red.png"
    flags = ["--model", trained, "--steps", "2", "--seed", "1", "--width", str(SIZE), "--output", out]
    assert cli("generate", "red heart", *flags, "--preview-every", 1).code == 0
    with Image.open(out) as picture:
        assert picture.size == (SIZE, SIZE)
    previews = [np.array(Image.open(file)) for file in tmp_path.iterdir() if file != out]
    assert [p.shape for p in previews] == [(SIZE, SIZE, 3)] * 2
    for p in previews:  # one colour for each element of the latents, without the decoder
        np.testing.assert_array_equal(p, p[::2, ::2].repeat(2, 0).repeat(2, 1))
        assert len(np.unique(p.reshape(-1, 3), axis=0)) > 9
    assert cli("generate", "red heart", "--model", trained, "--width", "8", "--output", out).code == 2
    said = cli("describe", out, "--model", trained, "--max-tokens", "3")
    assert said.code == 0, said.err
    assert f"{SIZE}x{SIZE}x3" in cli("info", trained).out


def test_weights_of_the_autoencoder_are_stored_once(place: Path, trained: Path) -> None:
    name = "model.safetensors"
    assert os.path.samefile(place / "vae" / name, trained / "autoencoder" / name)
    assert {file.name for file in (trained / "autoencoder").iterdir()} == {
        "config.json", "preview.safetensors", name,
    }  # fmt: skip


def test_another_autoencoder_beside_the_model_is_refused(
    cli: Any, place: Path, trained: Path, tmp_path: Path
) -> None:
    for name, source, change in (("weights", "other", {}), ("scale", "vae", {"scaling_factor": 0.123})):
        swapped = tmp_path / name
        shutil.copytree(trained, swapped)
        shutil.rmtree(swapped / "autoencoder")
        shutil.copytree(place / source, swapped / "autoencoder")
        file = swapped / "autoencoder" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        said = cli("generate", "red heart", "--model", swapped, "--output", tmp_path / "red.png")
        assert said.code == 2
        assert "the model was trained with autoencoder" in said.err
        assert len(said.err.strip().splitlines()) == 1


def test_an_autoencoder_of_other_channels_is_refused(
    cli: Any, place: Path, trained: Path, tmp_path: Path
) -> None:
    """Also where config.json does not say which autoencoder it was."""
    swapped = tmp_path / "swapped"
    shutil.copytree(trained, swapped)
    file = swapped / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "coder"}))
    shutil.rmtree(swapped / "autoencoder")
    wider = AutoencoderKL(AutoencoderConfig.from_dict(coder(0).config.to_dict() | {"latent_channels": 6}))
    save_autoencoder(swapped / "autoencoder", wider)
    said = cli("generate", "red heart", "--model", swapped, "--output", tmp_path / "red.png")
    assert said.code == 2
    assert "its latents have 6 channels, and the model paints 4" in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_a_codebook_beside_a_model_of_latents_is_refused(place: Path, trained: Path, tmp_path: Path) -> None:
    swapped = tmp_path / "swapped"
    shutil.copytree(trained, swapped)
    file = swapped / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "coder"}))
    shutil.rmtree(swapped / "autoencoder")
    shutil.copytree(place / "vq", swapped / "autoencoder")
    with pytest.raises(UserError, match=r"has a codebook of 16 codes, and a model of latents needs"):
        load(swapped)


def test_previews_are_the_linear_map(trained: Path) -> None:
    loaded = load(trained)
    model, steps = loaded.transfusion, []
    assert model.coder is not None
    rng = np.random.default_rng(0)
    colours = Preview(rng.normal(size=(CHANNELS, 3)).astype(np.float32), np.zeros(3, np.float32))
    model.coder = dataclasses.replace(model.coder, preview=colours)
    latents = rng.normal(size=(1, 8, 8, CHANNELS)).astype(np.float32)
    x0 = model.latent_patches(mx.array(latents))
    report = step_reporter(loaded, [0], steps.append)
    assert report is not None
    report(0, 2, x0, x0)
    seen = steps[0].preview()
    factor = SIZE // 8
    np.testing.assert_array_equal(seen, colours(latents).repeat(factor, 1).repeat(factor, 2))
    model.coder = dataclasses.replace(model.coder, preview=None)
    np.testing.assert_array_equal(model.preview(x0), model.decode(x0))


def test_a_run_does_not_go_on_with_latents_of_another_autoencoder(
    place: Path, trained: Path, tmp_path: Path
) -> None:
    store = open_images(place)
    refs = [ImageRef(store, f"{i}.png") for i in range(COUNT)]
    write_cache(tmp_path / "other.safetensors", load_autoencoder(place / "other"), refs, (SIZE, SIZE))
    changes = [f"data.latents=['{tmp_path / 'other.safetensors'}']", f"data.autoencoder={place / 'other'}"]
    with pytest.raises(UserError, match=r"was trained on latents of autoencoder \w+, these are of"):
        train(config(place, trained.parent.parent, *changes))


def test_a_stopped_run_goes_on_exactly(place: Path, trained: Path, tmp_path: Path) -> None:
    train(config(place, tmp_path, "steps=3", "keep=5"))
    for step in ("00000002", "00000003"):
        for file in (tmp_path / "checkpoints" / f"step-{step}").iterdir():
            if file.is_file():
                file.unlink()
    again = train(config(place, tmp_path, "steps=3", "keep=5"))
    a, b = (mx.load(str(folder / "model.safetensors")) for folder in (trained, again))
    assert a.keys() == b.keys()
    assert all(mx.array_equal(a[name], b[name]) for name in a)


def test_latents_of_several_sizes_from_encoding_to_painting(cli: Any, place: Path, tmp_path: Path) -> None:
    """Wide and high pictures and squares: encode, train, paint each size, describe; all by the command line."""
    rng = np.random.default_rng(1)
    shapes = {"square": (16, 16), "wide": (16, 24), "high": (30, 20)}
    with (tmp_path / "rows.jsonl").open("w") as rows:
        for name, shape in shapes.items():
            Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(tmp_path / f"{name}.png")
            rows.write(json.dumps({"image": f"{name}.png", "text": f"red {name}"}) + "\n")
    file = tmp_path / "latents.safetensors"
    sizes = ("--size", "16", "--size", "24x16", "--size", "16x24")
    said = cli("autoencoder", "encode", place / "vae", tmp_path / "rows.jsonl", *sizes, "-o", file)
    assert said.code == 0, said.err
    files = said.out.split()
    assert [Path(f).name for f in files] == [
        "latents-16x16.safetensors", "latents-24x16.safetensors", "latents-16x24.safetensors",
    ]  # fmt: skip
    caches = [LatentCache(f) for f in files]
    assert [c.names for c in caches] == [["square.png"], ["wide.png"], ["high.png"]]
    assert [c.shape[2:] for c in caches] == [(8, 8, 4), (8, 12, 4), (12, 8, 4)]
    out = tmp_path / "decoded"
    assert cli("autoencoder", "decode", place / "vae", files[1], "-o", out).code == 0
    with Image.open(out / "wide.png") as picture:
        assert picture.size == (24, 16)

    changes = {
        "output": tmp_path / "run", "steps": 2, "batch_size": 6, "data.latents": json.dumps(files),
        "data.train": f"[{{rows = {json.dumps(str(tmp_path / 'rows.jsonl'))}}}]",
        "model.image_sizes": "[[8, 12], [12, 8]]", "model.patch_positions": "coordinates",
    }  # fmt: skip
    sets = [flag for key, value in changes.items() for flag in ("--set", f"{key}={value}")]
    said = cli("train", place / "train.toml", *sets)
    assert said.code == 0, said.err
    model = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert "16x16, 24x16, 16x24" in cli("info", model).out
    for width, height in ((16, 16), (24, 16), (16, 24)):
        picture_file = tmp_path / f"{width}x{height}.png"
        flags = ("--width", width, "--height", height, "--steps", 2, "--output", picture_file)
        said = cli("generate", "red wide", "--model", model, *flags)
        assert (said.code, "warning" in said.err) == (0, False), said.err
        with Image.open(picture_file) as picture:
            assert picture.size == (width, height)
        assert cli("describe", picture_file, "--model", model, "--max-tokens", 3).code == 0
    said = cli("generate", "red wide", "--model", model, "--width", 20, "--output", tmp_path / "none.png")
    assert said.code == 2
    assert "20x16 cannot be cut into patches of 8 pixels: this model learnt 16x16, 24x16, 16x24" in said.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.autoencoder=FOLDER/other", "stale: made by autoencoder .*: encode the data set again"),
        (
            "data.latents=['FOLDER/codes.safetensors']",
            "holds codes, expected latents: encode with the autoencoder of the model",
        ),
        ("data.latents=[]", "image_channels is 4, and pictures have 3: encode them"),
        ("model.image_height=4", r"latents of shape \[8, 8, 4\].* expects \[4, 8, 4\]"),
        ("model.image_channels=8", r"latents of shape \[8, 8, 4\].* expects \[8, 8, 8\]"),
        ("model.patch_size=3", "image 8x8 cannot be cut into patches of 3"),
        ("model.image_sizes=[[6, 8]]", "image 8x6 cannot be cut into patches of 4"),
        ("data.flip=0.5", "holds no mirrored pictures"),
        (
            "data.train=[{rows='FOLDER/new.jsonl'}]",
            r"holds no latents of .*new\.png.*: encode the data set again",
        ),
    ],
)
def test_what_does_not_fit(cli: Any, place: Path, tmp_path: Path, change: str, message: str) -> None:
    change = change.replace("FOLDER", str(place))
    if change.startswith("model.image_channels"):
        change += f"\nmodel.image_mean={[0.0] * 8}"
    sets = [flag for one in change.split("\n") for flag in ("--set", one)]
    said = cli("train", place / "train.toml", *sets, "--set", f"output={tmp_path / 'run'}")
    assert said.code == 2
    assert len(said.err.strip().splitlines()) == 1, said.err
    assert re.search(message, said.err), said.err
    assert not (tmp_path / "run").exists()


def test_grids_need_the_autoencoder(place: Path, tmp_path: Path) -> None:
    run = config(place, tmp_path, "sample.every=1", "sample.prompts=['moon']")
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, autoencoder=None))
    with pytest.raises(UserError, match=r"sample.every needs data.autoencoder"):
        Trainer(run)


def test_pytorch_reads_the_same_latents(place: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from mlx_transfusion.torch.batch import encode

    latents = LatentCache(place / "latents.safetensors").load([ImageRef(open_images(place), "0.png")])
    trainer = Trainer(config(place, place / "unused"))
    ours = np.array(clean_patches(trainer.model, latents))
    np.testing.assert_allclose(
        encode(torch.from_numpy(latents), trainer.model.config).numpy(), ours, atol=1e-6
    )
