"""A language model that also paints: its text stays what it was, and its pictures are those of the definition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from llama_painter_tools import OPTIONS, joint_velocity, roughen, write_llama, write_run
from llama_tools import write_tokenizer
from mlx.utils import tree_flatten

from mlx_transfusion.chat import chat_ids
from mlx_transfusion.errors import UserError
from mlx_transfusion.events import Finished, Painted, Token
from mlx_transfusion.interleave import Tokens, complete
from mlx_transfusion.model_io import Loaded, flat_parameters, load
from mlx_transfusion.models.llama import Llama
from mlx_transfusion.models.llama_painter import LlamaPainter
from mlx_transfusion.painting import prefill
from mlx_transfusion.picture_side import PAINTER_FILE, PictureOptions, extend
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.training.config import TrainConfig, load_train_config
from mlx_transfusion.training.prompt_memory import PromptMemory
from mlx_transfusion.training.trainer import Trainer, train

KINDS: dict[str, dict[str, int]] = {"experts": {"every": 2}, "factors": {"rank": 3}}
PROMPT = "Draw red."
GREEDY = GenerationSettings(temperature=0.0, max_tokens=12, max_images=0)


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `llama`, `paints`, data and train.toml, for each kind of picture side."""
    return write_run(tmp_path_factory.mktemp(request.param), **KINDS[request.param]).parent


@pytest.fixture
def model(run: Path) -> LlamaPainter:
    found = load(run / "paints").model
    assert isinstance(found, LlamaPainter)
    return roughen(found)


def prefix(loaded: Loaded, prompt: str = PROMPT) -> list[int]:
    return loaded.pictures.image_prefix(loaded.tokenizer.encode(prompt))


def noisy(model: LlamaPainter, count: int, seed: int = 0) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, *model.latent_shape)).astype(np.float32)
    return mx.array(x), mx.array(rng.uniform(0.1, 1.5, count).astype(np.float32))


def written(loaded: Loaded, prompt: str, settings: GenerationSettings = GREEDY) -> list[Any]:
    ids = chat_ids(loaded.path, loaded.tokenizer, prompt)
    return list(complete(loaded, [Tokens(tuple(ids))], 0, settings))


# ---- text ----


def test_text_is_the_language_models_bit_for_bit_after_training(run: Path, tmp_path: Path) -> None:
    config = load_train_config(run / "train.toml", [f"output={tmp_path / 'out'}"])
    before, after = load(run / "llama"), load(train(config))
    start = flat_parameters(load(run / "paints").model)
    moved = {n for n, v in flat_parameters(after.model).items() if not mx.array_equal(v, start[n])}
    assert moved
    assert all(name.startswith("painter.") for name in moved)
    assert {"painter.wish.weight", "painter.patch_decoder.proj.weight"} < moved
    assert isinstance(before.model, Llama)
    assert isinstance(after.model, LlamaPainter)
    ids = np.array([chat_ids(before.path, before.tokenizer, PROMPT)], np.int32)
    assert mx.array_equal(before.model(mx.array(ids)), after.model(mx.array(ids)))
    ours, theirs = (
        np.array(m.prefill(ids, np.array([ids.shape[1]]))[0]) for m in (after.model, before.model)
    )
    others = np.arange(ours.shape[1]) != after.model.config.boi_token_id
    np.testing.assert_array_equal(ours[:, others], theirs[:, others])
    assert written(before, PROMPT) == written(after, PROMPT)


def test_the_text_files_are_those_of_the_language_model(run: Path) -> None:
    text = (run / "llama" / "model.safetensors").read_bytes()
    assert (run / "paints" / "model.safetensors").read_bytes() == text
    side = mx.load(str(run / "paints" / PAINTER_FILE))
    assert isinstance(side, dict)
    assert all(name.startswith("painter.") for name in side)


# ---- pictures ----


def test_a_picture_behind_a_cache_is_that_of_the_whole_sequence(run: Path, model: LlamaPainter) -> None:
    loaded = load(run / "paints")
    prefixes = [prefix(loaded, text) for text in (PROMPT, "Paint a green house!")]
    x, angle = noisy(model, 2)
    cached = np.array(model.velocity(x, angle, prefill(model, prefixes)))
    for row, ids in enumerate(prefixes):
        whole = joint_velocity(model, ids, x[row : row + 1], angle[row : row + 1])
        np.testing.assert_allclose(cached[row], np.array(whole)[0], atol=2e-5)
    width = max(map(len, prefixes))
    padded = mx.array([ids + [0] * (width - len(ids)) for ids in prefixes])
    hidden, read = model.read_prefix(padded)
    assert hidden.shape == (2, width, model.config.hidden_size)
    painted = model.paint(x, angle, read, mx.array([len(ids) for ids in prefixes]))
    np.testing.assert_allclose(np.array(painted), cached, atol=2e-5)


def test_every_word_matters_to_the_picture(run: Path, model: LlamaPainter) -> None:
    loaded = load(run / "paints")
    x, angle = noisy(model, 1)
    made = [
        np.array(model.velocity(x, angle, prefill(model, [prefix(loaded, t)]))) for t in (PROMPT, "Draw rad.")
    ]
    assert np.abs(made[0] - made[1]).max() > 1e-3


def test_derivative_equals_central_differences(run: Path, model: LlamaPainter) -> None:
    ids = mx.array([prefix(load(run / "paints"))])
    read, lengths = model.read_prefix(ids)[1], mx.array([ids.shape[1]])
    x, angle = noisy(model, 1, 3)
    dx, da = noisy(model, 1, 4)

    def f(x: mx.array, angle: mx.array) -> mx.array:
        return model.paint(x, angle, read, lengths)

    (value,), (tangent,) = mx.jvp(f, [x, angle], [dx, da])
    np.testing.assert_allclose(np.array(value), np.array(f(x, angle)), atol=1e-6)
    h = 1e-2
    numeric = (f(x + h * dx, angle + h * da) - f(x - h * dx, angle - h * da)) / (2 * h)
    np.testing.assert_allclose(np.array(tangent), np.array(numeric), atol=2e-2 * float(mx.abs(tangent).max()))
    cosine = np.array(model.cos_velocity(x, angle, read, lengths))
    np.testing.assert_allclose(cosine, np.cos(float(angle[0])) * np.array(value), atol=1e-6)


def test_pixels_come_back(model: LlamaPainter) -> None:
    pixels = mx.random.uniform(shape=(2, 8, 8, 3))
    np.testing.assert_allclose(np.array(model.decode(model.encode(pixels))), np.array(pixels), atol=1e-6)


# ---- chat ----


def test_it_paints_when_it_wants_to_and_then_stops(run: Path, model: LlamaPainter) -> None:
    loaded = load(run / "paints")
    loaded.model.update(model.parameters())
    settings = GenerationSettings(temperature=0.0, max_tokens=5, steps=2, guidance=2.0)
    for odds, paints in ((50.0, True), (-50.0, False)):
        model.painter.wish.bias = mx.array([odds])
        loaded.model.update(model.parameters())
        events = written(loaded, PROMPT, settings)
        assert [type(e) for e in events if not isinstance(e, Token)] == [Painted] * paints + [Finished]
        assert bool(events[0].text if isinstance(events[0], Token) else "") != paints
    model.painter.wish.bias = mx.array([50.0])
    loaded.model.update(model.parameters())
    plain = list(complete(loaded, "no chat, no picture", 0, settings))
    assert not any(isinstance(event, Painted) for event in plain)


def test_it_learns_when_to_paint(run: Path, tmp_path: Path) -> None:
    faster = ["steps=25", "ema=0.9", "data.caption_drop=0.0", "optimizer.learning_rate=0.1"]
    config = load_train_config(run / "train.toml", [f"output={tmp_path / 'out'}", *faster])
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["text_loss"] < 0.5 * rows[0]["text_loss"]
    assert rows[-1]["image_loss"] < rows[0]["image_loss"]


# ---- training ----


def test_resume_is_exact(run: Path, tmp_path: Path) -> None:
    def config(output: str, *more: str) -> TrainConfig:
        return load_train_config(run / "train.toml", [f"output={tmp_path / output}", *more])

    train(config("whole", "keep=9"))
    halfway = tmp_path / "parts" / "checkpoints"
    halfway.mkdir(parents=True)
    (tmp_path / "whole" / "checkpoints" / "step-00000003").rename(halfway / "step-00000003")
    trainer = Trainer(config("parts", "keep=9"))
    assert trainer.resume()
    assert trainer.state.step == 3
    trainer.run()
    for file in (PAINTER_FILE, "train.safetensors", "optimizer.safetensors"):
        parts = [
            mx.load(str(tmp_path / p / "checkpoints" / "step-00000006" / file)) for p in ("whole", "parts")
        ]
        assert isinstance(parts[0], dict)
        assert isinstance(parts[1], dict)
        assert parts[0].keys() == parts[1].keys()
        assert all(mx.array_equal(parts[0][name], parts[1][name]) for name in parts[0])


def test_parts_of_a_batch_add_up(run: Path, tmp_path: Path) -> None:
    config = load_train_config(run / "train.toml", [f"output={tmp_path / 'out'}"])
    trainer = Trainer(config)
    documents = trainer.train_data.documents(0, 6)
    weights = trainer.state.weights

    def gradients(groups: list[list[Any]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        total: dict[str, np.ndarray] = {}
        sums = np.zeros(2)
        for group in groups:
            made, more = trainer.step.gradients(
                weights, trainer.step.load(trainer.train_data, group), 5, 4, 0
            )
            sums += np.array(more)
            for name, value in flat(made).items():
                total[name] = total.get(name, 0) + value
        return total, sums

    whole, sums = gradients([documents])
    parts, part_sums = gradients([documents[:1], documents[1:4], documents[4:]])  # the last without a picture
    np.testing.assert_allclose(part_sums, sums, rtol=1e-5)
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, atol=1e-5 + 1e-4 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_a_prompt_is_read_alike_in_any_batch(run: Path, model: LlamaPainter, limit: int) -> None:
    loaded = load(run / "paints")
    prefixes = [prefix(loaded, text) for text in (PROMPT, "Paint a green house!", "No")]
    lengths = np.array([len(ids) for ids in prefixes] + [1])
    ids = np.zeros((4, int(lengths.max())), np.int32)
    for row, tokens in zip(ids, prefixes, strict=False):
        row[: len(tokens)] = tokens
    memory = PromptMemory(model, limit)
    whole, hidden = memory.read(ids, lengths, 1)
    assert len(memory) == (3 if limit else 0)
    again, alone = memory.read(ids[1:2, : lengths[1]], lengths[1:2], 1)
    for (k, v), (k1, v1) in zip(whole, again, strict=True):
        assert mx.array_equal(k[1:2, :, : lengths[1]], k1)
        assert mx.array_equal(v[1:2, :, : lengths[1]], v1)
    assert mx.array_equal(hidden[1:2], alone)
    assert not hidden[3].any()
    states, read = model.read_prefix(mx.array(ids[:3]))
    np.testing.assert_allclose(np.array(states[2, lengths[2] - 2]), np.array(hidden[2]), atol=1e-5)
    at = model.config.painter_layers[0]
    np.testing.assert_allclose(np.array(read[at][0])[0, :, : lengths[0]], np.array(whole[0][0])[0, :, : lengths[0]],
                               atol=1e-5)  # fmt: skip


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in dict(tree_flatten(tree)).items()}


# ---- the command line ----


def test_extend_train_generate_and_chat(run: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    out = cli("extend", run / "llama", "--output", tmp_path / "new", "--image-size", 8, "--patch-size", 4).out
    assert out.strip() == str(tmp_path / "new")
    again = cli("extend", run / "llama", "--output", tmp_path / "new")
    assert again.code == 2
    assert "exists already" in again.err
    made = cli("train", run / "train.toml", "--set", f"output={tmp_path / 'out'}", "--set", "steps=2").out
    model = made.strip().splitlines()[-1]
    picture = tmp_path / "red.png"
    assert cli("generate", PROMPT, "--model", model, "--steps", 2, "--seed", 1, "--output", picture).code == 0
    assert picture.is_file()
    said = [
        cli(
            "complete",
            PROMPT,
            "--chat",
            "--model",
            m,
            "--temperature",
            0,
            "--max-tokens",
            8,
            "--max-images",
            0,
        )
        for m in (model, run / "llama")
    ]
    assert said[0].out == said[1].out
    assert said[0].code == said[1].code == 0
    assert "llama_painter" in cli("info", model).out


# ---- bad input ----


def test_what_cannot_be_extended(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='one of type "llama"'):
        extend(run / "paints", tmp_path / "twice", PictureOptions(**OPTIONS))
    bare = write_llama(tmp_path / "bare")
    write_tokenizer(bare)  # the vocabulary without tokens to spare
    with pytest.raises(UserError, match="pictures need two"):
        extend(bare, tmp_path / "new", PictureOptions(**OPTIONS))
    with pytest.raises(UserError, match="patch"):
        extend(run / "llama", tmp_path / "new", PictureOptions(image_size=10, patch_size=4))
    assert not (tmp_path / "new").exists()


def test_bad_runs(run: Path, tmp_path: Path) -> None:
    def start(*more: str) -> None:
        train(load_train_config(run / "train.toml", [f"output={tmp_path / 'out'}", *more]))

    with pytest.raises(UserError, match="caption_first = 1"):
        start("data.caption_first=0.0")
    with pytest.raises(UserError, match="float32"):
        start("dtype=bfloat16")
    with pytest.raises(UserError, match="leave the table out"):
        start("model.hidden_size=32")
    with pytest.raises(UserError, match="sequence_length 16"):
        start("sequence_length=16")


def test_it_cannot_read_pictures(run: Path, model: LlamaPainter) -> None:
    with pytest.raises(UserError, match="cannot read pictures"):
        model.read_picture(mx.zeros((1, 8, 8, 3)), model.new_cache(1))
