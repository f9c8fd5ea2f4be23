"""Training on pictures of several sizes, and what the model can do afterwards."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from distill_tools import flat
from mlx.utils import tree_flatten
from PIL import Image
from safetensors.numpy import save_file
from tiny_training import COLOURS, MODEL, OPTIMIZER, top, write_jsonl

from mlx_transfusion.editing import Edit, edit_images
from mlx_transfusion.errors import UserError
from mlx_transfusion.images import read_record
from mlx_transfusion.model_io import load
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import load_train_config
from mlx_transfusion.training.data import PICTURE_MULTIPLE, DataSet
from mlx_transfusion.training.pixels import fit, image_size
from mlx_transfusion.training.shard_set import recipe_of
from mlx_transfusion.training.trainer import Trainer

SIZES = [(8, 8), (8, 12), (16, 16)]
"""(height, width) that the model learns: 8x8 and 16x16 share an aspect."""
SHAPES = {"square": (16, 16), "wide": (10, 15), "high": (20, 16)}
SIZED = MODEL + 'patch_positions = "coordinates"\nimage_sizes = [[8, 12], [16, 16]]\n'
DATA = "".join(f'[[data.train]]\nrows = "{name}.jsonl"\nimages = "pictures"\n' for name in ("pairs", "more"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """Twelve captioned pictures of three shapes, a text, and a row of two pictures."""
    folder = tmp_path_factory.mktemp("sizes")
    (folder / "pictures").mkdir()
    rng, pairs = np.random.default_rng(0), []
    for colour, shape in itertools.product(COLOURS, SHAPES):
        pixels = rng.integers(0, 60, (*SHAPES[shape], 3)).astype(np.uint8) + np.uint8(COLOURS[colour]) // 2
        Image.fromarray(pixels).save(folder / f"pictures/{colour}-{shape}.png")
        pairs.append({"image": f"{colour}-{shape}.png", "text": f"{colour} {shape}"})
    write_jsonl(folder / "pairs.jsonl", pairs)
    both = {"segments": [{"image": "red-wide.png"}, {"text": "big"}, {"image": "blue-square.png"}]}
    write_jsonl(folder / "more.jsonl", [both, {"text": "happy cat"}])
    tiny_tokenizer.save(folder)
    return folder


Run = Callable[..., Any]


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Run:
    def make(*overrides: str, model: str = SIZED, data: str = DATA, tail: str = OPTIMIZER) -> Any:
        toml = folder / f"{abs(hash((model, data, tail)))}.toml"
        toml.write_text(
            top(output=str(tmp_path / "run"), batch_size=12, sequence_length=48) + model + data + tail
        )
        return load_train_config(toml, list(overrides))

    return make


def data_of(trainer: Trainer) -> DataSet:
    return trainer.train_data


def test_every_batch_has_as_many_of_each_size(run: Run) -> None:
    trainer = Trainer(run())
    data = data_of(trainer)
    seen, shapes = [], set()
    for step in range(6):
        documents = data.documents(step, 12)
        seen.append(Counter(size for d in documents for size in d.sizes))
        batch = data.batch(documents)
        shapes.add(
            (batch.packed.ids.shape, *(g.pixels.shape for g in batch.groups), batch.packed.text_index.shape)
        )
        for size, group in zip(SIZES, batch.groups, strict=True):
            real = seen[-1][size]
            assert len(group.angle) == -(-real // PICTURE_MULTIPLE) * PICTURE_MULTIPLE
            assert group.pixels.shape[1:3] == group.noise.shape[1:3] == size
            assert not group.angle[real:].any()
            assert not group.noise[real:].any()
    assert all(counts[8, 12] >= 2 and counts[8, 8] >= 2 and counts[16, 16] >= 2 for counts in seen)
    assert len(shapes) <= 2  # what mx.compile keeps


def test_each_picture_is_cropped_to_the_size_of_its_aspect(run: Run, folder: Path) -> None:
    data = data_of(Trainer(run()))
    found = {}
    for step in range(12):
        documents = data.documents(step, 12)
        for size in SIZES:
            loaded = data.pictures(documents, size).pixels
            refs = [ref for d in documents for ref, one in zip(d.images, d.sizes, strict=True) if one == size]
            for ref, pixels in zip(refs, loaded, strict=True):
                image = Image.open(folder / "pictures" / ref.name)
                np.testing.assert_array_equal(pixels, fit(image, *size))
                found.setdefault(ref.name.split("-")[1].removesuffix(".png"), set()).add(size)
    assert found == {"square": {(8, 8), (16, 16)}, "wide": {(8, 12)}, "high": {(8, 8), (16, 16)}}


def test_what_is_packed_does_not_depend_on_the_others(run: Run) -> None:
    """Losses of a batch are the sums of those of its documents, whatever sizes lie beside them."""
    trainer = Trainer(run("compile=false"))
    documents = data_of(trainer).documents(3, 12)
    weights = trainer.step.initial_weights()

    def sums(chosen: Sequence[Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        batch = trainer.step.load(data_of(trainer), chosen)
        gradients, losses = trainer.step.gradients(weights, batch, 7, 5, 0)
        return np.array(losses), flat(gradients)

    whole, gradients = sums(documents)
    parts = [sums(documents[i::3]) for i in range(3)]
    np.testing.assert_allclose(sum(p[0] for p in parts), whole, rtol=1e-5)
    for name, value in gradients.items():
        together = sum(p[1][name] for p in parts)
        np.testing.assert_allclose(together, value, atol=1e-5 + 1e-4 * np.abs(value).max(), err_msg=name)


def test_one_size_with_coordinates_draws_as_ever(run: Run) -> None:
    plain = data_of(Trainer(run(model=MODEL)))
    data = data_of(Trainer(run("output=other", model=MODEL + 'patch_positions = "coordinates"\n')))
    for step in range(3):
        ours, theirs = (d.batch(d.documents(step, 12)) for d in (data, plain))
        assert ours.more == ()
        np.testing.assert_array_equal(ours.pixels, theirs.pixels)
        np.testing.assert_array_equal(ours.packed.patch_row, theirs.packed.patch_row)


def test_turned_photographs_have_their_upright_size(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    for orientation, expected in ((1, (4, 6)), (3, (4, 6)), (6, (6, 4)), (8, (6, 4))):
        exif[0x0112] = orientation
        image.save(tmp_path / "a.jpg", exif=exif)
        assert image_size((tmp_path / "a.jpg").read_bytes(), "a.jpg") == expected
    with pytest.raises(UserError, match=r"b\.jpg: cannot decode the image"):
        image_size(b"no picture", "b.jpg")


@pytest.mark.parametrize("unet", [False, True])
def test_train_then_paint_and_read_every_size(
    run: Run, tmp_path: Path, folder: Path, cli: Callable[..., Any], unet: bool
) -> None:
    patches = 'patch_encoder = "unet"\nunet_channels = 8\nunet_blocks = 1\n' if unet else ""
    Trainer(run("compile=false", model=SIZED + patches)).run()
    model = next((tmp_path / "run/checkpoints").glob("step-*6"))
    assert "8x8, 12x8, 16x16" in cli("info", model).out
    for width, height in ((8, 8), (12, 8), (16, 16)):
        file = tmp_path / f"{width}x{height}.png"
        flags = ("--width", width, "--height", height, "--seed", 5, "--steps", 2, "--output", file)
        result = cli("generate", "red square", "--model", model, *flags)
        assert (result.code, "warning" in result.err) == (0, False), result.err
        assert Image.open(file).size == (width, height)
        record = read_record(file)
        assert (record["width"], record["height"]) == (width, height)
    file, again = tmp_path / "12x8.png", tmp_path / "again.png"
    assert cli("generate", "--from", file, "--model", model, "--output", again).code == 0
    np.testing.assert_array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(file)))
    wide, square = folder / "pictures/red-wide.png", folder / "pictures/blue-square.png"
    assert cli("describe", wide, square, "--model", model, "--max-tokens", 3).code == 0
    loaded = load(model)
    edits = [Edit(wide, "big", 1), Edit(square, "big", 2), Edit(square, "sad", 3)]
    quick = GenerationSettings(steps=2)
    made = edit_images(loaded, edits, quick, 1.5)
    assert [m.pixels.shape[:2] for m in made] == [(8, 12), (16, 16), (16, 16)]
    small = edit_images(loaded, edits[1:2], quick, 1.5, size=(8, 8))[0]
    assert small.settings["height"] == 8
    file = tmp_path / "edited.png"
    flags = ("--width", 8, "--height", 8, "--steps", 2, "--output", file)
    assert cli("edit", square, "big", "--model", model, *flags).code == 0
    assert Image.open(file).size == (8, 8)
    again = tmp_path / "edited-again.png"
    assert cli("edit", square, "--from", file, "--model", model, "--output", again).code == 0
    np.testing.assert_array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(file)))


def test_sizes_on_the_command_line(run: Run, tmp_path: Path, cli: Callable[..., Any]) -> None:
    Trainer(run("steps=1", "save_every=1", "compile=false")).run()
    model = next((tmp_path / "run/checkpoints").glob("step-*1"))
    common = ("generate", "red square", "--model", model, "--steps", 1, "--seed", 0)
    file = tmp_path / "out.png"
    result = cli(*common, "--width", 20, "--height", 8, "--output", file)
    assert result.code == 0
    name = model.name
    assert f"warning: model {name} learnt 8x8, 12x8, 16x16, and 20x8 is none of them" in result.err
    assert Image.open(file).size == (20, 8)
    result = cli(*common, "--width", 10, "--output", tmp_path / "none.png")
    assert result.code == 2
    assert "10x8 cannot be cut into patches of 4 pixels: this model learnt 8x8, 12x8, 16x16" in result.err
    assert not (tmp_path / "none.png").exists()
    assert cli(*common, "--width", 12, "--output", file, "--overwrite").code == 0
    assert Image.open(file).size == (12, 8)


DISTILL = (
    OPTIMIZER + '[consistency]\nguidance = 2.0\nmethod = "{method}"\nvalid_pictures = 2\ntangent_warmup = 0\n'
)


@pytest.mark.parametrize("method", ["scm", "ect"])
def test_distillation_of_several_sizes(
    run: Run, tmp_path: Path, cli: Callable[..., Any], method: str
) -> None:
    Trainer(run("compile=false")).run()
    teacher = next((tmp_path / "run/checkpoints").glob("step-*6"))
    tail = DISTILL.format(method=method).replace("guidance", f'teacher = "{teacher}"\nguidance', 1)
    student = f"output={tmp_path / 'student'}"
    trainer = Trainer(run(student, "steps=2", model="", tail=tail))
    documents = data_of(trainer).documents(0, 12)
    batch = trainer.step.load(data_of(trainer), documents)
    assert [g.size for g in batch.groups] == SIZES
    weights = trainer.step.initial_weights()
    gradients, sums = trainer.step.gradients(weights, batch, 9, 8, 1)
    parts = [
        trainer.step.gradients(weights, trainer.step.load(data_of(trainer), documents[i::2]), 9, 8, 1)
        for i in range(2)
    ]
    np.testing.assert_allclose(np.array(sum(p[1] for p in parts)), np.array(sums), rtol=1e-4)
    names = [name for name, _ in tree_flatten(gradients)]
    for name, whole, a, b in zip(
        names, *(flat(t).values() for t in (gradients, *(p[0] for p in parts))), strict=True
    ):
        np.testing.assert_allclose(a + b, whole, atol=1e-5 + 1e-3 * np.abs(whole).max(), err_msg=name)
    trainer.run()
    model = next((tmp_path / "student/checkpoints").glob("step-*2"))
    file = tmp_path / "wide.png"
    assert cli("generate", "red wide", "--model", model, "--width", 12, "--output", file).code == 0
    assert Image.open(file).size == (12, 8)


def test_latents_of_several_sizes(run: Run, folder: Path, tmp_path: Path) -> None:
    names = sorted(p.name for p in (folder / "pictures").iterdir())

    def encoded(file: str, height: int, width: int, maker: str = "a") -> str:
        """A file as `autoencoder encode` writes it."""
        latents = np.random.default_rng(height * width).normal(size=(len(names), 1, height, width, 3))
        metadata = {
            "format": "mlx-transfusion-latents", "autoencoder": maker, "size": "16",
            "names": str(names).replace("'", '"'),
        }  # fmt: skip
        save_file({"latents": latents.astype(np.float32)}, tmp_path / file, metadata)
        return str(tmp_path / file)

    files = [encoded(f"{h}x{w}", h, w) for h, w in SIZES]

    def use(*chosen: str) -> Trainer:
        return Trainer(run(f"data.latents={list(chosen)}".replace("'", '"')))

    trainer = use(*files[::-1])
    batch = data_of(trainer).batch(data_of(trainer).documents(0, 12))
    assert [g.pixels.shape[1:3] for g in batch.groups] == SIZES
    assert all(g.pixels.dtype == np.float32 for g in batch.groups)
    trainer.run()
    assert np.isfinite(
        np.array(mx.concatenate([v.reshape(-1) for _, v in tree_flatten(trainer.model.parameters())]))
    ).all()
    with pytest.raises(UserError, match="no file has the size 16x16, which the model learns"):
        use(*files[:2])
    with pytest.raises(UserError, match="latents of 4x4, and the model learns 8x8, 12x8, 16x16"):
        use(*files, encoded("4x4", 4, 4))
    with pytest.raises(UserError, match="are of two autoencoders: encode both with one"):
        use(*files[:2], encoded("other", 16, 16, "b"))


def test_what_learns_one_size_only(run: Run, tmp_path: Path, cli: Callable[..., Any]) -> None:
    config = run("steps=1", "save_every=1", "compile=false")
    Trainer(config).run()
    model = next((tmp_path / "run/checkpoints").glob("step-*1"))
    tail = OPTIMIZER + '[adapter]\nmodality = "image"\nrank = 2\n'
    with pytest.raises(UserError, match="is for models of one picture size"):
        Trainer(run(f"output={tmp_path / 'adapter'}", f"init={model}", model="", tail=tail))
    with pytest.raises(
        UserError, match="shards hold pictures of one size, and the model learns 8x8, 12x8, 16x16"
    ):
        recipe_of(load(model).transfusion.config, load(model).tokenizer, 48)
    torch = pytest.importorskip("torch", reason="the PyTorch path needs it")
    from mlx_transfusion.torch.model import Transfusion as TorchTransfusion

    with (
        torch.device("meta"),
        pytest.raises(UserError, match="which several picture sizes need, is trained by the MLX"),
    ):
        TorchTransfusion(load(model).transfusion.config)


def test_a_batch_that_is_too_small_for_all_sizes(run: Run) -> None:
    with pytest.raises(
        UserError, match="batch_size 4 is too small for 5 sources, or parts of them by picture size"
    ):
        Trainer(run("batch_size=4")).run()
