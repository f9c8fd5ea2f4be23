"""Training on shards: the draws, the counts, pixels and latents, and the same run by MLX and by PyTorch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_tools import SOURCES, build_both, write_inputs
from test_latent_training import coder

from mlx_transfusion import sequence
from mlx_transfusion.autoencoder.folder import load_autoencoder, save_autoencoder
from mlx_transfusion.autoencoder.latents import encode_pixels
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import load_config
from mlx_transfusion.shards.build import build, in_processes
from mlx_transfusion.shards.recipe import make_recipe
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import TrainConfig, load_train_config
from mlx_transfusion.training.data import Batch
from mlx_transfusion.training.shard_set import ShardSet, open_data
from mlx_transfusion.training.trainer import Trainer, train

PATCHES, T = 4, 32


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    path = write_inputs(tmp_path_factory.mktemp("set"), tiny_tokenizer)
    build_both(path)
    return path


def open_set(toml: Path, *changes: str, split: str = "train") -> ShardSet:
    config = load_train_config(toml, list(changes))
    recipe = make_recipe(config)
    data = open_data(
        getattr(config.data, split), config.data, config.diffusion, recipe.model, Tokenizer.load(config.tokenizer),
        seed=config.seed, sequence_length=config.sequence_length,
    )  # fmt: skip
    assert isinstance(data, ShardSet)
    return data


def pairs_alone(toml: Path) -> Path:
    """The same run on the folder of pairs alone."""
    path = toml.with_name("pairs-alone.toml")
    path.write_text(toml.read_text().replace(SOURCES, '[[data.train]]\nshards = "pairs"\n'))
    return path


def documents(batch: Batch) -> list[tuple[list[int], list[int], float | None]]:
    """Token ids before and behind the picture of each document, and the picture's angle (None: text alone)."""
    out: list[tuple[list[int], list[int], float | None]] = []
    p = batch.packed
    for row in range(len(p.ids)):
        for d in range(p.document[row].max() + 1):
            at = np.flatnonzero(p.document[row] == d)
            ids, images = p.ids[row, at], p.image[row, at]
            shown = np.flatnonzero(images >= 0)
            if not len(shown):
                out.append((ids.tolist(), [], None))
                continue
            assert len(shown) == PATCHES
            angle = float(batch.angle[images[shown[0]]])
            out.append((ids[: shown[0]].tolist(), ids[shown[-1] + 1 :].tolist(), angle))
    return out


def test_draws_change_orders_but_no_length(toml: Path, tiny_tokenizer: Tokenizer) -> None:
    s, limit = tiny_tokenizer.special, np.pi / 4
    data = open_set(pairs_alone(toml), "data.caption_first=0.6", "data.caption_drop=0.3")
    kinds = {"caption first": 0, "picture first": 0, "dropped": 0}
    for step in range(25):
        drawn = data.documents(step, 6)
        batch = data.batch(drawn)
        assert (batch.packed.modality != sequence.PAD).all()
        counts = [data.count(d) for d in drawn]
        assert batch.text_targets == sum(c for c, _ in counts)
        assert (batch.angle > 0).sum() == sum(c for _, c in counts)
        for before, behind, angle in documents(batch):
            if angle is None:
                continue
            assert before[0] == s.bos
            assert before[-1] == s.boi
            assert behind[0] == s.eoi
            assert behind[-1] == s.eos
            kind = "picture first" if len(behind) > 2 else "dropped" if len(before) == 2 else "caption first"
            kinds[kind] += 1
            if kind == "picture first":
                assert len(before) == 2
                assert angle <= limit
    total = sum(kinds.values())
    assert kinds["picture first"] / total == pytest.approx(0.4, abs=0.1)
    assert kinds["dropped"] / total == pytest.approx(0.6 * 0.3, abs=0.08)


def test_a_dropped_caption_is_text_that_the_picture_does_not_see(
    toml: Path, tiny_tokenizer: Tokenizer
) -> None:
    always = open_set(pairs_alone(toml), "data.caption_first=1.0", "data.caption_drop=1.0")
    never = open_set(pairs_alone(toml), "data.caption_first=1.0", "data.caption_drop=0.0")
    drawn = always.documents(3, 4)
    assert drawn == never.documents(3, 4)
    with_captions = [d for d in documents(never.batch(drawn)) if d[2] is not None]
    found = documents(always.batch(drawn))
    places = [i for i, d in enumerate(found) if d[2] is not None]
    assert len(places) == len(with_captions)
    for i, (before, behind, angle) in zip(places, with_captions, strict=True):
        assert found[i] == ([before[0], before[-1]], behind, angle)
        assert found[i - 1] == (before[1:-1], [], None)


def test_a_step_is_a_function_of_its_number(toml: Path) -> None:
    a, b = open_set(toml), open_set(toml)
    a.batch(a.documents(0, 4))
    drawn = b.documents(7, 4)
    whole = a.batch(a.documents(7, 4))
    parts = [b.batch(drawn[rank::2]) for rank in (1, 0)][::-1]
    shown = [x.noise[: (x.angle > 0).sum()] for x in parts]
    order = [d for rank in range(2) for d in drawn[rank::2]]
    np.testing.assert_array_equal(np.concatenate([x.packed.ids for x in parts]), a.batch(order).packed.ids)
    np.testing.assert_array_equal(np.concatenate(shown), a.batch(order).noise[: sum(map(len, shown))])
    assert whole.text_targets == sum(x.text_targets for x in parts)
    other = a.batch(a.documents(8, 4))
    assert not np.array_equal(other.noise[:1], whole.noise[:1])


@given(st.integers(0, 40), st.integers(2, 9))
@settings(max_examples=8, deadline=None)
def test_every_epoch_has_each_sequence_once(first: int, size: int) -> None:
    data = EPOCHS[0]
    steps = range(first, first + 40)
    for s, folder in enumerate(data.folders):
        n = len(folder)
        places = [d.place for step in steps for d in data.documents(step, size) if d.source == s]
        per_step = len(places) // 40
        begin = -first * per_step % n  # to the first whole epoch
        for start in range(begin, len(places) - n + 1, n):
            assert sorted(places[start : start + n]) == list(range(n))


EPOCHS: list[ShardSet] = []


@pytest.fixture(autouse=True, scope="module")
def epochs(toml: Path) -> None:
    EPOCHS[:] = [open_set(toml)]


def test_segments_keep_their_order(toml: Path, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    row = {
        "segments": [{"text": "red"}, {"image": "red-star.png"}, {"image": "blue-moon.png"}, {"text": "big"}]
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"text": "cat"}))
    recipe = make_recipe(load_train_config(toml), images=str(toml.parent / "pictures"))
    build(recipe, tmp_path / "pairs", [tmp_path / "rows.jsonl"], in_processes(1))
    for name in ("pairs-alone.toml", "tokenizer.model"):
        shutil.copy(pairs_alone(toml).with_name(name), tmp_path)
    data = open_set(tmp_path / "pairs-alone.toml")
    batch = data.batch(data.documents(0, 1))
    s, encode = tiny_tokenizer.special, tiny_tokenizer.encode
    p = batch.packed
    (at,) = np.nonzero(p.document[0] == 0)
    expected = [
        s.bos,
        *encode("red"),
        s.boi,
        *[s.pad] * 4,
        s.eoi,
        s.boi,
        *[s.pad] * 4,
        s.eoi,
        *encode("big"),
        s.eos,
    ]
    assert p.ids[0, at].tolist() == expected
    assert (batch.angle[:2] <= np.pi / 4).all()
    for pixels, name in zip(batch.pixels, ("red-star.png", "blue-moon.png"), strict=False):
        np.testing.assert_array_equal(pixels, np.array(Image.open(toml.parent / "pictures" / name)))
    assert data.count(data.documents(0, 1)[0]) == (batch.text_targets, 2)


LATENTS = """
image_channels = 4
image_mean = [0.0, 0.0, 0.0, 0.0]

[data]
autoencoder = "vae"
flip = 0.5
"""


def test_latents(toml: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    """They are the autoencoder's, also mirrored; the model carries it; another one is refused."""
    for name in ("pairs-0.tar", "text-1.txt", "tokenizer.model"):
        shutil.copy(toml.parent / name, tmp_path)
    for seed, name in enumerate(("vae", "other")):
        save_autoencoder(tmp_path / name, coder(seed))
    latents = tmp_path / "latents.toml"
    latents.write_text(toml.read_text().replace(SOURCES, LATENTS + SOURCES) + "final_fraction = 0.5\n")
    words = ("--output", tmp_path / "pairs", "--flips", "--dtype", "float32")
    assert cli("shards", "build", latents, tmp_path / "pairs-0.tar", *words).code == 0
    assert cli("shards", "build", latents, tmp_path / "text-1.txt", "--output", tmp_path / "text").code == 0
    with pytest.raises(UserError, match="text: holds no mirrored latents"):
        open_set(latents)
    shutil.rmtree(tmp_path / "text")
    words = ("--output", tmp_path / "text", "--flips", "--dtype", "float32")
    assert cli("shards", "build", latents, tmp_path / "text-1.txt", *words).code == 0
    data = open_set(latents)
    batch = data.batch(data.documents(0, 8))
    vae = load_autoencoder(tmp_path / "vae")
    assert data.latents_of == vae.fingerprint
    originals = [
        np.array(Image.open(p).resize((16, 16))) for p in sorted((toml.parent / "pictures").iterdir())
    ]
    stacked = np.stack(originals)
    plain, mirrored = (encode_pixels(vae, p) for p in (stacked, stacked[:, :, ::-1]))
    seen = set()
    for picture, angle in zip(batch.pixels, batch.angle, strict=True):
        if angle > 0:
            distances = [np.abs(views - picture).max((1, 2, 3)).min() for views in (plain, mirrored)]
            seen.add(int(np.argmin(distances)))
    assert seen == {0, 1}
    trainer = Trainer(load_train_config(latents, [f"output={tmp_path / 'run'}"]))
    assert trainer.model.coder is not None
    with pytest.raises(UserError, match="stale: made by autoencoder"):
        Trainer(
            load_train_config(
                latents, ["data.autoencoder=" + str(tmp_path / "other"), f"output={tmp_path}/x"]
            )
        )


def test_mlx_and_torch_train_alike(toml: Path, tmp_path: Path, make_model: Callable[..., Any]) -> None:
    pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")
    from mlx_transfusion.model_io import save_model
    from mlx_transfusion.torch.parallel import processes
    from mlx_transfusion.torch.trainer import Machines
    from mlx_transfusion.torch.trainer import train as train_with_torch

    tokenizer = Tokenizer.load(toml.parent / "tokenizer.model")
    model = make_recipe(load_train_config(toml)).model
    start = save_model(tmp_path / "start", make_model(model, scale=0.1), tokenizer)

    def config(name: str) -> TrainConfig:
        valid = SOURCES.replace("train", "valid")
        both = toml.with_name("both.toml")
        both.write_text(toml.read_text().replace(SOURCES, SOURCES + valid))
        changes = [f"output={tmp_path / name}", f"init={start}", "valid_every=3", "accumulate=2", "steps=4"]
        return load_train_config(both, changes)

    train(config("mlx"))
    with processes() as world:
        train_with_torch(config("torch"), Machines(workers=1), world)
    a, b = (
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("mlx", "torch")
    )
    keys = {"text_loss", "image_loss", "valid_text_loss", "valid_image_loss"}
    assert len(a) == len(b) == 5
    for x, y in zip(a, b, strict=True):
        same = keys & x.keys()
        assert same
        assert [x[k] for k in sorted(same)] == pytest.approx([y[k] for k in sorted(same)], rel=1e-4)
    assert load_config(sorted((tmp_path / "mlx/checkpoints").iterdir())[-1]).max_position == 64


def test_what_does_not_belong_together_is_refused(toml: Path, tmp_path: Path) -> None:
    for changes, told in (
        (["sequence_length=64"], "pairs: was built with sequence_length 32, the run needs 64"),
        (["model.patch_size=2"], "was built with patch_size 4"),
    ):
        with pytest.raises(UserError, match=told):
            open_set(toml, *changes)
    for text, told in (
        (
            toml.read_text() + '[[data.train]]\nrows = "texts.jsonl"\n',
            "some sources are rows and others shards",
        ),
        (toml.read_text() + "[[data.train]]\nweight = 2\n", r"data.train\[2\]: give it rows or shards"),
        (toml.read_text() + "[consistency]\n", "give it rows"),
    ):
        other = tmp_path / "other.toml"
        other.write_text(text)
        with pytest.raises(UserError, match=told):
            load_train_config(other)
    with pytest.raises(UserError, match="no folder of shards, or one that is not finished"):
        open_set(toml, "data.train=[{shards='nowhere'}]")
