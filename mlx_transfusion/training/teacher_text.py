"""Text of a student that is held to its teacher's distributions instead of the next tokens (arXiv 1503.02531).

A next token is one draw from what may follow, and the few hundred of a step are too noisy to hold weights in place
that pictures move. The teacher's whole distribution has no such noise, and no gradient at the teacher's weights.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class TeacherLogits(NamedTuple):
    """The teacher's logits of a step's text-loss positions, where they are asked for."""

    prefix: mx.array | None = None
    """Of the texts before pictures. float32 [K, V]"""
    rest: mx.array | None = None
    """Of all other documents. float32 [K', V]"""


def divergence(logits: mx.array, wanted: mx.array, weights: mx.array) -> mx.array:
    """Summed Kullback-Leibler divergence in nats from the distributions of `wanted` to those of logits, both [K, V].

    weights [K]: 0 of padding. Its gradient is that of the cross-entropy against the teacher's distribution.
    """
    log_p, log_q = (x - mx.logsumexp(x, -1, keepdims=True) for x in (wanted, logits))
    return ((mx.exp(log_p) * (log_p - log_q)).sum(-1) * weights).sum()
