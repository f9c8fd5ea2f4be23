"""Floating-point operations of a training step, counted from the config and the real mask.

A product of [a, b] and [b, c] is 2abc operations; norms, activations and the optimiser are left out, as is usual.
Attention counts the pairs that the mask lets through, not T*T. A backward pass is twice its forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.models.discrete_config import DiscreteConfig
from mlx_transfusion.sequence import PackedBatch


@dataclass(frozen=True)
class Work:
    """What a step computes on, over all of its rows."""

    positions: int
    pairs: int
    """Pairs of a query and a key it may look at."""
    text_targets: int
    """Positions whose next token is predicted."""
    pictures: int


def work_of(packed: PackedBatch, dense: bool = False, bidirectional: bool = True) -> Work:
    """The work that a packed batch's documents need. bidirectional: as `ModelConfig.bidirectional`.

    dense: all that is computed, padding too, by an attention that does not skip what the mask hides.
    """
    pictures = len(np.unique(packed.image[packed.image >= 0]))
    if dense:
        rows, length = packed.ids.shape
        return Work(packed.ids.size, rows * length**2, len(packed.text_index), pictures)
    return Work(packed.tokens, visible_pairs(packed, bidirectional), int(packed.text_weight.sum()), pictures)


def visible_pairs(packed: PackedBatch, bidirectional: bool = True) -> int:
    """Pairs of positions that the mask lets through, without padding: counted by runs, not on a T*T array."""
    row = np.arange(len(packed.ids))[:, None]
    documents = (packed.document + row * (packed.document.max() + 1))[packed.document >= 0]
    lengths = np.unique(documents, return_counts=True)[1]
    pairs = (lengths * (lengths + 1) // 2).sum()
    if bidirectional:
        patches = np.unique(packed.image[packed.image >= 0], return_counts=True)[1]
        pairs += (patches * (patches - 1) // 2).sum()
    return int(pairs)


def document_pairs(length: int, patches: int = 0) -> int:
    """Visible pairs of a document of `length` positions, `patches` of them one picture: causal, and all inside it."""
    return length * (length + 1) // 2 + patches * (patches - 1) // 2


def forward_flops(config: ModelConfig | DiscreteConfig, work: Work) -> float:
    """Operations of one forward pass."""
    c = config
    d, f, e = c.hidden_size, c.intermediate_size, c.head_dim
    projections = 2 * d * e * c.num_attention_heads + 2 * d * e * c.kv_heads
    layer = 2 * work.positions * (projections + 3 * d * f) + 4 * work.pairs * e * c.num_attention_heads
    head = 2 * work.text_targets * d * c.vocab_size
    return c.num_hidden_layers * layer + head + work.pictures * picture_flops(c)


def step_flops(config: ModelConfig | DiscreteConfig, work: Work) -> float:
    """Operations of forward and backward, without recomputation: what MFU counts."""
    return 3 * forward_flops(config, work)


def picture_flops(config: ModelConfig | DiscreteConfig) -> float:
    """Operations of one picture outside the decoder, forward.

    Of Transfusion: angle embedding, patch encoder and patch decoder. Of a discrete model: the head over its codes,
    each of which is predicted. The autoencoder of either has worked before the run.
    """
    c, d, n = config, config.hidden_size, config.patches_per_image
    if isinstance(c, DiscreteConfig):
        return 2 * n * d * c.vocab_size
    angle = 2 * d * (2 * c.time_frequencies + d)
    skip = 2 * d * c.patch_dim if c.patch_skip else 0
    if c.patch_encoder == "linear":
        return angle + skip + 4 * n * d * c.patch_dim
    return angle + skip + _unet_flops(c)


def _unet_flops(config: ModelConfig) -> float:
    """Both halves of the U-Net (`unet.py`), convolutions and linear layers."""
    c, d, n = config, config.hidden_size, config.patches_per_image
    area, features = c.image_height * c.image_width, 4 * c.unet_channels
    channels = [c.unet_channels * 2**i for i in range(c.patch_size.bit_length())]

    def block(inputs: int, outputs: int, size: int) -> int:
        shortcut = inputs * outputs if inputs != outputs else 0
        return 2 * size * (9 * outputs * (inputs + outputs) + shortcut) + 4 * features * outputs

    total = (
        4 * d * features + 18 * area * c.image_channels * channels[0] * 2
    )  # time_proj, conv_in and conv_out
    total += 2 * n * d * (channels[-1] + channels[-1])  # proj_out of one half, proj_in of the other
    for i, width in enumerate(channels):
        size = area >> 2 * i
        before = channels[max(0, i - 1)]
        total += block(before, width, size) + (c.unet_blocks - 1) * block(width, width, size)
        total += c.unet_blocks * block(2 * width, width, size)
        if i < len(channels) - 1:
            total += 18 * (size >> 2) * width * width  # the halving
            total += 18 * size * channels[i + 1] * width  # the doubling of the way up
    return total
