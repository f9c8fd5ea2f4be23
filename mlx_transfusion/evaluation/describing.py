"""Descriptions of many pictures at once, greedily."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_transfusion.model_io import Loaded
from mlx_transfusion.painting import prefill


def describe_pictures(
    loaded: Loaded,
    pixels: np.ndarray,
    *,
    max_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """The likeliest text after each picture, pixels uint8 [M, H, W, 3]: what `generation.describe` writes.

    Writing ends before EOS or after `max_tokens`. No structural token is written: a description holds no
    picture. progress(done, total) after each batch.
    """
    out: list[str] = []
    for start in range(0, len(pixels), batch_size):
        for ids in _describe_batch(loaded, pixels[start : start + batch_size], max_tokens):
            out.append(loaded.tokenizer.decode(ids).strip())
        progress(len(out), len(pixels))
    return out


def _describe_batch(loaded: Loaded, pixels: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Token ids of each description. All pictures are equally long, so the rows stay in step."""
    model = loaded.trainable
    c = model.config
    batch = len(pixels)
    cache = prefill(model, [[c.bos_token_id, c.boi_token_id]] * batch)
    model.extend_image(model.encode(mx.array(pixels).astype(mx.float32) / 255), cache)
    ones = np.ones(batch, np.int32)
    logits = model.extend_text(np.full((batch, 1), c.eoi_token_id, np.int32), ones, cache)
    banned = _banned(loaded)
    out: list[list[int]] = [[] for _ in range(batch)]
    writing = np.arange(batch)  # which picture each row of the cache belongs to
    for _ in range(max_tokens):
        tokens = np.array(mx.argmax(logits + banned, axis=-1))
        goes_on = np.flatnonzero(tokens != c.eos_token_id)
        if not len(goes_on):
            break
        if len(goes_on) < len(writing):  # rows that have ended cost nothing more
            cache, writing, tokens = cache.select(goes_on.tolist()), writing[goes_on], tokens[goes_on]
        for i, token in zip(writing, tokens, strict=True):
            out[i].append(int(token))
        logits = model.extend_text(tokens[:, None], ones[: len(tokens)], cache)
    return out


def _banned(loaded: Loaded) -> mx.array:
    """0 for text tokens and EOS, -inf for all others. float32 [V]"""
    c = loaded.trainable.config
    out = np.zeros(c.vocab_size, np.float32)
    out[[c.pad_token_id, c.bos_token_id, c.unk_token_id, c.boi_token_id, c.eoi_token_id]] = -np.inf
    out[loaded.tokenizer.vocab_size :] = -np.inf  # rows that only round the size up
    return mx.array(out)
