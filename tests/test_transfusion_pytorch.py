"""transfusion-pytorch against its own numbers: both goldens, random models of the package, and the interface."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_transfusion.cli import main
from mlx_transfusion.events import Token
from mlx_transfusion.interleave import complete
from mlx_transfusion.model_io import Loaded, load
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.lucidrains import Lucidrains
from mlx_transfusion.models.lucidrains_config import LucidrainsConfig
from mlx_transfusion.painting import paint, prefill
from mlx_transfusion.sampling import guided
from mlx_transfusion.settings import GenerationSettings

try:
    from mlx_transfusion.convert import sources, table
    from mlx_transfusion.convert import transfusion_pytorch as convert
except ModuleNotFoundError:  # only the tree is on the path, the package is not installed
    from convert import table
    from convert import transfusion_pytorch as convert

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 1e-4


class Golden(NamedTuple):
    """A tiny model of the package and its numbers."""

    model: Lucidrains
    io: dict[str, mx.array]
    folder: Path

    def latents(self, name: str) -> mx.array:
        """One picture with channels last, as tokens [1, N, C]; a leading axis of 2 stays a batch."""
        x = self.io[name]
        if self.model.config.modalities[0].channel_first:
            x = x.transpose(1, 2, 0) if x.ndim == 3 else x.transpose(0, 2, 3, 1)
        return x.reshape(-1 if x.ndim == 4 else 1, x.shape[-3] * x.shape[-2], x.shape[-1])

    def shape(self, name: str) -> tuple[int, int]:
        x = self.io[name].shape[-3:]
        return (x[1], x[2]) if self.model.config.modalities[0].channel_first else (x[0], x[1])


def build(config: LucidrainsConfig, weights: dict[str, mx.array]) -> Lucidrains:
    model = Lucidrains(LucidrainsConfig.from_dict(json.loads(json.dumps(config.to_dict()))))
    model.load_weights(list(table.forward(convert.entries(config), weights).items()))
    model.eval()
    return model


@pytest.fixture(scope="module", params=["transfusion-pytorch", "transfusion-pytorch-options"])
def golden(request: pytest.FixtureRequest) -> Golden:
    folder = FIXTURES / request.param
    config = convert.read_config(json.loads((folder / "config.json").read_text()), "config.json")
    model = build(config, mx.load(str(folder / "model.safetensors")))
    return Golden(model, mx.load(str(folder / "io.safetensors")), folder)


def assert_close(ours: mx.array, theirs: mx.array, scale: float = 1.0) -> None:
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=0, atol=TOLERANCE * scale)


Item = np.ndarray | tuple[mx.array, float, tuple[int, ...], int]
"""Token ids, or a noisy picture [1, N, C] with its time, shape and kind."""


def read(model: Lucidrains, items: list[Item]) -> tuple[mx.array, list[mx.array], KVCache]:
    """A document read piece by piece behind the cache: text logits [T, V] of all text, flows of all pictures."""
    cache, logits, flows = model.new_cache(1), [], []
    for item in items:
        if isinstance(item, np.ndarray):
            if item.size:
                hidden = model.read_text(item[None], np.ones((1, item.size), bool), cache)
                logits.append(model.lm_head(hidden[0]))
        else:
            x, time, shape, kind = item
            flows.append(model.flow(x, mx.array([time]), cache, kind, shape, store=True))
    return mx.concatenate(logits), flows, cache


def document(golden: Golden, sample: int) -> list[Item]:
    """Sample 0 or 1 of the golden's mixed batch, as the package lays it out."""
    io, c = golden.io, golden.model.config
    items: list[Item] = [np.array([c.sos_id])]
    names = ["text.0", "image.0", "text.1"], ["text.2", "image.1", "text.3", "image.2", "text.4"]
    image = 0
    for name in names[sample]:
        kind, number = name.split(".")
        if kind == "text":
            items.append(np.array(io[f"mixed.{name}"]))
            continue
        shape, time = golden.shape(f"mixed.{name}"), float(io["mixed.times"][sample, image])
        x, z = golden.latents(f"mixed.{name}"), golden.latents(f"mixed.noise.{number}")
        items.append(np.array(c.opening(0, shape)))
        items.append((time * x + (1 - time) * z, time, shape, 0))
        items.append(np.array([c.eom_id(0)]))
        image += 1
    return [*items, np.array([c.sos_id + 1])]


# ---- the goldens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [0, 1])
def test_mixed_document(golden: Golden, sample: int) -> None:
    """Text, pictures at their times, and text behind them, through the cache, equal one pass over the whole batch."""
    io, items = golden.io, document(golden, sample)
    logits, flows, _ = read(golden.model, items)
    is_text = np.array(io["mixed.is_modality"])[sample] == 0
    count = sum(item.size if isinstance(item, np.ndarray) else item[0].shape[1] for item in items)
    seen = min(
        count, len(is_text)
    )  # the last column of the padded batch is cut, with the longest sample's end
    expected = np.array(io["mixed.text_logits"])[sample][:seen][is_text[:seen]]
    assert_close(logits[: len(expected)], mx.array(expected))
    for flow, index in zip(flows, [0] if sample == 0 else [1, 2], strict=True):
        assert_close(flow, golden.latents(f"mixed.pred_flow.{index}"))


def test_positions_and_ids(golden: Golden) -> None:
    io, items = golden.io, document(golden, 1)
    _, _, cache = read(golden.model, items[:-1])
    width = io["mixed.input_ids"].shape[1]
    assert cache.positions.tolist() == [int(io["mixed.rotary_positions"][1, -1]) + 1]
    assert cache.valid.shape[1] == width
    ids = np.concatenate(
        [i if isinstance(i, np.ndarray) else np.zeros(i[0].shape[1], int) for i in items[:-1]]
    )
    assert ids.tolist() == np.array(io["mixed.input_ids"])[1].tolist()


def test_text(golden: Golden) -> None:
    ids = np.array(golden.io["text.input_ids"])
    hidden = golden.model.read_text(ids, np.ones(ids.shape, bool), golden.model.new_cache(2))
    assert_close(golden.model.lm_head(hidden), golden.io["text.logits"])


def test_pictures_alone(golden: Golden) -> None:
    io = golden.io
    flow = golden.model.flow_alone(
        golden.latents("image_only.noised"), io["image_only.times"], shape=golden.shape("image_only.noised")
    )
    assert_close(flow, golden.latents("image_only.pred_flow"))


@pytest.mark.parametrize("scale", [1, 3])
def test_sampling(golden: Golden, scale: int) -> None:
    """The package's midpoint rule over our flow and our guide, of a picture of another shape than the default."""
    io, model = golden.io, golden.model
    shape, name = tuple(io["sample.shape"].tolist()), f"sample.cfg{scale}"
    prefix = np.array(io["sample.prefix_ids"]).tolist()
    c = model.config
    assert prefix == [c.sos_id, *io["sample.prompt"].tolist(), *c.opening(0, shape)]
    cache = prefill(model, [prefix])
    guide = model.guide([prefix])

    def flow(x: mx.array, t: float) -> mx.array:
        conditional = model.flow(x, mx.array([t]), cache, shape=shape)
        if scale == 1:
            return conditional
        return guided(conditional, model.flow(x, mx.array([t]), guide, shape=shape), scale)

    x, times = io["sample.init_noise"][None], io["sample.times"].tolist()
    assert_close(flow(x, times[0]), golden.latents(f"{name}.flow_t0"))
    assert_close(flow(x, times[2]), golden.latents(f"{name}.flow_t2"))
    trajectory = [x]
    for start, end in pairwise(times):
        half = x + (end - start) / 2 * flow(x, start)
        x = x + (end - start) * flow(half, (start + end) / 2)
        trajectory.append(x)
    for ours, theirs in zip(trajectory, golden.latents(f"{name}.trajectory"), strict=True):
        assert_close(ours[0], theirs, 5)
    assert_close(x, golden.latents(f"{name}.image"), 5)


# ---- converting ---------------------------------------------------------------------------------------------


def converted(source: Path, output: Path, *arguments: object) -> Loaded:
    run_command("convert", source, "--output", output, *arguments)
    return load(output)


def run_command(*arguments: object) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert exit_.value.code == 0


def test_convert_and_back_gives_equal_bits(golden: Golden) -> None:
    plan = convert.plan(sources.Source(golden.folder))
    tensors = mx.load(str(golden.folder / "model.safetensors"))
    ours = table.forward(plan.entries, tensors)
    back = table.restore(plan.entries, ours)
    assert back.keys() == tensors.keys()  # every tensor is used
    for name, value in tensors.items():
        assert np.array(back[name]).tobytes() == np.array(value).tobytes(), name


def test_convert_load_and_paint(golden: Golden, tmp_path: Path) -> None:
    """Without a tokenizer a prompt is ids; the converted model's latents are those of the plain functions."""
    loaded = converted(golden.folder, tmp_path / "out")
    prompt = golden.io["sample.prompt"].tolist()
    ids = loaded.tokenizer.encode(" ".join(map(str, prompt)))
    assert ids == prompt
    config = loaded.config
    assert isinstance(config, LucidrainsConfig)
    assert loaded.tokenizer.vocab_size == config.vocab_size
    settings = GenerationSettings(sampler="midpoint", spacing="flow", steps=3, guidance=3.0)
    prefix = loaded.pictures.image_prefix(ids)
    x = paint(loaded.pictures, [prefix, prefix[:3] + prefix[4:]], [5, 6], settings)
    assert x.shape == (2, *loaded.pictures.latent_shape)
    assert_close(x[:1], paint(golden.model, [prefix], [5], settings), 5)
    text = "".join(
        event.text
        for event in complete(loaded, "1 2 3", settings=GenerationSettings(max_tokens=4, max_images=0))
        if isinstance(event, Token)
    )
    assert all(0 <= int(word) < config.num_text_tokens for word in text.split())


def test_a_prompt_that_is_no_ids(golden: Golden, tmp_path: Path) -> None:
    loaded = converted(golden.folder, tmp_path / "out")
    assert loaded.tokenizer.encode("a cat, 3;4") == [3, 4]
    assert loaded.tokenizer.encode("a cat") == []
    c = golden.model.config
    assert loaded.tokenizer.encode(f"1 {c.num_text_tokens}") in ([1], [1, c.sos_id])
    assert loaded.tokenizer.decode([3, 4, c.meta_id, c.sos_id]).split() == ["3", "4"]
