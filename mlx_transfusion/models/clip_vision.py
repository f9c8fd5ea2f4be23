"""CLIP's vision transformer (arXiv 2103.00020) as language models read it: features of the patches, one block early.

The features are those before the last block, without the class token, as LLaVA takes them: the last block and the
norm behind it serve CLIP's own comparison with texts, and are neither kept nor run. Parameter names follow Hugging
Face's CLIPVisionModel, but for `pre_layrnorm` and for the patches, which are a matrix.
Shapes: B pictures of S x S pixels, N patches in raster order, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.patches import patchify
from mlx_transfusion.models.vision_layers import SquareVisionConfig, VisionLayer, gelu_quick

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's pictures, channel by channel, pixels in [0, 1]."""


@dataclass(frozen=True)
class ClipVisionConfig(SquareVisionConfig):
    """Sizes of the vision transformer; num_hidden_layers counts the checkpoint's last layer, which is not kept."""

    layer_norm_eps: float = 1e-5
    image_mean: tuple[float, float, float] = MEAN
    image_std: tuple[float, float, float] = STD

    def __post_init__(self) -> None:
        if self.num_hidden_layers < 2:
            raise UserError(
                "vision config: num_hidden_layers must be 2 or more, for features before the last one"
            )
        super().__post_init__()


class ClipVision(nn.Module):
    """Pictures to features of their patches."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self._config = config
        d = config.hidden_size
        self.class_embedding = 0.02 * mx.random.normal((d,))
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, d, bias=False)
        self.position_embedding = nn.Embedding(1 + config.patches, d)
        self.pre_layernorm = nn.LayerNorm(d, config.layer_norm_eps)
        self.layers = [VisionLayer(config, gelu_quick) for _ in range(config.num_hidden_layers - 1)]

    def normalise(self, pixels: mx.array) -> mx.array:
        """Pixels [B, S, S, 3] in [0, 1] -> with CLIP's mean and deviation."""
        return (pixels - mx.array(self._config.image_mean)) / mx.array(self._config.image_std)

    def hidden_states(self, pixels: mx.array) -> list[mx.array]:
        """Normalised pixels [B, S, S, 3] -> the input of each block and the last one's output, [B, 1 + N, D] each."""
        x = self.patch_embedding(patchify(pixels, self._config.patch_size))
        first = mx.broadcast_to(self.class_embedding, (x.shape[0], 1, x.shape[-1]))
        x = mx.concatenate([first, x], 1) + self.position_embedding.weight
        states = [self.pre_layernorm(x)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states

    def __call__(self, pixels: mx.array) -> mx.array:
        """Pixels [B, S, S, 3] in [0, 1] -> features [B, N, D]."""
        x = self.normalise(pixels).astype(self.class_embedding.dtype)
        return self.hidden_states(x)[-1][:, 1:]
