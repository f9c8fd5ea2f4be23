"""What BAGEL reads a picture with: SigLIP's layers on any number of patches, and the way into the decoder.

Shapes: B pictures, N patches, C width of the vision transformer, D width of the decoder.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.models.patches import patchify
from mlx_transfusion.models.vision_layers import VisionConfig, VisionLayer, gelu_tanh


class BagelVision(nn.Module):
    """SigLIP on pictures of any shape: positions come from a square table, by row and column."""

    def __init__(self, config: VisionConfig, patch_size: int, side: int) -> None:
        super().__init__()
        d = config.hidden_size
        self._patch_size = patch_size
        self.patch_embedding = nn.Linear(3 * patch_size**2, d)
        self.position_embedding = nn.Embedding(side**2, d)
        self.layers = [VisionLayer(config, gelu_tanh) for _ in range(config.num_hidden_layers)]
        self.post_layernorm = nn.LayerNorm(d, config.layer_norm_eps)

    def __call__(self, pixels: mx.array, places: mx.array) -> mx.array:
        """Pixels [B, H, W, 3] in [-1, 1] whose patches stand at `places` [N] of the table -> features [B, N, C]."""
        x = self.patch_embedding(patchify(pixels, self._patch_size)) + self.position_embedding(places)
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)


class Connector(nn.Module):
    """Features of the vision transformer in the decoder's width."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, width)
        self.fc2 = nn.Linear(width, width)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, N, C] -> [B, N, D]."""
        return self.fc2(gelu_tanh(self.fc1(x)))
