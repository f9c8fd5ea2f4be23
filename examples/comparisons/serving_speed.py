"""How long painting takes, by processor time: variants in turn, so that a busy machine hits all alike.

Speed does not depend on the weights, so fresh ones are painted with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median

import mlx.core as mx

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.painting import paint
from mlx_transfusion.settings import GenerationSettings

PROMPT_TOKENS = 6


def painting_seconds(
    models: Mapping[str, ModelConfig],
    settings: GenerationSettings,
    *,
    pictures: Sequence[int] = (1, 8),
    rounds: int = 5,
) -> dict[str, dict[int, list[float]]]:
    """Seconds of processor time for each picture, painted `pictures` at once: of every round, by variant."""
    fresh = {name: _fresh(config) for name, config in models.items()}
    out: dict[str, dict[int, list[float]]] = {name: {n: [] for n in pictures} for name in models}
    for round_ in range(-1, rounds):  # the first warms up
        for name, model in fresh.items():
            for n in pictures:
                start = time.process_time()
                mx.eval(model.decode(paint(model, [_prompt(model)] * n, range(n), settings)))
                if round_ >= 0:
                    out[name][n].append((time.process_time() - start) / n)
    return out


def table(seconds: Mapping[str, Mapping[int, Sequence[float]]], labels: Mapping[str, str], steps: int) -> str:
    """Milliseconds and how many times as fast as the first variant, round by round."""
    first = next(iter(seconds.values()))
    lines = [
        f"\nPainting, {steps} guided steps, processor time a picture (median of {_rounds(first)} rounds):\n"
    ]
    lines.append("| | " + " | ".join(f"{n} at once, ms | times as fast" for n in first) + " |")
    lines.append("| --- " * (1 + 2 * len(first)) + "|")
    for name, by_count in seconds.items():
        cells = []
        for n, values in by_count.items():
            ratios = [a / b for a, b in zip(first[n], values, strict=True)]
            cells += [f"{1000 * median(values):.1f}",
                      f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]  # fmt: skip
        lines.append(f"| {labels[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _rounds(by_count: Mapping[int, Sequence[float]]) -> int:
    return len(next(iter(by_count.values())))


def _fresh(config: ModelConfig) -> Transfusion:
    model = Transfusion(config)
    mx.eval(model.parameters())
    return model


def _prompt(model: Transfusion) -> list[int]:
    c = model.config
    return [c.bos_token_id, *range(c.vocab_size - PROMPT_TOKENS, c.vocab_size), c.boi_token_id]
