"""From a prompt's keys and values to a picture that is written: one code after the other, as text is.

Guidance acts on the logits, l_without + s (l_with - l_without), before temperature and the nucleus are applied; both
sides read the same codes, in one batch (arXiv 2203.13131, 3.4, which Chameleon's kind of model inherits).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_transfusion import noise, sampling
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.family import CodeFamily
from mlx_transfusion.settings import ResolvedSettings
from mlx_transfusion.token_sampling import sample_token

CODE_STREAM = "generate/code"
"""Uniform number of code k of picture p of a document at its seed: element k of index p (noise.py)."""


def paint_codes(
    model: CodeFamily,
    cache: KVCache,
    seeds: Sequence[int],
    settings: ResolvedSettings,
    *,
    guide: KVCache | None = None,
    picture: int = 0,
    callback: sampling.Callback | None = None,
) -> mx.array:
    """Write one picture after each row of `cache` (B rows, each ending in BOI) -> codes int32 [B, N].

    The arguments are those of `painting.paint_after`; the callback is told the codes so far, the rest 0, after each
    code. The caches stay as they are.
    """
    batch, count = cache.batch, model.latent_shape[0]
    both = cache
    if guide is not None:
        both = cache.stack(guide if guide.batch == batch else guide.select([0] * batch))
    both = both.without_last()  # BOI is read again: what follows it was not kept
    draws = np.stack([noise.uniform(seed, picture, (count,), CODE_STREAM) for seed in seeds])
    ones = np.ones(both.batch, np.int32)
    tokens = np.full(batch, model.config.layout.boi, np.int32)
    codes = np.zeros((batch, count), np.int32)
    for k in range(count):
        read = tokens if guide is None else np.concatenate([tokens, tokens])
        logits = model.extend_text(read[:, None], ones, both)[:, model.first_code :].astype(mx.float32)
        if guide is not None:
            logits = sampling.guided(logits[:batch], logits[batch:], settings.guidance)
        codes[:, k] = [
            _draw(line, settings, u) for line, u in zip(np.array(logits), draws[:, k].tolist(), strict=True)
        ]
        tokens = model.first_code + codes[:, k]
        if callback is not None:
            so_far = mx.array(codes)
            callback(k, count, so_far, so_far)
    return mx.array(codes)


def _draw(logits: np.ndarray, settings: ResolvedSettings, u: float) -> int:
    s = settings
    return sample_token(
        logits, temperature=s.image_temperature, top_p=s.image_top_p, top_k=s.image_top_k, u=u
    )
