"""From a prompt's keys and values to a picture: the diffusion half of generation.

The prompt is read once. Its keys and values stay frozen over all steps, because the prompt cannot see the
picture behind it (arXiv 2408.11039, section 3.1); so does the second prompt, without the caption, that
classifier-free guidance compares with. Both are evaluated in one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import mlx.core as mx
import numpy as np

from mlx_transfusion import noise, sampling, trigflow
from mlx_transfusion.code_painting import paint_codes
from mlx_transfusion.lanes import lanes
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.family import CodeFamily, PictureFamily, TextFamily
from mlx_transfusion.settings import DEFAULTS, GenerationSettings, ResolvedSettings

START_STREAM, STEP_STREAM = "generate/start", "generate/step"
"""Noise of picture k of a document at its seed: index k of the first, (k, step) of the second (noise.py)."""


def paint(
    model: PictureFamily,
    prefix_ids: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: GenerationSettings = DEFAULTS,
    *,
    negative_ids: Sequence[int] | None = None,
    callback: sampling.Callback | None = None,
) -> mx.array:
    """Paint one picture after each prefix: B prefixes that end in BOI, B seeds -> clean patches [B, N, P].

    settings: what they leave open is a diffusion model's, for the weights alone do not tell their objective;
    callers that know it pass `GenerationSettings.for_model`. negative_ids: the prefix that guidance leads
    away from, a prompt without text when None. callback(step, steps, x, x0) after every step. A picture depends
    on its own prefix and seed only. Raises UserError for bad settings.
    """
    resolved = settings.resolve()
    cache = prefill(model, prefix_ids)
    guide = None
    if resolved.guidance != 1 and not model.guidance_condition:
        guide = model.guide(prefix_ids, negative_ids)
    return paint_after(model, cache, seeds, resolved, guide=guide, callback=callback)


def prefill(model: TextFamily, prefix_ids: Sequence[Sequence[int]]) -> KVCache:
    """Keys and values of B prefixes of any lengths.

    Each distinct prefix is read once and by itself: its numbers then are the same to the last bit, whatever
    else is in the batch.
    """
    read = {ids: model.prefill(*padded([ids], 0))[1] for ids in dict.fromkeys(map(tuple, prefix_ids))}
    caches = list(read.values())
    cache = reduce(KVCache.stack, caches)
    places = {ids: row for row, ids in enumerate(read)}
    rows = [places[tuple(ids)] for ids in prefix_ids]
    return cache if rows == list(range(len(caches))) else cache.select(rows)


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids as (ids int32 [B, T], padded on the right; lengths int32 [B])."""
    lengths = [len(row) for row in rows]
    ids = np.full((len(rows), max(lengths)), pad_id, np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    return ids, np.array(lengths, np.int32)


def paint_after(
    model: PictureFamily,
    cache: KVCache,
    seeds: Sequence[int],
    settings: ResolvedSettings,
    *,
    guide: KVCache | None = None,
    picture: int = 0,
    callback: sampling.Callback | None = None,
) -> mx.array:
    """Paint one picture after each row of `cache` (B rows, each ending in BOI) -> clean patches [B, N, P].

    guide: the keys and values that guidance leads away from, of B rows or of one for all; None means without
    guidance. A model with `guidance_condition` needs none: it is told the scale. picture: its number in the
    document, which addresses its noise. The caches stay as they are. A family that writes its pictures gives
    codes [B, N].
    """
    if isinstance(model, CodeFamily):
        return paint_codes(model, cache, seeds, settings, guide=guide, picture=picture, callback=callback)
    velocity = guided_velocity(model, cache, guide, settings)
    rows = cache.batch if guide is None else 2 * cache.batch
    return walk(model, velocity, seeds, settings, picture, callback, rows)


def walk(
    model: PictureFamily,
    velocity: sampling.Velocity,
    seeds: Sequence[int],
    settings: ResolvedSettings,
    picture: int = 0,
    callback: sampling.Callback | None = None,
    rows: int = 1,
) -> mx.array:
    """From the noise of B seeds along a (guided) velocity(x [B, N, P], angle) to clean patches [B, N, P].

    rows: how many rows the velocity hands to the model at once, which can be shared out between cores.
    """
    shape = model.latent_shape
    x = _stack([noise.normal(seed, picture, shape, START_STREAM) for seed in seeds])

    def fresh(step: int) -> mx.array:
        return _stack([noise.normal(seed, (picture, step), shape, STEP_STREAM) for seed in seeds])

    sampler = sampling.get_sampler(settings.sampler)
    with lanes(rows if model.uses_lanes else 1):
        x = sampler.function(velocity, x, _angles(model, settings), fresh, callback)
        mx.eval(x)
    return x


def _stack(arrays: list[np.ndarray]) -> mx.array:
    return mx.array(np.stack(arrays))


def _angles(model: PictureFamily, settings: ResolvedSettings) -> list[float]:
    """The angles of a run; one of a network that predicts eps starts below pi/2, where eps is useless.

    That is half a step below, or, where the first step is the whole way, where eps is of use at last.
    """
    from_noise = not model.predicts_noise
    if settings.angles is not None:
        return [trigflow.NOISE_ANGLE if from_noise else trigflow.MAX_EPS_ANGLE, *settings.angles, 0.0]
    start = trigflow.NOISE_ANGLE * (1.0 if from_noise else 1 - 0.5 / settings.steps)
    return sampling.angle_schedule(settings.steps, start, settings.spacing)


def guided_velocity(
    model: PictureFamily, cache: KVCache, guide: KVCache | None, settings: ResolvedSettings
) -> sampling.Velocity:
    """velocity(x [B, N, P], angle) -> [B, N, P]: conditional, or guided where guidance is active.

    A model that knows the scale gives the guided one itself.
    """
    guidance = sampling.Guidance(settings.guidance, settings.guidance_interval)
    batch = cache.batch
    both, condition = None, {}
    if model.guidance_condition:
        condition = {"guidance": mx.full((batch,), settings.guidance)}
    elif guide is not None:
        both = cache.stack(guide if guide.batch == batch else guide.select([0] * batch))

    def velocity(x: mx.array, angle: float) -> mx.array:
        mx.eval(x)  # one graph a step, not one for all
        if both is None or not guidance.active(angle):
            return model.velocity(x, mx.full((batch,), angle), cache, **condition)
        v = model.velocity(mx.concatenate([x, x]), mx.full((2 * batch,), angle), both)
        return model.guided(v[:batch], v[batch:], guidance.scale, x, angle)

    return velocity
