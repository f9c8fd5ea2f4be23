"""Consistency training end to end: the loop, resume, signals, what stops it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from distill_tools import both_methods, step_of, stop_after
from mlx.utils import tree_flatten
from tiny_training import MakeConfig, state

from mlx_transfusion.cli import _run
from mlx_transfusion.errors import UserError
from mlx_transfusion.images import read_record
from mlx_transfusion.model_io import load
from mlx_transfusion.training.checkpoint import checkpoints
from mlx_transfusion.training.consistency_step import LOSS_WEIGHT
from mlx_transfusion.training.prefix_arrays import arrays_of
from mlx_transfusion.training.signals import BUCKETS, Signals, Watch
from mlx_transfusion.training.trainer import Trainer, train

# ---- the loop ----


@pytest.mark.parametrize(("method", "recorded"), [("scm", "scd"), ("ect", "ect"), ("scm_hops", "scm_hops")])
def test_a_run_saves_a_consistency_model(config: MakeConfig, method: str, recorded: str) -> None:
    run = config(
        f"consistency.method={method}",
        "valid_every=3",
        "sample.every=6",
        'sample.prompts=["red star", "blue moon"]',
    )
    last = train(run)
    loaded = load(last)
    teacher = load(run.consistency.teacher)  # type: ignore[union-attr]
    assert loaded.extra["objective"] == {
        "name": "consistency", "method": recorded, "teacher": teacher.fingerprint, "guidance": 2.0, "angles": [1.1],
    }  # fmt: skip
    assert not any(name.startswith(LOSS_WEIGHT) for name, _ in tree_flatten(loaded.model.parameters()))
    rows = [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").read_text().splitlines()]
    assert {"valid_text_loss", "valid_teacher_gap_1", "valid_teacher_gap_2"} < rows[-1].keys()
    signals = {key.split("/")[0] for row in rows for key in row if "/" in key}
    assert signals == {"tangent", "drift", "derivative", "loss", "log_weight"}
    grid = read_record(Path(run.output) / "samples" / "step-00000006.png")
    assert [(row["sampler"], row["steps"]) for row in grid["rows"]] == [
        ("dpmpp_2m", None), ("consistency", 2), ("consistency", 1)
    ]  # fmt: skip
    assert grid["seeds"] == [0, 1]  # of every row


@both_methods
def test_distillation_brings_the_student_to_its_teacher(config: MakeConfig, method: str) -> None:
    """One step paints ever more like the teacher's many; a wrong objective leaves the gap or widens it.

    200 steps bring it to 0.2-0.55 of its start (three seeds). Without the derivative, with the tangent's sign
    flipped, or with the posterior mean as target it stays where it was (1.0) or grows: all measured.
    """
    run = config(
        f"consistency.method={method}", "steps=200", "save_every=1000", "batch_size=16",
        "optimizer.learning_rate=3e-3", "optimizer.weight_decay=0", "ema=0.9",
        "consistency.tangent_warmup=20", "consistency.valid_pictures=16",
        "consistency.guidance=1.0", "consistency.adaptive_weight=false", "data.caption_drop=0",
        "data.caption_first=1.0", "diffusion.high_noise_share=[0.3, 0.3]",
    )  # fmt: skip
    trainer = Trainer(run)
    assert trainer.valid_data is not None
    before = trainer.step.validate(trainer.valid_data, 1, 9)
    trainer.run()
    trainer.model.update(trainer.state.ema)
    after = trainer.step.validate(trainer.valid_data, 1, 9)
    assert before["valid_teacher_gap_1"] > 0.4
    assert after["valid_teacher_gap_1"] < 0.7 * before["valid_teacher_gap_1"]
    assert after["valid_text_loss"] < before["valid_text_loss"] + 0.1


@both_methods
def test_resume_equals_the_uninterrupted_run(config: MakeConfig, method: str) -> None:
    chosen = f"consistency.method={method}"
    whole = train(config(chosen, output="whole"))
    half = Trainer(config(chosen, "save_every=3", output="half"))
    stop_after(half, 3)
    again = train(config(chosen, "save_every=3", output="half"))
    a, b = state(whole), state(again)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert any(LOSS_WEIGHT in name for name in a)


def test_a_run_of_an_older_version_resumes(config: MakeConfig) -> None:
    """Its record lacks the keys that came later: they count as their defaults, not as another run."""
    stop_after(Trainer(config("save_every=3")), 3)
    file = checkpoints(Path(config().output) / "checkpoints")[-1] / "state.json"
    record = json.loads(file.read_text())
    for key in ("method", "gap_stages", "gap_factor"):
        del record["config"]["consistency"][key]
    del record["config"]["optimizer"]["muon_learning_rate"]
    file.write_text(json.dumps(record))
    assert Trainer(config("save_every=3")).resume()
    with pytest.raises(UserError, match=r"was trained with consistency\.method = scm, the config says ect"):
        Trainer(config("save_every=3", "consistency.method=ect")).resume()


def test_a_blow_up_stops_and_keeps_the_last_good_state(config: MakeConfig) -> None:
    run = config(
        "optimizer.learning_rate=1e9", "optimizer.clip=0", "optimizer.warmup=0", "steps=200", "save_every=1"
    )
    first = r"blew up: (tangent|image loss|gradient norm) left its usual range first, at step \d+; the last"
    with pytest.raises(UserError, match=first):
        train(run)
    kept = checkpoints(Path(run.output) / "checkpoints")
    for name, value in state(kept[-1]).items() if kept else ():
        assert np.isfinite(value).all(), name


# ---- signals ----


def test_signals_average_by_angle() -> None:
    signals = Signals()
    angle = np.array([0.05, 0.1, 1.5, 1.0], np.float32)
    seen = mx.array(np.arange(20, dtype=np.float32).reshape(5, 4))
    signals.add(np.array([1, 1, 1, 0]), angle, seen)
    assert signals.tangent() == 1.0
    out = signals.collect()
    width = np.pi / 2 / BUCKETS
    assert out[f"tangent/0.00-{width:.2f}"] == 0.5
    assert out[f"loss/{7 * width:.2f}-1.57"] == 14.0
    assert out["tangent_worst"] == 2.0
    assert signals.collect() == {}


def test_watch_names_the_first_signal() -> None:
    watch = Watch()
    for step in range(50):
        assert watch.observe(step, {"tangent": 1.0 + step % 3, "gradient norm": 2.0}) is None
    assert watch.calm
    assert watch.observe(50, {"tangent": 1000.0, "gradient norm": 2.0}) is None
    assert not watch.calm
    assert watch.observe(51, {"tangent": 1.0, "gradient norm": 2.0}) is None
    assert watch.calm
    for step in range(52, 52 + Watch.PATIENCE):
        assert watch.observe(step, {"tangent": 1000.0, "gradient norm": 500.0 if step > 55 else 2.0}) is None
    trouble = watch.observe(52 + Watch.PATIENCE, {"tangent": 1000.0, "gradient norm": 500.0})
    assert trouble == "tangent left its usual range first, at step 52"
    assert "gradient norm" in (Watch().observe(0, {"gradient norm": float("nan"), "tangent": 1.0}) or "")


# ---- bad input ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("consistency.tangent=normalise",), 'consistency.tangent is "normalise", expected one of normalize'),
        (
            ("consistency.method=meanflow",),
            'consistency.method is "meanflow", expected one of scm, ect, scm_hops',
        ),
        (("consistency.gap_factor=1.5",), "consistency.gap_factor is 1.5, expected 2"),
        (("consistency.gap_stages=20",), "to the power of gap_stages 20"),
        (("consistency.text=teacher", "consistency.student=painter"), 'text "teacher" is for a full student'),
        (("consistency.guidance=-1",), "consistency.guidance is -1"),
        (("consistency.teecher=emoji",), 'unknown key "teecher"; did you mean "teacher"'),
        (("consistency.angles=[2.0]",), r"consistency.angles\[0\] is 2.0"),
        (("model.hidden_size=16",), "missing"),
    ],
)
def test_bad_tables_are_refused(config: MakeConfig, change: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(config(*change))


def test_a_teacher_is_a_diffusion_model(config: MakeConfig, folder: Path, tmp_path: Path) -> None:
    """Its objective decides; a diffusion model may say that it is one."""
    for name in ("diffusion", "consistency"):
        copy = shutil.copytree(folder / "teacher", tmp_path / name)
        table = json.loads((copy / "config.json").read_text()) | {"objective": {"name": name}}
        (copy / "config.json").write_text(json.dumps(table))
    assert Trainer(config(f"consistency.teacher={tmp_path / 'diffusion'}")).teacher is not None
    with pytest.raises(UserError, match="is a consistency model itself"):
        Trainer(config(f"consistency.teacher={tmp_path / 'consistency'}"))


def test_a_teacher_that_predicts_noise_is_distilled(config: MakeConfig, folder: Path, tmp_path: Path) -> None:
    """Its config decides how its output is read; the student predicts the velocity."""
    noise_teacher = shutil.copytree(folder / "teacher", tmp_path / "noise")
    table = json.loads((noise_teacher / "config.json").read_text()) | {"prediction": "epsilon"}
    (noise_teacher / "config.json").write_text(json.dumps(table))
    run = config(f"consistency.teacher={noise_teacher}", "consistency.guidance=1.0", "steps=2")
    trainer = Trainer(run)
    plain = Trainer(config("consistency.guidance=1.0"))
    p, _ = arrays_of(trainer._load(0).parts[0], trainer.model)
    as_velocity, as_noise = (np.array(step_of(t)._cos_velocity(p)) for t in (plain, trainer))
    a, x = np.array(p.angle)[:, None, None], np.array(p.x)
    # The same network output F: cos(a) F as a velocity, F - sin(a) x as noise.
    there = a[:, 0, 0] < 1.5
    wanted = as_velocity / np.cos(a) - np.sin(a) * x
    np.testing.assert_allclose(as_noise[there], wanted[there], atol=1e-4)
    assert load(trainer.run()).transfusion.config.prediction == "velocity"


def test_verbs_and_tables_belong_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["train", str(folder / "distill.toml")]) == 2
    assert "use the verb distill" in capsys.readouterr().err
    assert _run(["distill", str(folder / "train.toml")]) == 2
    assert "no [consistency] table" in capsys.readouterr().err


def test_a_consistency_model_is_no_teacher(config: MakeConfig) -> None:
    student = train(config("steps=1"))
    with pytest.raises(UserError, match="is a consistency model itself"):
        Trainer(config(f"consistency.teacher={student}", output="second"))
