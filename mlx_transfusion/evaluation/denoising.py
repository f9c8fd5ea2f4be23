"""How well the model removes noise, by amount of noise, with and without the caption.

The error at the angle pi/2 is the one to watch: the input is noise alone there, so the difference between
with and without caption is what the model has learned of the text. It moves long before samples do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np

from mlx_transfusion import noise, trigflow
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.painting import prefill

BUCKET_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.45, math.pi / 2)
"""Bounds of the angle buckets in radians: data at 0, noise at pi/2; captions are learned in the last one."""


def denoising_errors(
    model: Transfusion,
    prefixes: Sequence[Sequence[int]],
    patches: np.ndarray,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors of velocity and predicted picture in each bucket, and at pi/2 in the last column.

    prefixes: token ids up to BOI for each picture; patches: clean pictures [M, N, P]. Picture i meets the
    same noise and the same angle (uniform in each bucket) in every call with this seed, whatever the prefix
    or batch. Returns two float64 [M, len(BUCKET_EDGES)]. The picture error is sin(a)^2 times the velocity
    error; both are 1 at pi/2 for a model that always predicts the mean.
    """
    velocity = np.zeros((len(patches), len(BUCKET_EDGES)))
    angles = _angles(len(patches), seed)
    for start in range(0, len(patches), batch_size):
        rows = slice(start, start + batch_size)
        cache = prefill(model, prefixes[rows])
        x0 = mx.array(patches[rows])
        for bucket in range(len(BUCKET_EDGES)):
            z = mx.array(
                np.stack([
                    noise.normal(seed, (i, bucket), patches.shape[1:], "evaluation/denoising")
                    for i in range(len(patches))[rows]
                ])
            )  # fmt: skip
            angle = mx.array(angles[rows, bucket])
            a = trigflow.per_image(angle, x0)
            v = model.velocity(trigflow.mix(x0, z, a), angle, cache)
            error = (v - trigflow.velocity_target(x0, z, a)).square().mean((1, 2))
            velocity[rows, bucket] = np.array(error)
    return velocity, np.sin(angles.astype(np.float64)) ** 2 * velocity


def _angles(pictures: int, seed: int) -> np.ndarray:
    """Angles in radians: one in each bucket, then pi/2. float32 [M, buckets + 1]"""
    bounds = np.array(list(pairwise(BUCKET_EDGES)))
    draws = np.stack([
        noise.uniform(seed, i, (len(bounds),), "evaluation/angle") for i in range(pictures)
    ])  # fmt: skip
    inside = bounds[:, 0] + draws * (bounds[:, 1] - bounds[:, 0])
    return np.concatenate([inside, np.full((pictures, 1), math.pi / 2)], 1).astype(np.float32)
