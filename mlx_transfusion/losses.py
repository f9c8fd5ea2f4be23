"""The training objective: next-token loss on text plus diffusion loss on images (arXiv 2408.11039, eq. 4)."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


def text_loss(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Summed cross-entropy in nats over logits [K, V], targets [K]; padded entries have weight 0."""
    return (nn.losses.cross_entropy(logits, targets, reduction="none") * weights).sum()


def image_errors(prediction: mx.array, target: mx.array) -> mx.array:
    """Mean squared error of each image over its N*P elements: [M, N, P] -> [M]."""
    return (prediction - target).square().mean((1, 2))
