"""Distillation on edits: prefixes that hold a clean picture, the teacher's guidance, a student that edits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from distill_tools import step_of
from tiny_training import MakeConfig, write_jsonl

from mlx_transfusion.editing import _velocity
from mlx_transfusion.images import read_record
from mlx_transfusion.models.family import PictureFamily
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.training.config import TrainConfig
from mlx_transfusion.training.data import Document
from mlx_transfusion.training.prefix_arrays import arrays_of
from mlx_transfusion.training.prefix_data import PLACE, count, prefix_batch, prefix_of
from mlx_transfusion.training.trainer import Trainer, train

PATCHES = 4


@pytest.fixture
def edits(folder: Path, config: MakeConfig) -> Callable[..., TrainConfig]:
    """A run on edits and captioned pictures."""
    colours = [("red", "blue")[i % 2] for i in range(12)]
    write_jsonl(
        folder / "edits.jsonl",
        [
            {"source": f"{i}.png", "instruction": f"{colours[i + 1]} face", "target": f"{i + 1}.png"}
            for i in range(11)
        ],
    )
    sources = ", ".join(
        f'{{rows="{folder}/{name}.jsonl", images="{folder}/pictures"}}' for name in ("edits", "pairs")
    )

    def make(*overrides: str) -> TrainConfig:
        drops = ("data.caption_first=1.0", "data.instruction_drop=0.0", "data.source_drop=0.0")
        return config(f"data.train=[{sources}]", "data.valid=[]", *drops, *overrides)

    return make


def documents_of(trainer: Trainer) -> list[Document]:
    return trainer.train_data.documents(1, 8)


def test_an_edit_is_split_before_its_new_picture(edits: Callable[..., TrainConfig]) -> None:
    data = Trainer(edits()).train_data
    documents = data.documents(1, 8)
    assert [len(d.images) for d in documents] == [2] * 4 + [1] * 4
    batch = prefix_batch(data, documents, edits=True)
    assert batch.rest is None
    assert batch.sources is not None
    for row, d in enumerate(documents):
        prefix = prefix_of(d, edits=True)
        assert prefix is not None
        if row < 4:
            assert prefix[2 : 2 + PATCHES] == [PLACE] * PATCHES
            assert prefix_of(d) is None
            assert count(data, d, edits=True) == (0, 1)
            assert batch.sources.start[row] == 2
            whole = data.pictures([d])
            assert np.array_equal(batch.sources.pixels[row], whole.pixels[0])
            assert np.array_equal(batch.pictures.pixels[row], whole.pixels[1])
            assert np.array_equal(batch.pictures.noise[row], whole.noise[1])
            assert batch.pictures.angle[row] == whole.angle[1] > 0
        else:
            assert batch.sources.start[row] == -1
            assert batch.sources.alone[row, : batch.sources.alone_lengths[row]].tolist() == [1, 4]
    assert batch.ids.min() >= 0
    assert batch.text_targets == sum(count(data, d, edits=True)[0] for d in documents)
    plain = prefix_batch(data, documents)  # what cannot read a source leaves edits to the rest
    assert plain.rest is not None
    assert plain.weight.sum() == 4


def read_one_by_one(model: PictureFamily, d: Document, source: mx.array | None) -> list[Any]:
    words = [i for s in d.segments[4:-4] for i in s.ids]  # type: ignore[union-attr]
    return [model.read_edit(source, words), model.read_edit(source, [])]


def test_prefixes_are_those_of_editing(edits: Callable[..., TrainConfig]) -> None:
    """In a batch with padding, and beside prefixes without a picture."""
    trainer = Trainer(edits())
    model, documents = trainer.model, documents_of(trainer)
    batch = prefix_batch(trainer.train_data, documents, edits=True)
    p, _ = arrays_of(batch, model)
    assert p.sources is not None
    clean, start, alone, alone_lengths = p.sources
    read = model.read_prefix(*p.prefixes)[1], model.read_prefix(alone, clean, start)[1]
    for row in range(4):
        source = mx.array(batch.sources.pixels[row : row + 1]).astype(mx.float32) / 255  # type: ignore[union-attr]
        caches = read_one_by_one(model, documents[row], source)
        for found, cache, lengths in zip(read, caches, (p.lengths, alone_lengths), strict=True):
            n = int(lengths[row].item())
            assert cache.lengths.tolist() == [n]
            for (k, v), wanted in zip(found, cache.layers, strict=True):
                np.testing.assert_allclose(k[row : row + 1, :, :n], wanted[0][:, :, :n], atol=2e-5)
                np.testing.assert_allclose(v[row : row + 1, :, :n], wanted[1][:, :, :n], atol=2e-5)
    plain = model.read_prefix(p.ids[4:])[1]
    for (k, v), (wanted_k, wanted_v) in zip(read[0], plain, strict=True):
        np.testing.assert_allclose(k[4:], wanted_k, atol=2e-5)
        np.testing.assert_allclose(v[4:], wanted_v, atol=2e-5)


def test_the_teacher_is_guided_as_edits_are(edits: Callable[..., TrainConfig]) -> None:
    trainer = Trainer(edits("consistency.guidance=2.5"))
    assert trainer.teacher is not None
    teacher, documents = trainer.teacher.model, documents_of(trainer)[:4]
    batch = prefix_batch(trainer.train_data, documents, edits=True)
    p, _ = arrays_of(batch, teacher)
    p = p._replace(angle=mx.full(p.angle.shape, 0.9))
    found = step_of(trainer)._cos_velocity(p)[:4]
    assert batch.sources is not None
    words = [[i for s in d.segments[4:-4] for i in s.ids] for d in documents]  # type: ignore[union-attr]
    settings = GenerationSettings(guidance=2.5).resolve()
    wanted = _velocity(teacher, list(zip(batch.sources.pixels, words, strict=False)), settings, 1.0)(
        p.x[:4], 0.9
    )
    np.testing.assert_allclose(found, np.cos(0.9) * np.array(wanted), atol=1e-4)


@pytest.mark.parametrize("student", ["painter", "full"])
def test_a_student_of_edits_edits_in_two_steps(
    student: str, edits: Callable[..., TrainConfig], folder: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    run = edits(f"consistency.student={student}", "consistency.method=ect", "steps=2", "valid_every=0")
    model = train(run)
    made = tmp_path / "edited.png"
    source = folder / "pictures" / "0.png"
    result = cli("edit", source, "blue face", "--model", model, "--output", made)
    assert result.code == 0, result.err
    record = read_record(made)
    assert (record["steps"], record["guidance"], record["sampler"]) == (2, 1.0, "consistency")


def test_validation_counts_edits(edits: Callable[..., TrainConfig]) -> None:
    trainer = Trainer(edits("consistency.student=painter"))
    rows = trainer.step.validate(trainer.train_data, 1, 8)
    assert set(rows) == {"valid_teacher_gap_1", "valid_teacher_gap_2"}
    assert all(0 < gap < np.inf for gap in rows.values())
