"""The U-Net patch encoder and decoder in PyTorch: the twins of `models/unet.py`, with its parameter names.

Kernels are stored as MLX stores them, [O, kh, kw, C]. Seen as [O, C, kh, kw] that is PyTorch's channels-last layout,
which is the fast one on tensor cores: both are true without moving a number.
Shapes: B pictures, H x W elements, C channels, N patches, D the transformer's width, E the angle's features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_transfusion.config import ModelConfig

Skips = tuple[Tensor, ...]
"""Outputs of the encoder's residual blocks in their order, [B, height, width, channels] each."""

MAX_GROUPS = 32
MIN_GROUP_CHANNELS = 4


def levels(config: ModelConfig) -> list[int]:
    """Channels at full size and after each halving; the last level is the grid of patches."""
    return [config.unet_channels * 2**i for i in range(int(math.log2(config.patch_size)) + 1)]


def pixel_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """x over its root mean square along the last axis (arXiv 2410.11081, 4.1)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class Conv2d(nn.Module):
    """Zero-padded convolution of pictures [B, H, W, C] with a kernel [O, kh, kw, C]."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, kernel, kernel, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, inputs] -> [B, H', W', outputs]."""
        x, weight = x.permute(0, 3, 1, 2), self.weight.permute(0, 3, 1, 2)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding).permute(0, 2, 3, 1)


class GroupNorm(nn.Module):
    """Up to 32 groups of at least 4 neighbouring channels, over the last axis of [B, H, W, C]."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.groups = math.gcd(MAX_GROUPS, channels // MIN_GROUP_CHANNELS)
        self.weight = nn.Parameter(torch.empty(channels)) if affine else None
        self.bias = nn.Parameter(torch.empty(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = x.permute(0, 3, 1, 2).contiguous()  # its derivative in forward mode takes no other layout
        return F.group_norm(x, self.groups, self.weight, self.bias).permute(0, 2, 3, 1)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them; the angle enters between them."""

    def __init__(self, inputs: int, outputs: int, features: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(inputs)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(features, 2 * outputs)
        self.norm2 = GroupNorm(outputs, affine=False)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """[B, height, width, inputs] and the angle's features [B, E] -> [B, height, width, outputs]."""
        h = self.conv1(F.silu(self.norm1(x)))
        gain, shift = self.time_emb_proj(features)[:, None, None].chunk(2, -1)
        h = self.norm2(h) * pixel_norm(gain) + pixel_norm(shift)
        h = self.conv2(F.silu(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class DownBlock(nn.Module):
    """The residual blocks of one level on the way down, and the halving behind them unless it is the last."""

    def __init__(self, inputs: int, outputs: int, blocks: int, features: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(outputs if i else inputs, outputs, features) for i in range(blocks)
        )
        self.downsample = None if last else Conv2d(outputs, outputs, 3, stride=2, padding=1)

    def forward(self, x: Tensor, features: Tensor) -> tuple[Tensor, Skips]:
        """[B, height, width, inputs] -> what the next level reads, and the outputs of the residual blocks."""
        skips: Skips = ()
        for resnet in self.resnets:
            x = resnet(x, features)
            skips += (x,)
        return (x if self.downsample is None else self.downsample(x)), skips


class UpBlock(nn.Module):
    """The residual blocks of one level on the way up, each with its skip, and the doubling unless it is full size."""

    def __init__(self, channels: int, outputs: int, blocks: int, features: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(2 * channels, channels, features) for _ in range(blocks))
        self.upsample = Conv2d(channels, outputs, 3, padding=1) if outputs != channels else None

    def forward(self, x: Tensor, features: Tensor, skips: Skips) -> Tensor:
        """[B, height, width, channels] and the level's skips in the encoder's order -> what the next level reads."""
        for resnet, skip in zip(self.resnets, reversed(skips), strict=True):
            x = resnet(torch.cat([x, skip], -1), features)
        if self.upsample is None:
            return x
        return self.upsample(x.repeat_interleave(2, 1).repeat_interleave(2, 2))


class UNetDown(nn.Module):
    """Noisy pictures to one vector a patch: strided convolutions down to the grid of patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = levels(config)
        features = 4 * config.unet_channels
        self.time_proj = nn.Linear(config.hidden_size, features)
        self.conv_in = Conv2d(config.image_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(inputs, outputs, config.unet_blocks, features, last=i == len(channels) - 1)
            for i, (inputs, outputs) in enumerate(zip([channels[0], *channels], channels, strict=False))
        )
        self.norm_out = GroupNorm(channels[-1])
        self.proj_out = nn.Linear(channels[-1], config.hidden_size)

    def forward(self, images: Tensor, angle: Tensor) -> tuple[Tensor, Skips]:
        """Noisy pictures [B, H, W, C] and their angle embedding [B, D] -> token vectors [B, N, D], and the skips."""
        features = _features(self.time_proj, angle)
        x = self.conv_in(images.to(self.conv_in.weight.dtype))
        skips: Skips = ()
        for block in self.down_blocks:
            x, new = block(x, features)
            skips += new
        return self.proj_out(self.norm_out(x)).flatten(1, 2), skips


class UNetUp(nn.Module):
    """The transformer's hidden states back to pictures, beside the skips of `UNetDown`. Starts at zero."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = levels(config)[::-1]
        features = 4 * config.unet_channels
        self.grid = config.image_height // config.patch_size, config.image_width // config.patch_size
        self.blocks = config.unet_blocks
        self.time_proj = nn.Linear(config.hidden_size, features)
        self.proj_in = nn.Linear(config.hidden_size, channels[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(inputs, outputs, config.unet_blocks, features)
            for inputs, outputs in zip(channels, [*channels[1:], channels[-1]], strict=True)
        )
        self.conv_norm_out = GroupNorm(channels[-1])
        self.conv_out = Conv2d(channels[-1], config.image_channels, 3, padding=1)

    def forward(self, hidden: Tensor, angle: Tensor, skips: Skips) -> Tensor:
        """Hidden states [B, N, D], angle embedding [B, D] and the skips of the same pass -> [B, H, W, C]."""
        features = _features(self.time_proj, angle)
        x = self.proj_in(hidden).unflatten(1, self.grid)
        for i, block in enumerate(self.up_blocks):
            end = len(skips) - i * self.blocks
            x = block(x, features, skips[end - self.blocks : end])
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def _features(layer: nn.Linear, angle: Tensor) -> Tensor:
    return F.silu(layer(F.silu(angle).to(layer.weight.dtype)))
