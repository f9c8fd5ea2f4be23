"""Measure a language model that paints: the pictures that it is asked for, and that its text is what it was.

    python examples/talk_and_paint/evaluate_talk.py MODEL LLAMA [--pictures 200] [--output results.json]

Pictures: "Please draw CAPTION." for captions of the training set; each picture is looked for among all 3,496, as
`mlx-transfusion evaluate` does. Text: logits and perplexity on dictionary glosses, and greedy answers, of MODEL and
of LLAMA, the folder that it was extended from. Choices: how often it answers requests, and questions, with pictures.
"""

from __future__ import annotations

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from prepare_chat import FIRST, HERE, named

from mlx_transfusion.chat import chat_ids
from mlx_transfusion.evaluation.config import EvaluationConfig, load_config
from mlx_transfusion.evaluation.data import Pairs, load_pairs, load_texts
from mlx_transfusion.evaluation.measures import Split, measure_pictures
from mlx_transfusion.evaluation.report import settings_for
from mlx_transfusion.events import Token
from mlx_transfusion.interleave import Tokens, complete
from mlx_transfusion.model_io import Loaded, load
from mlx_transfusion.models.llama import Llama
from mlx_transfusion.models.llama_painter import LlamaPainter
from mlx_transfusion.settings import GenerationSettings

GLOSSES = 200
QUESTIONS = (
    "What is the capital of France?", "Write one sentence about a red heart.", "Who wrote Hamlet?",
    "Tell me a joke.", "How do I boil an egg?",
)  # fmt: skip


def picture_retrieval(loaded: Loaded, config: EvaluationConfig, count: int) -> dict[str, Any]:
    """Exact and variant retrieval of painted training captions, asked for in a sentence."""
    assert isinstance(loaded.model, LlamaPainter)
    pairs = load_pairs(config, config.train, loaded.model.config.pictures)
    asked = Pairs(pairs.names, [FIRST.format(named(c)) for c in pairs.captions], pairs.bases, pairs.pixels)
    counts = dataclasses.replace(config.counts, pictures=count)
    config = dataclasses.replace(
        config, counts=counts, generation=settings_for(loaded, config.generation, False)
    )
    return measure_pictures(loaded, config, Split("train", asked, asked, 0), _progress)


def text_sameness(paints: Loaded, plain: Loaded, texts: list[str]) -> dict[str, Any]:
    """Whether logits are equal bit for bit, both perplexities, and greedy answers."""
    equal, nats, tokens = True, np.zeros(2), 0
    for text in texts:
        ids = plain.tokenizer.encode(text)
        before, after = (_logits(loaded, ids) for loaded in (plain, paints))
        equal &= bool(mx.array_equal(before, after))
        targets = mx.array(ids[1:])[:, None]
        losses = [
            mx.logsumexp(x[:-1], -1) - mx.take_along_axis(x[:-1], targets, -1)[:, 0] for x in (before, after)
        ]
        nats += [float(x.sum()) for x in losses]
        tokens += len(ids) - 1
    answers = [[_answer(loaded, question) for question in QUESTIONS] for loaded in (plain, paints)]
    return {
        "logits_equal": equal,
        "tokens": tokens,
        "perplexity_before": math.exp(nats[0] / tokens),
        "perplexity": math.exp(nats[1] / tokens),
        "answers_equal": answers[0] == answers[1],
        "answers": dict(zip(QUESTIONS, answers[1], strict=True)),
    }


def choices(loaded: Loaded) -> dict[str, float]:
    """How often a request, and a question, of the validation set is answered with a picture."""
    assert isinstance(loaded.model, LlamaPainter)
    out = {}
    for name, file in (("requests", "val.jsonl"), ("questions", "val-words.jsonl")):
        rows = [json.loads(line)["text"] for line in (HERE / "data" / file).read_text("utf-8").splitlines()]
        chosen = rows[:: max(1, len(rows) // 50)]
        made = [_wish(loaded, text) > 0 for text in chosen]
        out[f"pictures_for_{name}"] = float(np.mean(made))
    return out


def _wish(loaded: Loaded, text: str) -> float:
    model = loaded.model
    assert isinstance(model, LlamaPainter)
    hidden, _ = model.read_prefix(mx.array([chat_ids(loaded.path, loaded.tokenizer, text)]))
    return float(model.wishes(hidden[0, -1]))


def _logits(loaded: Loaded, ids: list[int]) -> mx.array:
    assert isinstance(loaded.model, Llama)
    return loaded.model(mx.array([ids]))[0]


def _answer(loaded: Loaded, question: str) -> str:
    """The greedy answer of 40 tokens."""
    ids = chat_ids(loaded.path, loaded.tokenizer, question)
    settings = GenerationSettings(temperature=0.0, max_tokens=40, max_images=0)
    events = complete(loaded, [Tokens(tuple(ids))], 0, settings)
    return "".join(event.text for event in events if isinstance(event, Token))


def _progress(done: int, total: int) -> None:
    print(f"\r{done}/{total}", end="", flush=True)


def main() -> None:
    """Print the report as JSON, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("llama")
    parser.add_argument("--pictures", type=int, default=200, help="0 paints none.")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    config = load_config(HERE.parent / "emoji" / "evaluate.toml")
    paints, plain = load(given.model), load(given.llama)
    report = {
        "text": text_sameness(paints, plain, load_texts(config, config.val_texts, GLOSSES)),
        "choices": choices(paints),
    }
    if given.pictures:
        report["pictures"] = picture_retrieval(paints, config, given.pictures)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    if given.output is None:
        print(text)
    else:
        given.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
