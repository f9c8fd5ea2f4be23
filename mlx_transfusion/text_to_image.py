"""Pictures from prompts, in batches, with their settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.events import GeneratedImage, Step
from mlx_transfusion.images import CHANNELS
from mlx_transfusion.model_io import Loaded, attach_autoencoder, build
from mlx_transfusion.model_path import AUTOENCODER
from mlx_transfusion.models.family import FamilyConfig, PictureFamily
from mlx_transfusion.painting import paint
from mlx_transfusion.picture_sizes import Size, named
from mlx_transfusion.records import image_record
from mlx_transfusion.settings import DEFAULTS, GenerationSettings, ResolvedSettings


def generate_images(
    loaded: Loaded,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int] = 0,
    settings: GenerationSettings = DEFAULTS,
    on_step: Callable[[Step], None] | None = None,
) -> list[GeneratedImage]:
    """Paint picture i from prompts[i] and seeds[i]; a single prompt or seed serves all pictures.

    Raises UserError, before anything is painted, for bad settings or seeds, for settings that this model
    cannot paint with, and for prompts that are empty or too long.
    """
    images = iter_images(loaded, prompts, seeds, settings, on_step)
    return sorted(images, key=lambda image: image.index)


def iter_images(
    loaded: Loaded,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int] = 0,
    settings: GenerationSettings = DEFAULTS,
    on_step: Callable[[Step], None] | None = None,
) -> Iterator[GeneratedImage]:
    """As `generate_images`, giving each picture as soon as it is finished (equally long prompts together)."""
    resolved = settings.for_model(loaded.extra, loaded.name)
    check_pictures(loaded)
    pairs = _pairs(prompts, seeds)
    prefix_of = {prompt: image_prefix(loaded, prompt) for prompt in dict.fromkeys(p for p, _ in pairs)}
    prefixes = [prefix_of[prompt] for prompt, _ in pairs]
    return _painted(loaded, pairs, prefixes, negative_prefix(loaded, resolved), resolved, on_step)


def unread_model(config: FamilyConfig, name: str, path: Path) -> PictureFamily:
    """A folder's model before its weights are read, to be asked for sizes.

    Raises UserError if it knows no pictures, and for an autoencoder in the folder that is not its own.
    """
    model = build(config)
    if not isinstance(model, PictureFamily):
        raise UserError(f"model {name} only writes text: name a model that paints")
    attach_autoencoder(model, path / AUTOENCODER, weights=False)
    return model


def size_to_paint(
    config: FamilyConfig, name: str, path: Path, width: int | None, height: int | None
) -> tuple[Size, str | None]:
    """(height, width) of the pictures that a folder's model shall paint, checked before its weights are read.

    width, height: in pixels; None is the model's own. With it comes a warning where the model did not learn the size.
    Raises UserError for one that it cannot paint, and if it paints none.
    """
    model = unread_model(config, name, path)
    own_height, own_width = model.picture_size
    size = own_height if height is None else height, own_width if width is None else width
    model.at_size(*size)
    if size in model.sizes:
        return size, None
    return size, (
        f"warning: model {name} learnt {named(model.sizes)}, and {named([size])} is none of them: the picture may "
        "be poor"
    )


def check_pictures(loaded: Loaded) -> None:
    """Raises UserError when the model does not paint, or makes latents, which need a decoder."""
    channels = loaded.pictures.picture_channels
    if channels not in CHANNELS:
        raise UserError(
            f"model {loaded.name} makes latents of {channels} channels, not pictures: use a pixel model"
        )


def image_prefix(loaded: Loaded, prompt: str) -> list[int]:
    """All to read before a prompt's picture. Raises UserError for an empty prompt and one that is too long."""
    layout = loaded.config.layout
    if not loaded.tokenizer.encode(prompt):
        raise UserError("the prompt is empty: say what the picture shows")
    ids = loaded.tokenizer.encode(loaded.pictures.prompt_text(prompt))
    prefix = loaded.pictures.image_prefix(ids)
    room = layout.max_position - layout.picture_tokens - (len(prefix) - len(ids))
    if len(ids) > room:
        raise UserError(
            f"the prompt is too long: {len(ids)} tokens, and model {loaded.name} takes at most {room}"
        )
    return prefix


def negative_prefix(loaded: Loaded, settings: GenerationSettings) -> list[int] | None:
    """What guidance leads away from: the negative prompt like a prompt; None without one."""
    if settings.negative_prompt.strip():
        return image_prefix(loaded, settings.negative_prompt)
    return None


def to_uint8(pixels: mx.array) -> np.ndarray:
    """Pixels in [0, 1] of any shape -> uint8 levels, rounded."""
    return np.array(mx.round(pixels.astype(mx.float32) * 255).astype(mx.uint8))


def _pairs(prompts: str | Sequence[str], seeds: int | Sequence[int]) -> list[tuple[str, int]]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    count = max(len(prompts), len(seeds))
    if not prompts or not seeds:
        raise UserError("nothing to paint: give at least one prompt and one seed")
    if len(prompts) not in (1, count) or len(seeds) not in (1, count):
        raise UserError(
            f"{len(prompts)} prompts and {len(seeds)} seeds: give equally many, or a single one of either"
        )
    if bad := [seed for seed in seeds if not 0 <= seed < 1 << 64]:
        raise UserError(f"seed {bad[0]} is out of range: use a whole number from 0 to 2^64 - 1")
    if len(prompts) < count:
        prompts *= count
    return list(zip(prompts, seeds if len(seeds) == count else seeds * count, strict=True))


def _painted(
    loaded: Loaded,
    pairs: list[tuple[str, int]],
    prefixes: list[list[int]],
    negative: list[int] | None,
    settings: ResolvedSettings,
    on_step: Callable[[Step], None] | None,
) -> Iterator[GeneratedImage]:
    for batch in _batches([len(prefix) for prefix in prefixes], settings.batch_size):
        start = time.perf_counter()
        patches = paint(
            loaded.pictures,
            [prefixes[i] for i in batch],
            [pairs[i][1] for i in batch],
            settings,
            negative_ids=negative,
            callback=step_reporter(loaded, batch, on_step),
        )
        pixels = to_uint8(loaded.pictures.decode(patches))
        seconds = (time.perf_counter() - start) / len(batch)
        for row, i in enumerate(batch):
            prompt, seed = pairs[i]
            record = image_record(loaded, prompt, seed, settings, len(batch), row)
            yield GeneratedImage(pixels[row], prompt, seed, i, record, seconds)


def _batches(lengths: list[int], size: int) -> list[list[int]]:
    """Picture numbers in batches of at most `size` with equally long prefixes, as far as possible in order.

    Without padding a picture's arithmetic depends on the batch's shape and on its row alone, both of which
    its record holds: so it can be repeated to the last bit.
    """
    if size == 1:
        return [[i] for i in range(len(lengths))]
    batches = []
    for _, group in groupby(sorted(range(len(lengths)), key=lengths.__getitem__), key=lengths.__getitem__):
        members = list(group)
        batches += [members[at : at + size] for at in range(0, len(members), size)]
    return sorted(batches)


def step_reporter(
    loaded: Loaded, batch: list[int], on_step: Callable[[Step], None] | None
) -> Callable[[int, int, mx.array, mx.array], None] | None:
    """A sampler's callback that tells `on_step` about the pictures `batch`; None for None."""
    if on_step is None:
        return None

    def report(step: int, steps: int, x: mx.array, x0: mx.array) -> None:
        mx.eval(x)  # so that progress is shown when the work is done
        on_step(Step(batch, step + 1, steps, lambda: to_uint8(loaded.pictures.preview(x0))))

    return report
