"""What vision transformers share: sizes, the encoder layer as Hugging Face names it, GELUs with all derivatives.

Queries, keys and values have matrices of their own here. With the tanh form of GELU it is the layer of SigLIP (arXiv
2303.15343) in BAGEL and Show-o2, with the quick form that of CLIP (siglip.py holds SigLIP as timm stores it).
Shapes: B pictures, N patches, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.config import check_positive
from mlx_transfusion.errors import UserError

_POSITIVE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
Activation = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a stack of encoder layers."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    """Those that are run; both systems leave the last one of their checkpoint's config out."""
    num_attention_heads: int
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_positive(self, "vision config", _POSITIVE)
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"vision config: hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )


@dataclass(frozen=True)
class SquareVisionConfig:
    """Sizes of a vision transformer that reads square pictures of one size."""

    image_size: int
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_positive(self, "vision config", ("image_size", "patch_size", *_POSITIVE))
        if self.hidden_size % self.num_attention_heads or self.image_size % self.patch_size:
            raise UserError(
                f"vision config: hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}, and image_size {self.image_size} of patch_size {self.patch_size}"
            )

    @property
    def patches(self) -> int:
        """Number of patches N."""
        return (self.image_size // self.patch_size) ** 2


class VisionLayer(nn.Module):
    """Attention and a feed-forward layer, each behind its norm."""

    def __init__(self, config: VisionConfig | SquareVisionConfig, activation: Activation) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(d, eps)
        self.self_attn = VisionAttention(d, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(d, eps)
        self.mlp = VisionMLP(d, config.intermediate_size, activation)

    def __call__(self, x: mx.array, mask: str | None = None) -> mx.array:
        """[B, N, D] -> [B, N, D]. mask: "causal" for CLIP's texts; None lets all tokens see all."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class VisionAttention(nn.Module):
    """Multi-head attention with biases."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.q_proj = nn.Linear(d, d)
        self.k_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d)
        self.out_proj = nn.Linear(d, d)

    def __call__(self, x: mx.array, mask: str | None = None) -> mx.array:
        """[B, N, D] -> [B, N, D]; mask as of `VisionLayer`."""
        b, n, d = x.shape
        q, k, v = (
            project(x).reshape(b, n, self._heads, -1).transpose(0, 2, 1, 3)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(b, n, d))


class VisionMLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, d: int, inner: int, activation: Activation) -> None:
        super().__init__()
        self._activation = activation
        self.fc1 = nn.Linear(d, inner)
        self.fc2 = nn.Linear(inner, d)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, N, D] -> [B, N, D]."""
        return self.fc2(self._activation(self.fc1(x)))


def gelu_tanh(x: mx.array) -> mx.array:
    """GELU by its tanh formula. Not mlx's own, which is compiled: that has no gradient inside a forward-mode pass."""
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def gelu_quick(x: mx.array) -> mx.array:
    """CLIP's approximation of GELU, x sigmoid(1.702 x)."""
    return x * mx.sigmoid(1.702 * x)


def gelu_erf(x: mx.array) -> mx.array:
    """The exact GELU x Phi(x); for the same reason not mlx's own."""
    return 0.5 * x * (1 + mx.erf(x * math.sqrt(0.5)))
