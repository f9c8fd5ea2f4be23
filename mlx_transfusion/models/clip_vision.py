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

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's pictures, channel by channel, pixels in [0, 1]."""


@dataclass(frozen=True)
class ClipVisionConfig:
    """Sizes of the vision transformer."""

    image_size: int
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    """Of the checkpoint, whose last layer is not kept."""
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float = 1e-5
    image_mean: tuple[float, float, float] = MEAN
    image_std: tuple[float, float, float] = STD

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "hidden_size", "num_attention_heads", "intermediate_size",
                     "layer_norm_eps"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise UserError(f"vision config: {name} is {getattr(self, name)}, expected a positive number")
        if self.num_hidden_layers < 2:
            raise UserError(
                "vision config: num_hidden_layers must be 2 or more, for features before the last one"
            )
        if self.hidden_size % self.num_attention_heads or self.image_size % self.patch_size:
            raise UserError(
                f"vision config: hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}, and image_size {self.image_size} of patch_size {self.patch_size}"
            )

    @property
    def patches(self) -> int:
        """Number of patches N."""
        return (self.image_size // self.patch_size) ** 2


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
        self.layers = [ClipBlock(config) for _ in range(config.num_hidden_layers - 1)]

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


class ClipBlock(nn.Module):
    """Attention of all tokens to all, and a feed-forward layer, each behind its norm."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(d, eps)
        self.self_attn = ClipAttention(d, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(d, eps)
        self.mlp = ClipMLP(d, config.intermediate_size)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipAttention(nn.Module):
    """Attention of all to all, with biases."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.q_proj = nn.Linear(d, d)
        self.k_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d)
        self.out_proj = nn.Linear(d, d)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, T, D] -> [B, T, D]."""
        b, t, d = x.shape
        q, k, v = (
            project(x).reshape(b, t, self._heads, -1).transpose(0, 2, 1, 3)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(b, t, d))


class ClipMLP(nn.Module):
    """Two layers with CLIP's quick GELU, x sigmoid(1.702 x), between them."""

    def __init__(self, d: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, inner)
        self.fc2 = nn.Linear(inner, d)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, T, D] -> [B, T, D]."""
        x = self.fc1(x)
        return self.fc2(x * mx.sigmoid(1.702 * x))
