"""A student with a painter: own weights for pictures, text frozen."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from distill_tools import flat, step_of, stop_after
from tiny_training import MakeConfig, state

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import load, save_model
from mlx_transfusion.training.config import load_train_config
from mlx_transfusion.training.consistency_step import LOSS_WEIGHT
from mlx_transfusion.training.prefix_arrays import arrays_of
from mlx_transfusion.training.trainer import Trainer, train


def test_a_painter_leaves_reading_and_writing_as_they_were(config: MakeConfig) -> None:
    run = config("consistency.student=painter", "steps=4")
    teacher, student = load(run.consistency.teacher), load(train(run))  # type: ignore[union-attr]
    assert student.config.painter
    before, after = flat(teacher.model.parameters()), flat(student.model.parameters())
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    own = {
        name.removeprefix("painter."): value for name, value in after.items() if name.startswith("painter.")
    }
    assert own.keys() <= before.keys()
    assert any(not np.array_equal(v, before[n]) for n, v in own.items())
    assert not any("embed_tokens" in name or "lm_head" in name for name in own)
    ids, lengths = np.array([[1, 7, 8, 4]]), np.array([4])
    logits, cache = student.model.prefill(ids, lengths)
    wanted, teachers = teacher.model.prefill(ids, lengths)
    assert np.array_equal(np.array(logits), np.array(wanted))
    shape = (1, student.config.patches_per_image, student.config.patch_dim)
    x, angle = mx.random.normal(shape, key=mx.random.key(0)), mx.array([0.9])
    painted, same = student.model.velocity(x, angle, cache), teacher.model.velocity(x, angle, teachers)
    assert mx.abs(painted - same).max().item() > 0
    student.model.extend_image(x, cache)
    teacher.model.extend_image(x, teachers)
    for ours, theirs in zip(cache.layers, teachers.layers, strict=True):
        assert ours is not None
        assert theirs is not None
        assert np.array_equal(np.array(ours[0]), np.array(theirs[0]))


def test_a_painter_starts_as_its_teacher(config: MakeConfig) -> None:
    trainer = Trainer(config("consistency.student=painter"))
    assert trainer.teacher is not None
    p, _ = arrays_of(trainer._load(0).parts[0], trainer.model)
    _, prefix = trainer.model.read_prefix(p.ids)
    a, b = (m.paint(p.x, p.angle, prefix, p.lengths) for m in (trainer.model, trainer.teacher.model))
    assert np.array_equal(np.array(a), np.array(b))
    assert set(trainer.state.weights) == {"painter", LOSS_WEIGHT}
    assert set(trainer.state.ema) == {"painter"}


def test_a_painter_resumes_exactly(config: MakeConfig) -> None:
    whole = train(config("consistency.student=painter", output="whole"))
    half = Trainer(config("consistency.student=painter", "save_every=3", output="half"))
    stop_after(half, 3)
    again = train(config("consistency.student=painter", "save_every=3", output="half"))
    a, b = state(whole), state(again)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_painter_needs_a_model_to_stand_beside(folder: Path) -> None:
    toml = folder / "alone.toml"
    toml.write_text(
        (folder / "distill.toml").read_text().replace('teacher = "teacher"', 'student = "painter"')
    )
    with pytest.raises(UserError, match=r"needs a teacher or init|there is no model to start from"):
        load_train_config(toml)


def test_a_painter_that_reads_otherwise_than_its_teacher_shares_no_prefix(
    config: MakeConfig, folder: Path, tmp_path: Path
) -> None:
    """From another model than the teacher: the teacher's velocity must come from the teacher's own prefix."""
    other = load(folder / "teacher")
    embedding = other.model.embed_tokens
    embedding.weight = embedding.weight + 0.5
    save_model(tmp_path / "other", other.model, other.tokenizer)
    alike = Trainer(config("consistency.student=painter", output="alike"))
    apart = Trainer(config("consistency.student=painter", f"init={tmp_path / 'other'}", output="apart"))
    assert step_of(alike)._read_alike
    assert not step_of(apart)._read_alike
    assert apart.teacher is not None
    p, _ = arrays_of(apart._load(0).parts[0], apart.model)
    _, prefix = apart.teacher.model.read_prefix(p.ids)
    wanted, found = step_of(alike)._cos_velocity(p, prefix), step_of(apart)._cos_velocity(p)
    assert mx.abs(wanted - found).max().item() < 1e-5
    _, wrong = apart.model.read_prefix(p.ids)
    assert mx.abs(step_of(alike)._cos_velocity(p, wrong) - found).max().item() > 1e-3


def test_a_full_student_cannot_start_from_a_painter(config: MakeConfig) -> None:
    painter = train(config("consistency.student=painter", "steps=1", output="painter"))
    with pytest.raises(UserError, match="has a painter"):
        Trainer(config(f"init={painter}", output="full"))
