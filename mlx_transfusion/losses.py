"""The training objective: next-token loss on text plus diffusion loss on images (arXiv 2408.11039, eq. 4)."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.lanes import by_rows


def text_loss(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Summed cross-entropy in nats over logits [K, V], targets [K]; padded entries have weight 0.

    In open lanes (lanes.py) the positions are shared out between the cores.
    """
    parts = by_rows(_summed, logits, targets, weights)
    return sum(parts[1:], parts[0])


def _summed(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    return (nn.losses.cross_entropy(logits, targets, reduction="none") * weights).sum()


def token_losses(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Cross-entropy of each prediction in nats [K], and log Z [K], Z the sum of exp(logits) [K, V].

    The square of log Z is the denominator loss that keeps logits from drifting (arXiv 2204.02311, section 5).
    """
    log_z = mx.logsumexp(logits, -1)
    chosen = mx.take_along_axis(logits, targets[:, None], -1)[:, 0]
    return log_z - chosen, log_z


def image_errors(prediction: mx.array, target: mx.array) -> mx.array:
    """Mean squared error of each image over its N*P elements: [M, N, P] -> [M]."""
    return (prediction - target).square().mean((1, 2))
