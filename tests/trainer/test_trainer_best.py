"""The best model by validation, and stopping when no better one comes."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_training import Crash, MakeConfig, assert_same, crash_after, metrics, state

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import load
from mlx_transfusion.training import checkpoint as ckpt
from mlx_transfusion.training.best import Best, write_best
from mlx_transfusion.training.trainer import Trainer, train

VALID = 'data.valid=[{rows="pairs.jsonl", images="pictures"}]'
LOSS = "valid_image_loss"


def test_the_lowest_value_is_kept_and_patience_counts_from_it() -> None:
    best = Best("loss", patience=2)
    steps = []
    for step, value in enumerate([3.0, 2.0, 2.0, 1.0, 5.0, 1.0]):
        assert not best.stop
        best = best.observe(step, {"loss": value, "other": 0.0})
        steps.append(best.step)
    assert steps == [0, 1, 1, 3, 3, 3]
    assert (best.value, best.since, best.stop) == (1.0, 2, True)
    assert Best("loss", 2).restore(json.loads(json.dumps(best.record()))) == best
    assert not Best("", 0).observe(1, {"loss": 1.0}).stop
    with pytest.raises(UserError, match='best_by is "lost", expected one of loss, other'):
        Best("lost").observe(1, {"loss": 1.0, "other": 2.0})


def test_a_failed_save_leaves_the_best_before(tmp_path: Path) -> None:
    write_best(tmp_path, Best("loss"), lambda to: (to / "model").write_text("one"))

    def fails(to: Path) -> None:
        (to / "model").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot save the best model: No space left"):
        write_best(tmp_path, Best("loss"), fails)
    assert (tmp_path / "best" / "model").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_the_best_model_is_the_average_of_the_best_validation(config: MakeConfig) -> None:
    """Learning at an absurd rate makes the loss rise again: best and last are two models."""
    run = config(
        VALID, "valid_every=1", f"best_by={LOSS}", "patience=2", "steps=30", "save_every=1", "keep=30",
        "optimizer.learning_rate=0.3", "optimizer.warmup=3", "ema=0.1",
    )  # fmt: skip
    last = train(run)
    output = Path(run.output)
    values = {row["step"]: row[LOSS] for row in metrics(output) if LOSS in row}
    lowest = min(values, key=lambda step: values[step])
    assert int(last.name.split("-")[1]) == max(values) == lowest + 2 < 30
    record = json.loads((output / "best" / "best.json").read_text())
    assert record == {"metric": LOSS, "step": lowest, "value": values[lowest], "since": 0}
    there = load(ckpt.checkpoints(output / "checkpoints")[lowest - 1]).model
    kept = dict(tree_flatten(load(output / "best").model.parameters()))
    for name, value in tree_flatten(there.parameters()):
        assert mx.array_equal(kept[name], value), name
    assert train(run) == last  # a run that stopped early has ended


def test_a_resumed_run_has_the_same_best(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (VALID, "valid_every=1", f"best_by={LOSS}", "save_every=2")
    whole = config(*common, output="whole")
    train(whole)
    broken = config(*common, output="broken")
    with monkeypatch.context() as patch:
        crash_after(patch, 3)
        with pytest.raises(Crash):
            Trainer(broken).run()
    train(broken)
    files = [tmp_path / name / "best" for name in ("whole", "broken")]
    assert_same(state(files[0]), state(files[1]))
    records = [json.loads((f / "best.json").read_text()) for f in files]
    assert records[0] == records[1]
    assert np.isfinite(records[0]["value"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("patience=3",), "patience needs best_by"),
        ((f"best_by={LOSS}",), "best_by needs valid_every"),
        (("patience=-1",), "patience is -1, expected 0 or more"),
    ],
)
def test_bad_settings(config: MakeConfig, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(*overrides)
