"""The training objective in PyTorch (arXiv 2408.11039, eq. 4): the twin of `losses.py`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def text_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Summed cross-entropy in nats over logits [K, V], targets [K]; padded entries have weight 0. float32."""
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


def image_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image over its N*P elements: [M, N, P] -> [M]. float32."""
    return (prediction.float() - target).square().mean((1, 2))
