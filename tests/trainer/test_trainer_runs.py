"""One run, one config; what a run starts from and what it leaves behind; bad input."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from PIL import Image
from tiny_training import (
    Crash,
    MakeConfig,
    assert_same,
    crash_after,
    metrics,
    state,
    write_jsonl,
)

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import load, save_model
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.training import checkpoint as ckpt
from mlx_transfusion.training.config import load_train_config
from mlx_transfusion.training.trainer import Trainer, train

# --- one run, one config ---


CHANGES = [
    ("optimizer.learning_rate=0.5", "optimizer.learning_rate = 0.003, the config says 0.5"),
    ("data.caption_drop=0.5", "data.caption_drop = 0.1, the config says 0.5"),
    ("model.intermediate_size=64", "model.intermediate_size = 48, the config says 64"),
    ("model.qk_norm=true", "model.qk_norm = None, the config says True"),
    ("steps=12", "steps = 2, the config says 12"),
    ("seed=1", "seed = 0"),
    ("batch_size=7", "batch_size = 6"),
    ("optimizer.betas=[0.9, 0.99]", "optimizer.betas.1 = 0.95"),
]


@pytest.mark.parametrize(("override", "message"), CHANGES)
def test_another_config_is_refused_naming_the_key(
    toml: Path, two_steps: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=f"was trained with {message}") as error:
        train(load_train_config(toml, ["steps=2", f"output={two_steps}", override]))
    assert "\n" not in str(error.value)


def test_what_may_change_on_resume(toml: Path, two_steps: Path, tmp_path: Path) -> None:
    """Files that have moved, and how the run is watched."""
    moved = tmp_path / "moved"
    shutil.copytree(toml.parent, moved)
    shutil.copytree(two_steps, tmp_path / "out")
    overrides = ["log_every=7", "keep=5", "save_every=3", "accumulate=2", "compile=false", "data.threads=1",
                 "data.cache_gib=0", "gradient_checkpointing=true", "sample.prompts=['x']"]  # fmt: skip
    run = load_train_config(moved / "train.toml", ["steps=2", f"output={tmp_path / 'out'}", *overrides])
    assert train(run).name == "step-00000002"


def test_without_resume_an_output_with_checkpoints_is_refused(toml: Path, two_steps: Path) -> None:
    with pytest.raises(UserError, match="holds checkpoints already"):
        train(load_train_config(toml, ["steps=2", f"output={two_steps}"]), resume=False)


def test_a_corrupt_checkpoint_is_reported(toml: Path, two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, tmp_path / "out")
    (last,) = ckpt.checkpoints(tmp_path / "out" / "checkpoints")
    os.truncate(last / "train.safetensors", 5000)
    with pytest.raises(UserError, match=r"step-00000002: cannot be resumed from"):
        train(load_train_config(toml, ["steps=2", f"output={tmp_path / 'out'}"]))


def test_an_output_that_cannot_be_written(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the training output"):
        train(config(output="file/out"))


def test_samples_that_cannot_be_written(config: MakeConfig) -> None:
    run = config("steps=2", "sample.every=1", "sample.prompts=['red']")
    output = Path(run.output)
    output.mkdir()
    (output / "samples").write_text("in the way")
    with pytest.raises(UserError, match=r"step-00000001\.png: cannot write the picture"):
        train(run)


def test_bad_rows_are_skipped_and_counted(
    config: MakeConfig, toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "red heart"}, {"text": ""}, {"image": "no.png", "text": "x"}]
    source = f"data.train=[{{rows = '{write_jsonl(tmp_path / 'rows.jsonl', rows)}'}}]"
    with pytest.raises(UserError, match=r"rows\.jsonl:2: "):
        train(config(source, "steps=1"))
    train(config(source, "steps=1", "data.skip_bad_rows=true"))
    out, err = capsys.readouterr()
    assert "rows.jsonl:3: " in err
    assert "skipped 2 bad rows in all" in err
    assert out == ""


# --- what a run starts from, and what else it leaves behind ---


def test_validation_and_sample_grids(config: MakeConfig, toml: Path) -> None:
    pairs = toml.parent / "pairs.jsonl"
    run = config(
        "steps=4", "valid_every=2", "valid_batches=2", "sample.every=2", "sample.prompts=['red heart', 'blue star']",
        f"data.valid=[{{rows = '{pairs}', images = '{toml.parent / 'pictures'}'}}]",
    )  # fmt: skip
    last = train(run)
    output = Path(run.output)
    valid = [r for r in metrics(output) if "valid_text_loss" in r]
    assert [r["step"] for r in valid] == [2, 4]
    assert all(np.isfinite(r[k]) and r[k] > 0 for r in valid for k in ("valid_text_loss", "valid_image_loss"))
    assert sorted(p.name for p in (output / "samples").iterdir()) == [
        "step-00000002.png",
        "step-00000004.png",
    ]
    with Image.open(output / "samples" / "step-00000004.png") as picture:
        picture.load()
        assert picture.width >= 2 * 8
    # Neither changes the training: the same run without them ends in the same weights.
    assert_same(state(last), state(train(config("steps=4", output="plain"))))


def test_validation_measures_the_average_weights(config: MakeConfig, toml: Path) -> None:
    run = config(f"data.valid=[{{rows = '{toml.parent / 'texts.jsonl'}'}}]", "valid_batches=1")
    trainer = Trainer(run)
    before = trainer._validate()
    assert before["valid_image_loss"] == 0
    assert trainer._validate() == before  # fixed documents
    trainer.state.ema = tree_map(lambda w: w * 0, trainer.state.ema)
    assert trainer._validate()["valid_text_loss"] == pytest.approx(np.log(288), rel=1e-5)
    weights = dict(tree_flatten(trainer.model.parameters()))
    assert all(mx.array_equal(v, weights[k]).item() for k, v in tree_flatten(trainer.state.weights))


def test_sample_grids_show_the_average_weights(config: MakeConfig) -> None:
    trainer = Trainer(config("sample.prompts=['red heart']", "sample.every=1"))
    trainer.state.weights = tree_map(lambda w: w + 0.1, trainer.state.weights)

    def sheet() -> np.ndarray:
        trainer._sample_grid()
        with Image.open(trainer.output / "samples" / "step-00000000.png") as picture:
            return np.asarray(picture)

    fresh = sheet()
    trainer.state.ema = tree_map(
        lambda w: w + 0.2 * mx.random.normal(w.shape, key=mx.random.key(w.size)), trainer.state.ema
    )
    averaged = sheet()
    assert (averaged != fresh).any()
    trainer.state.weights = trainer.state.ema
    np.testing.assert_array_equal(sheet(), averaged)


def test_start_from_a_model_folder(
    config: MakeConfig, two_steps: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    (first,) = ckpt.checkpoints(two_steps / "checkpoints")
    trainer = Trainer(config(f"init={first}"))
    wanted = dict(tree_flatten(load(first).model.parameters()))
    for name, value in tree_flatten(trainer.state.weights):
        assert mx.array_equal(value, wanted[name]).item(), name
    run = config(f"init={first}", "steps=1", "optimizer.learning_rate=0.0")
    weights = {k: v for k, v in state(train(run)).items() if k.startswith("train")}
    for name, value in weights.items():
        np.testing.assert_array_equal(value, wanted[name.removeprefix("train.safetensors:")])
    with pytest.raises(
        UserError, match=r"init .*tiny: its intermediate_size is 64, \[model\] of this run says 48"
    ):
        Trainer(config(f"init={tiny_model_dir}", output="other"))
    with pytest.raises(UserError):
        Trainer(config(f"init={tmp_path}", output="other"))


def test_resuming_needs_no_start(config: MakeConfig, two_steps: Path, tmp_path: Path) -> None:
    """The model that a run started from may be gone when the run goes on."""
    (first,) = ckpt.checkpoints(two_steps / "checkpoints")
    start = shutil.copytree(first, tmp_path / "start")
    run = config(f"init={start}", "steps=3")
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 2)
        with pytest.raises(Crash):
            train(run)
    shutil.rmtree(start)
    assert train(run).name == "step-00000003"


def test_half_precision_weights_are_trained_in_float32(
    config: MakeConfig, two_steps: Path, tmp_path: Path
) -> None:
    (first,) = ckpt.checkpoints(two_steps / "checkpoints")
    loaded = load(first)
    half = save_model(tmp_path / "half", loaded.model, loaded.tokenizer, dtype=mx.float16)
    trainer = Trainer(config(f"init={half}"))
    assert {v.dtype for _, v in tree_flatten(trainer.state.weights)} == {mx.float32}


def test_the_same_seed_gives_the_same_run_and_another_does_not(config: MakeConfig) -> None:
    a, b, c = (
        state(train(config("steps=2", f"seed={seed}", output=name)))
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert_same(a, b)
    name = "train.safetensors:layers.0.mlp.up_proj.weight"
    assert np.abs(a[name] - c[name]).max() > 1e-3


def test_the_checkpoint_paints(config: MakeConfig) -> None:
    last = train(config("steps=1"))
    model = load(last).model
    assert isinstance(model, Transfusion)
    _, cache = model.prefill(np.array([[1, 4]]), np.array([2]))
    shape = (1, model.config.patches_per_image, model.config.patch_dim)
    assert mx.isfinite(model.velocity(mx.zeros(shape), mx.array([1.0]), cache)).all().item()
