"""Training a model of discrete pictures: its loss against formulas, whole runs, resuming, and bad input."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from discrete_tools import ColourQuantizer, write_codes
from mlx.utils import tree_flatten
from PIL import Image
from tiny_training import Crash, assert_same, crash_after, metrics, state, top, write_run

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.flops import Work, forward_flops, picture_flops
from mlx_transfusion.model_io import load
from mlx_transfusion.models.discrete import Discrete
from mlx_transfusion.models.discrete_config import DiscreteConfig
from mlx_transfusion.sequence import IMAGE
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import load_train_config
from mlx_transfusion.training.discrete_data import targets_of
from mlx_transfusion.training.shape import mean_step_flops, run_data, run_shape
from mlx_transfusion.training.trainer import Trainer, train

TABLES = """
[model]
model_type = "discrete"
codebook_size = 8
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 48
image_height = 2
image_width = 2
max_position = 64

[data]
latents = ["codes.safetensors"]

[[data.train]]
rows = "pairs.jsonl"
images = "pictures"
weight = 2

[[data.train]]
rows = "texts.jsonl"

[optimizer]
learning_rate = 3e-3
warmup = 2
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """Captioned pictures, their codes, texts, and a training TOML."""
    folder = tmp_path_factory.mktemp("discrete")
    write_run(folder, tiny_tokenizer).write_text(top() + TABLES)
    files = sorted((folder / "pictures").iterdir())
    pixels = np.stack([np.array(Image.open(file)) for file in files]).astype(np.float32) / 255
    codes = np.array(ColourQuantizer().encode_codes(mx.array(pixels)))
    write_codes(folder / "codes.safetensors", codes[:, None], [file.name for file in files])
    return folder


def config(place: Path, output: Path, *overrides: str) -> Any:
    return load_train_config(place / "train.toml", [f"output={output}", *overrides])


def test_targets_are_what_follows(place: Path, tmp_path: Path) -> None:
    """Text as of a diffusion model, and every code behind the token before it."""
    trainer = Trainer(config(place, tmp_path))
    documents = trainer.train_data.documents(0, 6)
    batch = trainer.train_data.batch(documents)
    c = trainer.model.config
    t = targets_of(batch, c)
    flat = t.ids.reshape(-1)
    is_code = (batch.packed.modality == IMAGE).reshape(-1)
    np.testing.assert_array_equal(flat >= c.first_code, is_code)
    np.testing.assert_array_equal(flat[t.code_index + 1], t.code_target)
    assert sorted(t.code_index + 1) == np.flatnonzero(is_code).tolist()
    first = t.code_index.reshape(-1, c.patches_per_image)[:, 0]
    assert (flat[first] == c.boi_token_id).all()
    real = t.text_weight > 0
    np.testing.assert_array_equal(flat[t.text_index[real] + 1], t.text_target[real])
    assert not (is_code[t.text_index[real]] | (t.text_target[real] == c.eoi_token_id)).any()
    text, pictures = map(sum, zip(*(trainer.train_data.count(d) for d in documents), strict=True))
    assert (text, pictures * c.patches_per_image) == (real.sum(), t.code_weight.sum())
    columns = np.arange(t.mask.shape[-1])
    assert not t.mask[:, 0][:, columns[:, None] < columns].any()


def test_gradients_are_those_of_the_formula(place: Path, tmp_path: Path) -> None:
    """Mean of -log p over text and codes, and z_loss times the mean of log(Z)^2, document by document."""
    run = config(place, tmp_path, "z_loss=0.1", "compile=false")
    trainer = Trainer(run)
    loaded = trainer._load(0)
    gradients, sums, _ = trainer._gradients(loaded, type("Never", (), {"requested": False})(), 0)
    model, c = trainer.model, trainer.model.config
    batch = loaded.parts[0]
    t, packed = targets_of(batch, c), batch.packed
    wanted = np.zeros(packed.ids.size, bool)
    wanted[t.code_index] = True
    wanted[t.text_index[t.text_weight > 0]] = True
    wanted = wanted.reshape(packed.ids.shape)
    documents = [
        np.flatnonzero(packed.document[row] == d)
        for row in range(len(packed.ids))
        for d in range(packed.document[row].max() + 1)
    ]
    rows = [row for row in range(len(packed.ids)) for _ in range(packed.document[row].max() + 1)]

    def objective(weights: Any) -> mx.array:
        model.update(weights)
        terms = []
        for row, places in zip(rows, documents, strict=True):
            ids = t.ids[row, places]
            logits = model.logits(model(mx.array(ids[None])))[0]
            at = np.flatnonzero(wanted[row, places])
            log_z = mx.logsumexp(logits[mx.array(at)], -1)
            right = logits[mx.array(at), mx.array(ids[at + 1])]
            terms.append(log_z - right + 0.1 * log_z.square())
        return mx.concatenate(terms).mean()

    weights = model.parameters()
    expected = dict(tree_flatten(mx.grad(objective)(weights)))
    model.update(weights)
    for name, value in tree_flatten(gradients):
        np.testing.assert_allclose(value, expected[name], atol=2e-6, rtol=2e-4, err_msg=name)
    text, codes = sums
    assert text / loaded.text_total == pytest.approx(np.log(c.vocab_size), rel=0.3)
    assert codes / loaded.image_total == pytest.approx(np.log(c.vocab_size), rel=0.3)


def test_a_run_learns_its_pictures(place: Path, tmp_path: Path) -> None:
    more = [
        "steps=60",
        "save_every=100",
        "data.caption_first=1",
        "data.caption_drop=0",
        "ema=0.5",
        "log_every=1",
    ]
    last = train(config(place, tmp_path, *more))
    losses = [row["image_loss"] for row in metrics(tmp_path)]
    assert losses[-1] < 0.3 * losses[0]
    row = metrics(tmp_path)[-1]
    assert min(row["text_loss"], row["image_loss"]) < row["loss"] < max(row["text_loss"], row["image_loss"])
    loaded = load(last)
    assert isinstance(loaded.model, Discrete)
    assert loaded.extra["objective"] == {"name": "tokens", "codes": 4}


def test_a_stopped_run_goes_on_exactly(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    valid = f"data.valid=[{{rows='{place}/pairs.jsonl', images='{place}/pictures'}}]"
    run = ["accumulate=2", "save_every=3", valid, "valid_every=2", "valid_batches=1"]
    whole = train(config(place, tmp_path / "whole", *run))
    with monkeypatch.context() as patch:
        crash_after(patch, 4)
        with pytest.raises(Crash):
            train(config(place, tmp_path / "cut", *run))
    assert_same(state(whole), state(train(config(place, tmp_path / "cut", *run))))
    validated = [row["valid_image_loss"] for row in metrics(tmp_path / "whole") if "valid_image_loss" in row]
    assert np.isfinite(validated).tolist() == [True] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.latents=[]"], "learns the codes of an autoencoder: encode the data set"),
        (["model.codebook_size=4"], r"has code 7, and \[model\] has a codebook_size of 4"),
        (["model.image_height=4"], r"of shape \[2, 2\], .* expects \[4, 2\]"),
        (["model.codebook_size='many'"], "codebook_size: expected int, found 'many'"),
        (["model.patch_size=4"], 'unknown key "patch_size"'),
        (["data.flip=0.5"], "holds no mirrored pictures"),
        (["gradient_checkpointing=true"], "gradient_checkpointing"),
        (["model.prediction=epsilon"], 'unknown key "prediction"'),
        (["consistency.method=scm"], "has no diffusion to distil"),
    ],
)
def test_what_does_not_fit(place: Path, tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(config(place, tmp_path, *changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "checkpoints").exists()


def test_training_starts_from_another_of_its_kind(place: Path, tmp_path: Path) -> None:
    first = train(config(place, tmp_path / "first", "steps=1"))
    second = Trainer(config(place, tmp_path / "second", f"init={first}"))
    expected = dict(tree_flatten(load(first).model.parameters()))
    for name, value in tree_flatten(second.model.parameters()):
        np.testing.assert_array_equal(value, expected[name])
    with pytest.raises(UserError, match=r"init .*: its hidden_size is 32, \[model\] of this run says 64"):
        Trainer(config(place, tmp_path / "third", f"init={first}", "model.hidden_size=64"))


def test_operations_of_a_step_are_those_that_pytorch_counts(place: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from discrete_torch import logits
    from torch.utils.flop_counter import FlopCounterMode

    trainer = Trainer(config(place, tmp_path))
    ids = list(range(20))
    with FlopCounterMode(display=False) as counter:
        logits(trainer.model, torch.tensor([ids]))
    # A whole row of text: PyTorch computes what the mask hides, and the head at every position.
    work = Work(len(ids), len(ids) ** 2, len(ids), 0)
    assert forward_flops(trainer.model.config, work) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def of_pixels(discrete: Any) -> Any:
    """The same run with a diffusion model of pixels."""
    table = {key: value for key, value in discrete.model.items() if key != "codebook_size"}
    table |= {"model_type": "transfusion", "patch_size": 4, "image_height": 8, "image_width": 8}
    return dataclasses.replace(discrete, model=table, data=dataclasses.replace(discrete.data, latents=()))


def test_runs_of_either_kind_see_the_same_documents(place: Path, tmp_path: Path) -> None:
    discrete = config(place, tmp_path, "seed=3", "data.caption_drop=0.3")
    tokenizer = Tokenizer.load(discrete.tokenizer)
    seen = []
    for run in (discrete, of_pixels(discrete)):
        data = run_data(run, run_shape(run, tokenizer), tokenizer)
        documents = [d for step in range(4) for d in data.documents(step, 6)]
        seen.append([(d.number, d.segments, [ref.name for ref in d.images]) for d in documents])
    assert seen[0] == seen[1]
    assert len({str(d) for d in seen[0]}) > 10


def test_operations_of_a_run_of_either_kind(place: Path, tmp_path: Path) -> None:
    """The same rows and decoder: the difference is the head over codes, the mask, and the patches' layers."""
    discrete = config(place, tmp_path)
    diffusion = of_pixels(discrete)
    tokenizer = Tokenizer.load(discrete.tokenizer)
    d, t = run_shape(discrete, tokenizer), run_shape(diffusion, tokenizer)
    assert (type(d), type(t)) == (DiscreteConfig, ModelConfig)
    data = run_data(discrete, d, tokenizer)
    counts = np.array([data.count(one) for step in range(4) for one in data.documents(step, 6)])
    text, pictures = counts.sum(0) / 4
    n = d.patches_per_image
    pairs = 4 * d.hidden_size * d.num_hidden_layers * n * (n - 1) / 2
    more = 3 * (pictures * (picture_flops(d) - picture_flops(t) - pairs) + text * 2 * d.hidden_size * 8)
    assert mean_step_flops(discrete, 4) - mean_step_flops(diffusion, 4) == pytest.approx(more, rel=1e-6)
