"""SigLIP's vision transformer (arXiv 2303.15343): square pictures to one feature vector a patch.

A plain pre-norm ViT without class token: patches, learned positions, blocks, a final norm. Its pooling head is left
out, since language models read the patches. Parameter names follow timm's VisionTransformer, with one matrix for
queries, keys and values.
Shapes: B pictures of S x S pixels, N patches in raster order, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.models.vision_layers import SquareVisionConfig, VisionMLP


@dataclass(frozen=True)
class SiglipConfig(SquareVisionConfig):
    """Sizes of the vision transformer."""


class Siglip(nn.Module):
    """Normalised pictures to features of their patches."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = 0.02 * mx.random.normal((1, config.patches, config.hidden_size))
        self.blocks = [SiglipBlock(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Pixels [B, S, S, 3] in [-1, 1] -> features [B, N, D], behind the final norm."""
        x = self.patch_embed(pixels) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PatchEmbed(nn.Module):
    """One linear map of every patch, stored as the convolution that it is."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        """[B, S, S, 3] -> [B, N, D]."""
        x = self.proj(pixels)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class SiglipBlock(nn.Module):
    """Attention of all patches to all, and a feed-forward layer, each behind its norm."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = SiglipAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size, nn.gelu)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SiglipAttention(nn.Module):
    """Multi-head attention without a mask; rows of `qkv` run [query, key, value][head][dimension]."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self._heads = config.num_attention_heads
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, N, D] -> [B, N, D]."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self._heads, -1).transpose(2, 0, 3, 1, 4)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return self.proj(out.transpose(0, 2, 1, 3).reshape(b, n, d))
