"""Blocks of the KL autoencoder: residual blocks, halving, doubling, attention (as VQGAN, arXiv 2012.09841).

Parameter names are diffusers'. Two operations see the whole picture: group normalisation, by its mean and variance,
and attention, by its keys and values. Blocks ask a `Scope` for both, so that a tile of a large picture can be given
those of the whole one (autoencoder_tiles.py). Everything else is local.
Shapes: B pictures, H x W elements, channels last.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.models.convolution import Conv2d
from mlx_transfusion.models.gates import silu

NORM_EPS = 1e-6


class Scope:
    """What normalisation and attention see: the arrays they are given."""

    def normalize(self, norm: nn.GroupNorm, x: mx.array) -> mx.array:
        """x [B, H, W, C] normalised in the groups of `norm`."""
        return norm(x)

    def attend(self, layer: Attention, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Queries, keys and values [B, H, W, C] -> [B, H, W, C]: one head of the whole width."""
        return attention(q, k.reshape(k.shape[0], -1, k.shape[-1]), v.reshape(v.shape[0], -1, v.shape[-1]))


WHOLE = Scope()


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Queries [B, H, W, C], keys and values [B, N, C] -> [B, H, W, C]."""
    b, _, _, c = q.shape
    out = mx.fast.scaled_dot_product_attention(q.reshape(b, 1, -1, c), k[:, None], v[:, None], scale=c**-0.5)
    return out.reshape(q.shape)


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    """Groups of neighbouring channels, as PyTorch has them."""
    return nn.GroupNorm(groups, channels, eps=NORM_EPS, pytorch_compatible=True)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(groups, inputs)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = group_norm(groups, outputs)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.conv_shortcut = Conv2d(inputs, outputs, 1)

    def __call__(self, x: mx.array, scope: Scope = WHOLE) -> mx.array:
        """[B, H, W, inputs] -> [B, H, W, outputs]."""
        h = self.conv1(silu(scope.normalize(self.norm1, x)))
        h = self.conv2(silu(scope.normalize(self.norm2, h)))
        return h + (self.conv_shortcut(x) if "conv_shortcut" in self else x)


class Attention(nn.Module):
    """Every element looks at every other: one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = group_norm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = [nn.Linear(channels, channels)]

    def __call__(self, x: mx.array, scope: Scope = WHOLE) -> mx.array:
        """[B, H, W, C] -> [B, H, W, C]."""
        h = scope.normalize(self.group_norm, x)
        return x + self.to_out[0](scope.attend(self, self.to_q(h), self.to_k(h), self.to_v(h)))


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int, attends: bool) -> None:
        super().__init__()
        self.resnets = [ResnetBlock(channels, channels, groups) for _ in range(2)]
        if attends:
            self.attentions = [Attention(channels, groups)]

    def __call__(self, x: mx.array, scope: Scope = WHOLE) -> mx.array:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.resnets[0](x, scope)
        if "attentions" in self:
            x = self.attentions[0](x, scope)
        return self.resnets[1](x, scope)


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, C] -> [B, H/2, W/2, C]. Zeros stand below and right of the picture only, as in training."""
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, C] -> [B, 2H, 2W, C]."""
        b, h, w, c = x.shape
        doubled = mx.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
        return self.conv(doubled.reshape(b, 2 * h, 2 * w, c))


class DownBlock(nn.Module):
    """Residual blocks of one size, and the halving behind them unless it is the smallest."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, halves: bool) -> None:
        super().__init__()
        self.resnets = [ResnetBlock(outputs if i else inputs, outputs, groups) for i in range(layers)]
        if halves:
            self.downsamplers = [Downsample(outputs)]

    def __call__(self, x: mx.array, scope: Scope = WHOLE) -> mx.array:
        """[B, H, W, inputs] -> [B, H/2, W/2, outputs], or full size."""
        for resnet in self.resnets:
            x = resnet(x, scope)
        return self.downsamplers[0](x) if "downsamplers" in self else x


class UpBlock(nn.Module):
    """Residual blocks of one size, and the doubling behind them unless it is the full one."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, doubles: bool) -> None:
        super().__init__()
        self.resnets = [ResnetBlock(outputs if i else inputs, outputs, groups) for i in range(layers)]
        if doubles:
            self.upsamplers = [Upsample(outputs)]

    def __call__(self, x: mx.array, scope: Scope = WHOLE) -> mx.array:
        """[B, H, W, inputs] -> [B, 2H, 2W, outputs], or the size it has."""
        for resnet in self.resnets:
            x = resnet(x, scope)
        return self.upsamplers[0](x) if "upsamplers" in self else x
