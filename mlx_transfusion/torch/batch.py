"""A packed batch of `training/data.py` as tensors: pictures noised, masks made."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlx_transfusion import sequence, trigflow
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.torch.attention import block_mask, dense_mask
from mlx_transfusion.torch.model import TrainArrays
from mlx_transfusion.torch.patches import patchify
from mlx_transfusion.training.data import Batch


class Example(NamedTuple):
    """One part of a step: the model's input and what its outputs are compared with."""

    arrays: TrainArrays
    target: Tensor  # float32 [M, N, P]
    image_weight: Tensor  # float32 [M], 0 for a clean picture and for one that only fills up
    text_target: Tensor  # int64 [K]
    text_weight: Tensor  # float32 [K]


def move(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on the device; int32 becomes int64, which PyTorch indexes with."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.to(device, torch.int64 if tensor.dtype == torch.int32 else None)


def encode(pixels: Tensor, config: ModelConfig) -> Tensor:
    """Pixels uint8, or latents float32, [M, H, W, C] -> patches [M, N, P] with unit standard deviation."""
    x = pixels.float() / 255 * 2 - 1 if pixels.dtype == torch.uint8 else pixels
    mean = torch.tensor(config.image_mean, device=pixels.device)
    return patchify((x - mean) / config.image_std, config.patch_size)


def to_example(batch: Batch, config: ModelConfig, device: torch.device, flex: bool = False) -> Example:
    """Noise the pictures before they are cut (arXiv 2408.11039, 3.2) and move everything to the device.

    flex: with a block mask for FlexAttention instead of a dense one. A batch without pictures gets one that nobody
    sees and no loss counts: every process of a sharded model has to give every weight a gradient.
    """
    packed, pixels, noise, angle = batch.packed, batch.pixels, batch.noise, batch.angle
    # A clean picture, angle 0, is context or fills up the batch: it is not learned.
    patch_index, weight = packed.patch_index, (angle > 0).astype(np.float32)
    if not len(angle):
        pixels, noise = (np.zeros((1, *a.shape[1:]), a.dtype) for a in (pixels, noise))
        angle, weight = np.zeros(1, np.float32), np.zeros(1, np.float32)
        patch_index = np.zeros(config.patches_per_image, np.int32)

    def put(array: np.ndarray) -> Tensor:
        return move(array, device)

    x0 = encode(put(pixels), config)
    z, angles = patchify(put(noise), config.patch_size), put(angle)
    a = angles[:, None, None]
    make_mask = block_mask if flex else dense_mask
    arrays = TrainArrays(
        ids=put(packed.ids),
        is_image=put((packed.modality == sequence.IMAGE)[..., None]),
        patch_row=put(packed.patch_row),
        patch_index=put(patch_index),
        text_index=put(packed.text_index),
        mask=make_mask(put(packed.document), put(packed.image), config.bidirectional),
        patches=trigflow.mix(x0, z, a),
        angle=angles,
    )
    target = z if config.prediction == "epsilon" else trigflow.velocity_target(x0, z, a)
    return Example(arrays, target, put(weight), put(packed.text_target), put(packed.text_weight))
