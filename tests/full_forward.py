"""The training forward with the logits of every position: what tests of the model and of its cache compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_transfusion import sequence
from mlx_transfusion.models.transfusion import TrainArrays, Transfusion
from mlx_transfusion.sequence import PackedBatch, Segment


def train_arrays(
    packed: PackedBatch, patches: np.ndarray, angle: np.ndarray, bidirectional: bool = True
) -> TrainArrays:
    """Noisy patches [M, N, P] at angles [M], with the logits of all B*T positions asked for."""
    return TrainArrays(
        ids=mx.array(packed.ids),
        is_image=mx.array((packed.modality == sequence.IMAGE)[..., None]),
        patch_row=mx.array(packed.patch_row),
        patch_index=mx.array(packed.patch_index),
        text_index=mx.arange(packed.ids.size),
        mask=mx.array(sequence.attention_mask(packed.document, packed.image, bidirectional)),
        patches=mx.array(patches),
        angle=mx.array(angle),
    )


def full_forward(
    model: Transfusion,
    documents: Sequence[Sequence[Segment]],
    row_length: int,
    patches: np.ndarray,
    angle: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, PackedBatch]:
    """Logits [B, T, V] of all positions, predictions [M, N, P], and the packed batch."""
    packed = sequence.pack(documents, row_length)
    logits, prediction = model(train_arrays(packed, patches, angle, model.config.bidirectional))
    return np.array(logits).reshape(*packed.ids.shape, -1), np.array(prediction), packed


def random_images(model: Transfusion, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Patches [count, N, P] and angles [count]."""
    rng = np.random.default_rng(seed)
    c = model.config
    patches = rng.normal(size=(count, c.patches_per_image, c.patch_dim)).astype(np.float32)
    return patches, rng.uniform(0.1, 1.4, count).astype(np.float32)


class Double:
    """A model with something else in the place of one of its methods."""

    def __init__(self, model: Transfusion) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)
