from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image as PillowImage
from tiny_training import write_jsonl

from mlx_transfusion import sequence
from mlx_transfusion.cli import main
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.editing import Edit, _velocity, edit_images
from mlx_transfusion.errors import UserError
from mlx_transfusion.images import load_pixels, read_record
from mlx_transfusion.model_io import load, save_model
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.sequence import Image, Text
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import DataConfig, DiffusionConfig, SourceConfig
from mlx_transfusion.training.data import DataSet
from mlx_transfusion.training.step import evaluate_batch, to_arrays

Make = Callable[..., Transfusion]
INSTRUCTION = "happy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer, make_model: Make,
           tiny_config: ModelConfig) -> Path:  # fmt: skip
    """A model, two pictures and edit rows between them."""
    folder = tmp_path_factory.mktemp("edits")
    save_model(folder / "model", make_model(tiny_config), tiny_tokenizer)
    for name, colour in (("red", (200, 30, 30)), ("blue", (20, 40, 220))):
        pixels = np.full((8, 8, 3), 255, np.uint8)
        pixels[2:6, 1:5] = colour
        PillowImage.fromarray(pixels).save(folder / f"{name}.png")
    rows = [
        {"source": "red.png", "instruction": "blue star", "target": "blue.png"},
        {"source": "blue.png", "instruction": "red heart", "target": "red.png"},
    ]
    write_jsonl(folder / "edits.jsonl", rows)
    return folder


def edit_data(folder: Path, config: ModelConfig, tokenizer: Tokenizer, **data: Any) -> DataSet:
    source = SourceConfig(str(folder / "edits.jsonl"))
    settings = DataConfig((source,), **data)
    return DataSet((source,), settings, DiffusionConfig(), config, tokenizer, seed=0, sequence_length=32)


# ---- rows ----


def test_the_source_is_clean_context_and_the_target_is_learned(
    folder: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    data = edit_data(folder, tiny_config, tiny_tokenizer, instruction_drop=0.0, source_drop=0.0)
    for document in data.documents(0, 6):
        assert document.angles[0] == 0
        assert 0 < document.angles[1] <= math.pi / 2
        kinds = "".join("I" if isinstance(s, Image) else "t" for s in document.segments)
        assert kinds == "ttItttItt"  # BOS BOI source EOI instruction BOI target EOI EOS
        assert data.count(document)[1] == 1
        text = next(s for s in document.segments if isinstance(s, Text) and len(s.ids) > 1)
        assert not text.loss
    batch = data.batch(data.documents(0, 6))
    assert int((batch.angle == 0).sum()) == 6
    counted = sum(data.count(d)[0] for d in data.documents(0, 6))
    assert counted == batch.text_targets


def test_a_clean_picture_has_no_loss_and_no_gradient(
    folder: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tiny_model: Transfusion
) -> None:
    data = edit_data(folder, tiny_config, tiny_tokenizer, instruction_drop=0.0, source_drop=0.0)
    batch = data.batch(data.documents(0, 4))
    total, count = evaluate_batch(tiny_model, batch)[2:]
    assert count == 4
    # The noise of a clean picture is its target and nowhere in its input: it must not matter.
    noise = batch.noise.copy()
    noise[batch.angle == 0] += 3
    np.testing.assert_allclose(
        evaluate_batch(tiny_model, dataclasses.replace(batch, noise=noise))[2], total, rtol=1e-6
    )
    noise[batch.angle > 0] += 3
    assert abs(evaluate_batch(tiny_model, dataclasses.replace(batch, noise=noise))[2] - total) > 0.1


def test_what_is_dropped_for_guidance(
    folder: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    data = edit_data(folder, tiny_config, tiny_tokenizer, instruction_drop=0.3, source_drop=0.2)
    count = 400
    kinds = Counter()
    for document in data.documents(0, count):
        text = any(isinstance(s, Text) and not s.loss for s in document.segments)
        kinds[len(document.images), text] += 1
    assert set(kinds) == {(2, True), (2, False), (1, False)}
    # Three standard deviations of a share of 400 are below 0.08.
    assert kinds[2, False] / count == pytest.approx(0.3, abs=0.08)
    assert kinds[1, False] / count == pytest.approx(0.2, abs=0.08)


def test_both_pictures_are_mirrored_together(
    folder: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    data = edit_data(folder, tiny_config, tiny_tokenizer, flip=0.5, instruction_drop=0.0, source_drop=0.0)
    flips = [tuple(d.flips) for d in data.documents(0, 40)]
    assert set(flips) == {(False, False), (True, True)}


@pytest.mark.parametrize(
    "row",
    [
        {"source": "red.png", "target": "blue.png"},
        {"source": "red.png", "instruction": " ", "target": "blue.png"},
        {"source": "red.png", "instruction": "x", "target": "none.png"},
        {"source": "red.png", "instruction": "x", "target": "blue.png", "text": "y"},
    ],
)
def test_bad_edit_rows(
    folder: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, row: dict, tmp_path: Path
) -> None:
    source = SourceConfig(str(write_jsonl(tmp_path / "bad.jsonl", [row])), str(folder))
    with pytest.raises(UserError, match=r"bad\.jsonl:1"):
        DataSet((source,), DataConfig((source,)), DiffusionConfig(), tiny_config, tiny_tokenizer, seed=0,
                sequence_length=32)  # fmt: skip


# ---- painting ----


def test_the_document_of_an_edit_is_that_of_training(
    folder: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    """Without guidance, the velocity in `edit` is the prediction of the packed forward of an edit row."""
    loaded = load(folder / "model")
    data = edit_data(folder, tiny_config, tiny_tokenizer, instruction_drop=0.0, source_drop=0.0)
    document = data.documents(0, 1)[0]
    arrays = to_arrays(data.batch([document]), loaded.transfusion)[0]
    expected = np.array(loaded.transfusion(arrays)[1][1])
    row = data.rows[0][next(i for i, r in enumerate(data.rows[0]) if r.segments[0] == document.images[0])]
    source = load_pixels(folder / document.images[0].name, 8, 8)
    settings = GenerationSettings(guidance=1.0).resolve()
    ids = tiny_tokenizer.encode(str(row.segments[1]))
    velocity = _velocity(loaded.pictures, [(source, ids)], settings, 1.0)
    ours = np.array(velocity(arrays.patches[1:2], float(arrays.angle[1].item())))[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)
    assert sequence.length(document.segments) == 1 + 6 + len(ids) + 6 + 1


@pytest.mark.parametrize(("text", "image"), [(1.0, 1.0), (3.0, 1.0), (1.0, 2.0), (4.0, 1.5)])
def test_guidance_is_the_sum_of_its_branches(folder: Path, text: float, image: float) -> None:
    model = load(folder / "model").pictures
    source = load_pixels(folder / "red.png", 8, 8)
    x = mx.random.normal((1, *model.latent_shape), key=mx.random.key(0))

    def at(ids: list[int], scales: tuple[float, float]) -> np.ndarray:
        settings = GenerationSettings(guidance=scales[0]).resolve()
        return np.array(_velocity(model, [(source, ids)], settings, scales[1])(x, 1.0))

    full, only_source = at([9, 10], (1.0, 1.0)), at([], (1.0, 1.0))
    _, cache = model.prefill(np.array([model.image_prefix([])]), np.array([2]))
    nothing = np.array(model.velocity(x, mx.array([1.0]), cache))
    expected = nothing + image * (only_source - nothing) + text * (full - only_source)
    np.testing.assert_allclose(at([9, 10], (text, image)), expected, rtol=1e-3, atol=1e-4)


def test_an_edit_does_not_depend_on_its_batch(folder: Path) -> None:
    loaded = load(folder / "model")
    edits = [Edit(folder / "red.png", "happy", 3), Edit(folder / "blue.png", "sad cat dog", 4)]
    settings = GenerationSettings(steps=2, guidance=2.0, batch_size=2)
    together = edit_images(loaded, edits, settings, 1.5)
    alone = [
        edit_images(loaded, [edit], dataclasses.replace(settings, batch_size=1), 1.5)[0] for edit in edits
    ]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(a.pixels.astype(int) - b.pixels).max() <= 1
    assert not np.array_equal(together[0].pixels, together[1].pixels)


def test_the_source_matters(folder: Path) -> None:
    loaded = load(folder / "model")
    settings = GenerationSettings(steps=2, guidance=1.0)
    a, b = (edit_images(loaded, [Edit(folder / f"{n}.png", "happy")], settings)[0] for n in ("red", "blue"))
    assert not np.array_equal(a.pixels, b.pixels)


# ---- the verb ----


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


def test_edit_writes_a_picture_that_repeats_itself(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "out.png", tmp_path / "again.png"
    flags = ("--guidance", 2.5, "--image-guidance", 1.5, "--steps", 2, "--seed", 7)
    assert run("edit", folder / "red.png", INSTRUCTION, "-m", folder / "model", *flags, "-o", out) == 0
    record = read_record(out)
    assert (record["prompt"], record["seed"], record["guidance"]) == (INSTRUCTION, 7, 2.5)
    assert record["edit"]["image_guidance"] == 1.5
    assert capsys.readouterr().out.strip() == str(out)
    assert run("edit", folder / "red.png", "--from", out, "-m", folder / "model", "-o", again) == 0
    assert np.array_equal(np.array(PillowImage.open(out)), np.array(PillowImage.open(again)))
    assert read_record(again) == record


def test_bad_input_of_the_verb(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    model = ("-m", folder / "model")
    assert run("edit", folder / "red.png", INSTRUCTION, *model, "--steps", 1, "-o", out) == 0
    (tmp_path / "broken.png").write_bytes(b"no picture")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((folder / "red.png", *model), "give either an INSTRUCTION or --from"),
        ((folder / "red.png", " ", *model), "the instruction is empty"),
        ((folder / "red.png", "red " * 60, *model), "the instruction is too long"),
        ((tmp_path / "none.png", "red", *model), "none.png: cannot read the image"),
        ((tmp_path / "broken.png", "red", *model), "broken.png: cannot decode the image"),
        ((folder / "red.png", "red", *model, "--image-guidance", "-1"), "image guidance is -1.0"),
        ((folder / "blue.png", "--from", out, *model), "was made from another picture"),
        ((folder / "red.png", "--from", folder / "red.png", *model), "holds no settings"),
        ((folder / "red.png", "red", "-m", tmp_path / "nowhere"), "does not exist"),
        ((folder / "red.png", "red", *model, "--adapter", tmp_path / "nowhere"), "no such adapter"),
    ]
    capsys.readouterr()
    for arguments, message in cases:
        assert run("edit", *arguments, "-o", tmp_path / "never.png") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "never.png").exists()
    assert run("generate", "--from", out, "-o", tmp_path / "never.png") == 2
    assert "repeat it with `edit`" in capsys.readouterr().err
