"""Editing by instruction: a picture and a sentence -> the picture as the sentence wants it.

The document is that of training on edit rows: BOS, the clean source picture, the instruction, BOI, the new picture.
Two guidance scales (InstructPix2Pix, arXiv 2211.09800, equation 3) say how much the source and the instruction count:

    v = v(nothing) + s_image (v(source) - v(nothing)) + s_text (v(source, instruction) - v(source))
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby

import mlx.core as mx
import numpy as np

from mlx_transfusion import sampling
from mlx_transfusion.errors import UserError
from mlx_transfusion.events import GeneratedImage, Step
from mlx_transfusion.images import ImageLike, load_for, load_pixels
from mlx_transfusion.model_io import Loaded
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.family import PictureFamily
from mlx_transfusion.objective import TOKENS
from mlx_transfusion.painting import walk
from mlx_transfusion.picture_sizes import Size
from mlx_transfusion.records import image_record
from mlx_transfusion.settings import DEFAULTS, GenerationSettings, ResolvedSettings
from mlx_transfusion.text_to_image import check_pictures, step_reporter, to_uint8

IMAGE_GUIDANCE = 1.0
"""Default of s_image; 1 costs one pass less."""


@dataclass(frozen=True)
class Edit:
    """One picture to change."""

    source: ImageLike
    instruction: str
    seed: int = 0


def edit_images(
    loaded: Loaded,
    edits: Sequence[Edit],
    settings: GenerationSettings = DEFAULTS,
    image_guidance: float = IMAGE_GUIDANCE,
    on_step: Callable[[Step], None] | None = None,
    size: Size | None = None,
) -> list[GeneratedImage]:
    """Paint every edit, `settings.batch_size` at a time; `settings.guidance` is s_text of the instruction.

    size: (height, width) in pixels of what is painted; None: that of the source as it is read.

    Raises UserError, before anything is painted, for bad settings, a source that is no picture, an instruction that
    is empty or too long, a size that the model cannot paint, and a model that does not read pictures or paint them
    with guidance.
    """
    resolved = settings.for_model(loaded.extra, loaded.name)
    check_pictures(loaded)
    if resolved.sampler == TOKENS:
        raise UserError(
            f"model {loaded.name} writes its pictures as tokens, and an edit needs a diffusion model"
        )
    check_image_guidance(loaded, resolved, image_guidance)
    sources = [load_source(loaded.pictures, edit.source) for edit in edits]
    instructions = [_instruction(loaded, edit.instruction) for edit in edits]
    done: list[GeneratedImage] = []
    targets = [_target(loaded.pictures, source, size) for source in sources]
    painters = {target: loaded.at_size(target[1], target[0]) for target in dict.fromkeys(targets)}
    for target, rows in _batches(targets, resolved.batch_size):
        painter = painters[target]
        start = time.perf_counter()
        documents = [(sources[i], instructions[i]) for i in rows]
        velocity = _velocity(painter.pictures, documents, resolved, image_guidance)
        report = step_reporter(painter, rows, on_step)
        patches = walk(
            painter.pictures,
            velocity,
            [edits[i].seed for i in rows],
            resolved,
            callback=report,
            rows=3 * len(rows),
        )
        pixels = to_uint8(painter.pictures.decode(patches))
        seconds = (time.perf_counter() - start) / len(rows)
        for row, i in enumerate(rows):
            record = image_record(
                painter, edits[i].instruction, edits[i].seed, resolved, len(rows), row
            ) | edit_record(sources[i], image_guidance)
            done.append(GeneratedImage(pixels[row], edits[i].instruction, edits[i].seed, i, record, seconds))
    return done


def _target(model: PictureFamily, source: np.ndarray, size: Size | None) -> Size:
    """(height, width) of the new picture: the one asked for, or the source's, of a model that paints several."""
    if size is not None:
        return size
    height, width = source.shape[:2]
    return (height, width) if len(model.sizes) > 1 else model.picture_size


def _batches(targets: Sequence[Size], count: int) -> Iterator[tuple[Size, list[int]]]:
    """Numbers of edits in their order, at most `count` of one size together."""
    for target, numbers in groupby(range(len(targets)), key=targets.__getitem__):
        rows = list(numbers)
        yield from ((target, rows[at : at + count]) for at in range(0, len(rows), count))


def load_source(model: PictureFamily, image: ImageLike) -> np.ndarray:
    """A picture to edit as the model reads it: uint8 [H, W, 3]. Raises UserError when it is no readable image."""
    size = model.edit_size
    return load_for(model, image) if size is None else load_pixels(image, *size)


def check_image_guidance(loaded: Loaded, settings: ResolvedSettings, image_guidance: float) -> None:
    """Raises UserError for a scale out of range and for guidance that the model or the editor has no place for."""
    if not (math.isfinite(image_guidance) and image_guidance >= 0):
        raise UserError(
            f"image guidance is {image_guidance}: use a number of 0 or more (1 = none; 1 to 2 is usual)"
        )
    if loaded.pictures.guidance_condition:
        raise UserError(
            f"model {loaded.name} was distilled for pictures from text alone: edit with a diffusion model"
        )
    if settings.negative_prompt.strip():
        raise UserError("editing has no negative prompt: say in the instruction what should change")


def edit_record(source: np.ndarray, image_guidance: float) -> dict[str, dict[str, object]]:
    """What the PNG of an edited picture says besides `image_record`: which source, uint8 [H, W, 3] as it was read."""
    return {"edit": {"source_hash": source_hash(source), "image_guidance": image_guidance}}


def source_hash(source: np.ndarray) -> str:
    """First 16 hex digits of the SHA-256 of a source's pixels, uint8 [H, W, 3] at the model's size."""
    return hashlib.sha256(np.ascontiguousarray(source).tobytes()).hexdigest()[:16]


def _instruction(loaded: Loaded, text: str) -> list[int]:
    layout = loaded.config.layout
    ids = loaded.tokenizer.encode(text)
    if not ids:
        raise UserError('the instruction is empty: say what to change, e.g. "make it dark skin tone"')
    room = layout.max_position - 2 * layout.picture_tokens - 1
    if len(ids) > room:
        raise UserError(
            f"the instruction is too long: {len(ids)} tokens, and model {loaded.name} takes at most {room} "
            "beside two pictures"
        )
    return ids


def _velocity(
    model: PictureFamily,
    documents: Sequence[tuple[np.ndarray, list[int]]],
    settings: ResolvedSettings,
    image_guidance: float,
) -> sampling.Velocity:
    """The guided velocity of B edits; only the passes that the two scales need."""
    b = len(documents)
    text = sampling.Guidance(settings.guidance, settings.guidance_interval)
    image = sampling.Guidance(image_guidance, settings.guidance_interval)
    sources = [mx.array(source[None].astype(np.float32) / 255) for source, _ in documents]
    texts = [ids for _, ids in documents]
    caches = [_stacked([model.read_edit(p, ids) for p, ids in zip(sources, texts, strict=True)])]
    if text.scale != 1 or image.scale != 1:
        caches.append(_stacked([model.read_edit(p, []) for p in sources]))
    if image.scale != 1:
        caches.append(_stacked([model.read_edit(None, model.unpictured(ids)) for ids in texts]))
    every = reduce(KVCache.stack, caches)

    def velocity(x: mx.array, angle: float) -> mx.array:
        mx.eval(x)  # one graph a step, not one for all
        if len(caches) == 1 or not (text.active(angle) or image.active(angle)):
            return model.velocity(x, mx.full((b,), angle), caches[0])
        n = len(caches)
        v = model.velocity(mx.concatenate([x] * n), mx.full((n * b,), angle), every)
        full, source, *nothing = mx.split(v, n)
        scales = text.scale, image.scale
        return model.guided_edit(full, source, nothing[0] if nothing else None, scales, x, angle)

    return velocity


def _stacked(caches: Sequence[KVCache]) -> KVCache:
    return reduce(KVCache.stack, caches)
