"""Weights of their own for the tokens of a picture that is being painted.

They see text, and finished pictures, through the keys and values of the other weights, as modality-specific
transformers do (Mixture-of-Transformers, arXiv 2411.04996; LMFusion, arXiv 2412.15188). So they can be trained while
everything the model reads and writes stays bit for bit what it was.
"""

from __future__ import annotations

import mlx.nn as nn

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.models.layers import Block
from mlx_transfusion.models.patches import AngleEmbedding, PatchDecoder, PatchEncoder


class Painter(nn.Module):
    """The parts of a model that a noisy picture passes, named as in the model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.angle_embedding = AngleEmbedding(config, config.guidance_condition)
        self.patch_encoder = PatchEncoder(config)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.patch_decoder = PatchDecoder(config)
