"""BAGEL against numbers of the official code: reading, writing, painting, editing; and the contract of a family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_transfusion.models.bagel import Bagel
from mlx_transfusion.models.bagel_config import BagelConfig
from mlx_transfusion.models.bagel_guidance import RENORMS, BagelGuidance, flow_times, paint_flow
from mlx_transfusion.models.cache import KVCache

try:
    from mlx_transfusion.convert import bagel as convert
    from mlx_transfusion.convert import sources, table
except ModuleNotFoundError:  # only the tree is on the path, the package is not installed
    from convert import bagel as convert
    from convert import sources, table

FOLDER = Path(__file__).parent / "fixtures" / "bagel"
STATES, SAMPLES = 1e-4, 5e-4
"""The golden's tolerances: of states, logits and velocities; of samples."""


class Golden(NamedTuple):
    """The official code's tiny model, and its numbers."""

    model: Bagel
    io: dict[str, mx.array]


def load_golden(**fields: int) -> Bagel:
    """The converted model, with other sizes of pictures."""
    plan = convert.plan(sources.Source(FOLDER))
    config = BagelConfig.from_dict(json.loads(json.dumps(plan.config)) | fields)
    model = Bagel(config)
    tensors = {key + name: part.read(name) for key, part in plan.parts.items() for name in part.tensors}
    model.load_weights(list(table.forward(plan.entries, tensors).items()))
    model.eval()
    return model


@pytest.fixture(scope="module")
def golden() -> Golden:
    """Its pictures have the size of the golden's text to image."""
    model = load_golden(image_height=40, image_width=24, input_height=24, input_width=16)
    return Golden(model, mx.load(str(FOLDER / "io.safetensors")))


def assert_close(ours: mx.array, theirs: mx.array, tolerance: float = STATES) -> None:
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=0, atol=tolerance)


def pixels(x: mx.array) -> mx.array:
    """Official pixels [3, H, W] in [-1, 1] -> ours [1, H, W, 3] in [0, 1]."""
    return (x.transpose(1, 2, 0)[None] + 1) / 2


def read(model: Bagel, ids: mx.array, cache: KVCache) -> mx.array:
    return model.extend_text(np.array(ids)[None], np.array([ids.size]), cache)


def greedy(model: Bagel, cache: KVCache, count: int) -> tuple[list[int], mx.array]:
    """Official writing: BOS is the first token read and stored; logits after each of `count` tokens."""
    tokens, logits = [model.config.bos_token_id], []
    for _ in range(count):
        logits.append(read(model, mx.array(tokens[-1:]), cache)[0])
        tokens.append(int(mx.argmax(logits[-1])))
    return tokens[:count], mx.stack(logits)


def columns(cache: KVCache, layer: int, of: int) -> mx.array:
    """Keys (0) or values (1) of one layer in the official order of axes: [S, K, E]."""
    past = cache.layers[layer]
    assert past is not None
    return past[of][0].transpose(1, 0, 2)


# ---- the golden ---------------------------------------------------------------------------------------------------


def test_text(golden: Golden) -> None:
    model, io = golden
    ids = np.array(io["text.ids"])[None]
    x = model.embed_tokens(mx.array(ids))
    assert_close(x[0], io["text.embeddings"])
    turn = model.decoder.turn(mx.arange(ids.size)[None])
    states = [x]
    for layer in model.decoder.layers:
        states.append(layer(states[-1], ids.size, turn, "causal")[0])
    assert_close(states[1][0], io["text.layer0"])
    assert_close(states[-1][0], io["text.last_layer"])
    assert_close(model.decoder.norm(states[-1])[0], io["text.final_norm"])
    assert_close(model.lm_head(model.decoder.norm(states[-1]))[0], io["text.logits"])

    logits, cache = model.prefill(ids, np.array([ids.size]))
    assert_close(logits[0], io["text.logits"][-1])
    assert_close(columns(cache, 0, 0), io["text.cache_k_layer0"])
    assert_close(columns(cache, 0, 1), io["text.cache_v_layer0"])
    assert cache.positions.tolist() == io["text_greedy.start_position"].tolist()
    tokens, steps = greedy(model, cache, 8)
    assert tokens == io["text_greedy.tokens"].tolist()
    assert_close(steps, io["text_greedy.step_logits"])


@pytest.mark.parametrize(("name", "images"), [("und", 1), ("und2", 2)])
def test_understanding(golden: Golden, name: str, images: int) -> None:
    model, io = golden
    cache = model.new_cache(1)
    for i in range(images):
        key = f"{name}.image{i}"
        picture = io[f"{key}.pixels"].transpose(1, 2, 0)[None]
        vision, places = model.vision, io[f"{key}.vit_position_ids"]
        features = vision(picture, places)
        assert_close(features[0], io[f"{key}.vit_output"])
        assert_close(model.connector(features)[0], io[f"{key}.connector"])
        assert_close(model.feature_vectors(picture)[0], io[f"{key}.llm_input"][1:-1])
        assert io[f"{key}.llm_position_ids"].tolist() == [i] * (places.size + 2)
        model.read_picture(pixels(io[f"{key}.pixels"]), cache)
    assert cache.positions.tolist() == [images]
    logits = read(model, io[f"{name}.text_ids"], cache)
    assert_close(logits[0], io[f"{name}.text_logits"][-1])
    assert cache.positions.tolist() == io[f"{name}.rope"].tolist()
    assert cache.lengths.tolist() == io[f"{name}.kv_len"].tolist()
    assert_close(columns(cache, -1, 0), io[f"{name}.cache_k_last"])
    assert_close(columns(cache, -1, 1), io[f"{name}.cache_v_last"])
    tokens, steps = greedy(model, cache, io[f"{name}.greedy_tokens"].size)
    assert tokens == io[f"{name}.greedy_tokens"].tolist()
    assert_close(steps, io[f"{name}.greedy_step_logits"])


def prompt(golden: Golden) -> KVCache:
    """The full context of text to image."""
    return golden.model.prefill(np.array(golden.io["t2i.prompt_ids"])[None], np.array([10]))[1]


def test_noisy_block(golden: Golden) -> None:
    model, io = golden
    cache, x = prompt(golden), io["t2i.noise"][None]
    for key in ("t2i.t0", "t2i.t1"):
        t = io[f"{key}.timestep"][None]
        assert_close(model.time_embedder(t)[0], io[f"{key}.time_embed"])
        assert_close(model.vae2llm(x)[0], io[f"{key}.vae2llm"])
        assert_close(model.latent_vectors(x, t, model.config.grid)[0], io[f"{key}.llm_input"][1:-1])
        hidden = model._read_picture_block(
            model.latent_vectors(x, t, model.config.grid), cache, latents=True, store=False
        )
        official = mx.concatenate([hidden[:, :1], hidden[:, 2:], hidden[:, 1:2]], 1)
        assert_close(official[0], io[f"{key}.final_norm"])
        assert_close(model.flow(x, t, cache)[0], io[f"{key}.v_cond"])
        assert_close(model.flow(x, t, model.guide([[]]))[0], io[f"{key}.v_cfg_text_branch"])
    assert cache.lengths.tolist() == io["t2i.kv_len"].tolist(), "painting has written into the cache"


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("least", [0.0, 0.6])
@pytest.mark.parametrize("images", ["text", "text_img"])
def test_guidance(golden: Golden, renorm: str, least: float, images: str) -> None:
    io = golden.io
    scale = float(io["edit.sample.cfg_img_scale"]) if images == "text_img" else 1.0
    guidance = BagelGuidance(float(io["t2i.sample.cfg_text_scale"]), scale, renorm=renorm, minimum=least)
    for key in ("t2i.t0", "t2i.t1", "edit.t0"):
        v, text, image = (io[f"{key}.v_{n}"][None] for n in ("cond", "cfg_text_branch", "cfg_img_branch"))
        assert_close(guidance(v, text, image)[0], io[f"{key}.v_{images}_{renorm}_min{least}"])


def settings(io: dict[str, mx.array], key: str) -> tuple[BagelGuidance, list[float]]:
    def number(name: str) -> float:
        return float(io[f"{key}.{name}"])

    low, high = io[f"{key}.cfg_interval"].tolist()
    guidance = BagelGuidance(
        number("cfg_text_scale"), number("cfg_img_scale"), (low, high),
        RENORMS[int(number("cfg_renorm_type"))], number("cfg_renorm_min"),
    )  # fmt: skip
    times = flow_times(int(number("num_timesteps")), number("timestep_shift"))
    np.testing.assert_allclose(times[:-1], np.array(io[f"{key}.timesteps"]), atol=1e-6)
    return guidance, times


@pytest.mark.parametrize("name", ["sample", "sample_plain"])
def test_painting(golden: Golden, name: str) -> None:
    model, io = golden
    guidance, times = settings(io, f"t2i.{name}")
    x = paint_flow(model, io["t2i.noise"][None], times, prompt(golden), model.guide([[]]), guidance=guidance)
    assert_close(x[0], io[f"t2i.{name}.final_latent_tokens"], SAMPLES)
