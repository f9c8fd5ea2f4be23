"""The U-Net patch encoder and decoder: pictures down to one vector a patch, and back up with the way down in view.

The paper (arXiv 2408.11039, section 3.3) says only that they are made of the up and down blocks of Nichol & Dhariwal
(arXiv 2102.09672) and Saharia et al. (arXiv 2205.11487) and hold 0.27 billion parameters; what stands here:

- a level for full size and one for every halving down to the grid of patches, log2(patch_size) of them; channels
  double from level to level; `unet_blocks` residual blocks a level on either side; no attention, which is the
  transformer's work;
- each residual block of the way down hands its output to the block of the way up that mirrors it (`Skips`);
- the angle steers every residual block by the double normalisation of consistency models (arXiv 2410.11081,
  section 4.1) instead of AdaGN, whose unbounded gain is what made their training diverge.

640 channels and two blocks give 0.268 billion at the paper's 7B width and 2x2 patches of 32x32x8 latents (0.244 to
0.252 at its smaller widths). Larger patches have more levels: half as many channels for each keep about that size.
Everything has a derivative in forward mode. Parameter names follow Hugging Face's diffusers.
Shapes: B pictures, H x W elements, C their channels, h x w patches, N = h w, D the transformer's width, E the
width of the angle's features.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.models.convolution import Conv2d
from mlx_transfusion.models.gates import silu

Skips = tuple[mx.array, ...]
"""Outputs of the encoder's residual blocks in their order, [B, height, width, channels] each.

They depend on the noisy picture and the angle like everything else in a pass, so they belong into the same function
that is differentiated; they are no part of what a cache may keep.
"""

MAX_GROUPS = 32
MIN_GROUP_CHANNELS = 4


def levels(config: ModelConfig) -> list[int]:
    """Channels at full size and after each halving; the last level is the grid of patches."""
    return [config.unet_channels * 2**i for i in range(int(math.log2(config.patch_size)) + 1)]


def pixel_norm(x: mx.array, eps: float = 1e-5) -> mx.array:
    """x over its root mean square along the last axis: a gain or shift that cannot grow (arXiv 2410.11081, 4.1)."""
    return x * mx.rsqrt(x.square().mean(-1, keepdims=True) + eps)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them; the angle enters between them. Starts as the shortcut."""

    def __init__(self, inputs: int, outputs: int, features: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(inputs)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(features, 2 * outputs)
        # Gains around one; shifts have the plain layer's values, since they are normalised and must not be zero.
        self.time_emb_proj.bias = self.time_emb_proj.bias + (mx.arange(2 * outputs) < outputs)
        # Private, for a module without parameters would leave an empty place in the tree of them.
        self._norm2 = _group_norm(outputs, affine=False)
        self.conv2 = _zero_conv(outputs, outputs)
        if inputs != outputs:
            self.conv_shortcut = Conv2d(inputs, outputs, 1)

    def __call__(self, x: mx.array, features: mx.array) -> mx.array:
        """[B, height, width, inputs] and the angle's features [B, E] -> [B, height, width, outputs].

        Between the convolutions h becomes norm(h) pnorm(gain) + pnorm(shift), of equal size for every angle.
        """
        h = self.conv1(silu(self.norm1(x)))
        gain, shift = mx.split(self.time_emb_proj(features)[:, None, None], 2, -1)
        h = self._norm2(h) * pixel_norm(gain) + pixel_norm(shift)
        h = self.conv2(silu(h))
        return h + (self.conv_shortcut(x) if "conv_shortcut" in self else x)


class DownBlock(nn.Module):
    """The residual blocks of one level on the way down, and the halving behind them unless it is the last."""

    def __init__(self, inputs: int, outputs: int, blocks: int, features: int, last: bool) -> None:
        super().__init__()
        self.resnets = [ResnetBlock(outputs if i else inputs, outputs, features) for i in range(blocks)]
        if not last:
            self.downsample = Conv2d(outputs, outputs, 3, stride=2, padding=1)

    def __call__(self, x: mx.array, features: mx.array) -> tuple[mx.array, Skips]:
        """[B, height, width, inputs] -> what the next level reads, and the outputs of the residual blocks."""
        skips = []
        for resnet in self.resnets:
            x = resnet(x, features)
            skips.append(x)
        return self.downsample(x) if "downsample" in self else x, tuple(skips)


class UpBlock(nn.Module):
    """The residual blocks of one level on the way up, each with its skip, and the doubling unless it is full size."""

    def __init__(self, channels: int, outputs: int, blocks: int, features: int) -> None:
        super().__init__()
        self.resnets = [ResnetBlock(2 * channels, channels, features) for _ in range(blocks)]
        if outputs != channels:
            self.upsample = Conv2d(channels, outputs, 3, padding=1)

    def __call__(self, x: mx.array, features: mx.array, skips: Skips) -> mx.array:
        """[B, height, width, channels] and the level's skips in the encoder's order -> what the next level reads."""
        for resnet, skip in zip(self.resnets, reversed(skips), strict=True):
            x = resnet(mx.concatenate([x, skip], -1), features)
        return self.upsample(_double(x)) if "upsample" in self else x


class UNetDown(nn.Module):
    """Noisy pictures to one vector a patch: strided convolutions down to the grid of patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = levels(config)
        features = 4 * config.unet_channels
        self.time_proj = nn.Linear(config.hidden_size, features)
        self.conv_in = Conv2d(config.image_channels, channels[0], 3, padding=1)
        self.down_blocks = [
            DownBlock(inputs, outputs, config.unet_blocks, features, last=i == len(channels) - 1)
            for i, (inputs, outputs) in enumerate(zip([channels[0], *channels], channels, strict=False))
        ]
        self.norm_out = _group_norm(channels[-1])
        self.proj_out = nn.Linear(channels[-1], config.hidden_size)

    def __call__(self, images: mx.array, angle: mx.array) -> tuple[mx.array, Skips]:
        """Noisy pictures [B, H, W, C] and their angle embedding [B, D] -> token vectors [B, N, D], and the skips."""
        features = silu(self.time_proj(silu(angle)))
        x = self.conv_in(images)
        skips: Skips = ()
        for block in self.down_blocks:
            x, new = block(x, features)
            skips += new
        tokens = self.proj_out(self.norm_out(x))
        return tokens.reshape(x.shape[0], -1, tokens.shape[-1]), skips


class UNetUp(nn.Module):
    """The transformer's hidden states back to pictures, beside the skips of `UNetDown`. Starts at zero."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = levels(config)[::-1]
        features = 4 * config.unet_channels
        self._blocks = config.unet_blocks
        self.time_proj = nn.Linear(config.hidden_size, features)
        self.proj_in = nn.Linear(config.hidden_size, channels[0])
        self.up_blocks = [
            UpBlock(inputs, outputs, config.unet_blocks, features)
            for inputs, outputs in zip(channels, [*channels[1:], channels[-1]], strict=True)
        ]
        self.conv_norm_out = _group_norm(channels[-1])
        self.conv_out = _zero_conv(channels[-1], config.image_channels)

    def __call__(self, hidden: mx.array, angle: mx.array, skips: Skips) -> mx.array:
        """Hidden states [B, N, D], angle embedding [B, D] and the skips of the same pass -> [B, H, W, C]."""
        features = silu(self.time_proj(silu(angle)))
        x = self.proj_in(hidden)
        x = x.reshape(x.shape[0], *skips[-1].shape[1:3], x.shape[-1])  # the last level is the grid of patches
        for i, block in enumerate(self.up_blocks):
            end = len(skips) - i * self._blocks
            x = block(x, features, skips[end - self._blocks : end])
        return self.conv_out(silu(self.conv_norm_out(x)))


def _group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    """Up to 32 groups of at least 4 neighbouring channels (PyTorch's grouping); narrow levels have fewer groups."""
    groups = math.gcd(MAX_GROUPS, channels // MIN_GROUP_CHANNELS)
    return nn.GroupNorm(groups, channels, affine=affine, pytorch_compatible=True)


def _zero_conv(inputs: int, outputs: int) -> Conv2d:
    layer = Conv2d(inputs, outputs, 3, padding=1)
    layer.weight = mx.zeros_like(layer.weight)
    return layer


def _double(x: mx.array) -> mx.array:
    """[B, height, width, C] -> [B, 2 height, 2 width, C], every element four times."""
    b, h, w, c = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)
