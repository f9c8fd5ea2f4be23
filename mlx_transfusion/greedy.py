"""The likeliest token, chosen where the logits are: the next step begins before anybody has looked at it.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.settings import GenerationSettings


def is_greedy(settings: GenerationSettings) -> bool:
    """Whether every token is the likeliest one, whatever came before."""
    return settings.temperature == 0 and settings.repetition_penalty == 1


def ban(banned: Iterable[int], size: int) -> mx.array:
    """What is added to logits [..., V] of a vocabulary of `size`, so that no banned id is chosen. float32 [V]"""
    mask = np.zeros(size, np.float32)
    mask[[*banned]] = -np.inf
    return mx.array(mask)


def likeliest(logits: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """The best token of each row of logits [B, V] under a mask of `ban`, and its logit; both [B], not waited for.

    `check_choice` takes the logit.
    """
    scores = logits.astype(mx.float32) + mask
    return mx.argmax(scores, -1), scores.max(-1)


def check_choice(scores: mx.array) -> None:
    """Raises UserError when a best logit of [B] shows that no token could be chosen: all banned, or some NaN."""
    if not mx.isfinite(scores).all().item():
        raise UserError("no token can be drawn: every logit is banned or -inf, or some are NaN or +inf")
