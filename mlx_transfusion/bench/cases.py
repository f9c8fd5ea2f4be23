"""What a model of any family is asked to do: read, write, and paint in each of its ways."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np

from mlx_transfusion.bench.measure import Case
from mlx_transfusion.model_io import Loaded
from mlx_transfusion.models.family import PictureFamily
from mlx_transfusion.objective import TOKENS
from mlx_transfusion.settings import DEFAULTS, GenerationSettings
from mlx_transfusion.text_to_image import generate_images

READ_TOKENS = 256
WRITTEN_TOKENS = 32
BATCH = 8
PROMPT = "red heart"


def text_cases(loaded: Loaded) -> dict[str, Case]:
    """Reading one prompt, and writing behind it token by token."""
    model, layout = loaded.model, loaded.config.layout
    length = min(READ_TOKENS, layout.max_position // 2)
    ids = np.resize(np.array(_some_text(loaded), np.int32), (1, length))
    lengths = np.array([length])
    _, cache = model.prefill(ids, lengths)

    def read() -> None:
        mx.eval(model.prefill(ids, lengths)[0])

    def write() -> None:
        here, token = cache.snapshot(), ids[:, :1]
        for _ in range(WRITTEN_TOKENS):
            logits = model.extend_text(token, np.ones(1, int), here)
            token = np.array(mx.argmax(logits, -1), np.int32)[:, None]

    return {
        f"read {length} tokens": Case(read, length),
        f"write {WRITTEN_TOKENS} tokens": Case(write, WRITTEN_TOKENS),
    }


def picture_cases(loaded: Loaded) -> dict[str, Case]:
    """A picture in each way that suits the model, and several at once; {} if it paints none."""
    if not isinstance(loaded.model, PictureFamily):
        return {}
    ways = {name: settings.for_model(loaded.extra, loaded.name) for name, settings in _ways(loaded).items()}
    usual = next(iter(ways.values()))
    cases = {
        f"a picture, {name}": Case(partial(generate_images, loaded, PROMPT, 0, s)) for name, s in ways.items()
    }
    together = GenerationSettings(
        sampler=usual.sampler,
        steps=usual.steps,
        angles=usual.angles,
        guidance=usual.guidance,
        batch_size=BATCH,
    )
    cases[f"{BATCH} pictures at once"] = Case(
        partial(generate_images, loaded, PROMPT, range(BATCH), together)
    )
    return cases


def _ways(loaded: Loaded) -> dict[str, GenerationSettings]:
    """Labels and settings, the model's own first."""
    own = DEFAULTS.for_model(loaded.extra, loaded.name)
    guided = "" if own.guidance == 1 else ", guided"
    if own.sampler == TOKENS:
        return {f"{own.steps} tokens{guided}": DEFAULTS}
    ways = {f"{own.steps} steps {own.sampler}{guided}": DEFAULTS}
    if own.sampler == "consistency":
        return ways | {"1 step": GenerationSettings(steps=1)}
    for sampler, steps in (("dpmpp_2m", 16), ("ddpm", 250)):
        if (sampler, steps) != (own.sampler, own.steps):
            ways[f"{steps} steps {sampler}{guided}"] = GenerationSettings(sampler=sampler, steps=steps)
    return ways


def _some_text(loaded: Loaded) -> list[int]:
    """Token ids of ordinary text."""
    ids = loaded.tokenizer.encode("The quick brown fox jumps over the lazy dog, and then does it again.")
    return ids or [next(iter(loaded.config.layout.eos), 0)]
