"""JanusFlow's picture encoder and decoder (arXiv 2411.07975, section 3.2): ConvNeXt blocks steered by the time.

The encoder cuts a noisy latent into patches by a strided convolution and refines the grid of them; the decoder reads
what the language model made of them beside the encoder's own output (the skip past the transformer) and puts the
patches back. Blocks are those of ConvNeXt V2 (arXiv 2301.00808) with RMSNorm. Parameter names are the official ones.
Everything has a derivative in forward mode.
Shapes: B pictures, H x W latent elements of L channels, h x w patches of p x p, C channels of the encoder, D width of
the language model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.config import check_positive
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.convolution import Conv2d
from mlx_transfusion.models.gates import silu
from mlx_transfusion.models.vision_layers import gelu_erf

WIDENING = 4
"""Hidden channels of a block for each of its own."""
MAX_PERIOD = 10000.0
"""Of the sinusoids of the time."""


@dataclass(frozen=True)
class ConvNextConfig:
    """Sizes of encoder and decoder."""

    latent_channels: int
    latent_size: int
    """Height and width of the latent picture in elements."""
    patch_size: int
    channels: int
    blocks: int
    """Blocks in the encoder, and as many in the decoder at twice the channels."""
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_positive(
            self, "painting config",
            ("latent_channels", "latent_size", "patch_size", "channels", "blocks", "norm_eps"),
        )  # fmt: skip
        if self.latent_size % self.patch_size or self.channels % 2:
            raise UserError(
                f"painting config: latent_size {self.latent_size} must be a multiple of patch_size "
                f"{self.patch_size}, and channels {self.channels} even"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of the picture."""
        return self.latent_size // self.patch_size


class PictureEncoder(nn.Module):
    """Noisy latents and their time -> the grid of patch features, and the time as a vector."""

    def __init__(self, config: ConvNextConfig, width: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(config.channels, width)
        self.in_conv = Conv2d(config.latent_channels, config.channels, config.patch_size, config.patch_size)
        self.mid_block = MidBlock(config.channels, config, width)

    def __call__(self, z: mx.array, timesteps: mx.array) -> tuple[mx.array, mx.array]:
        """z [B, H, W, L], timesteps [B] from 0 (noise) to 1000 (data) -> grid [B, h, w, C], time [B, D]."""
        time = self.time_embed(timesteps).astype(z.dtype)
        return self.mid_block(self.in_conv(z), time), time


class PictureDecoder(nn.Module):
    """Features of the language model and of the encoder -> one value for every element of the latent."""

    def __init__(self, config: ConvNextConfig, width: int) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.channels, eps=config.norm_eps)
        self.mid_block = MidBlock(2 * config.channels, config, width)
        self.out_convs = [Unpatchify(config)]

    def __call__(self, x: mx.array, skip: mx.array, time: mx.array) -> mx.array:
        """x and the encoder's grid [B, h, w, C], time [B, D] -> [B, H, W, L]. The skip is not normalised."""
        x = self.mid_block(mx.concatenate([self.input_norm(x), skip], -1), time)
        return self.out_convs[0](x)


class TimeEmbedding(nn.Module):
    """A time in [0, 1000] as a vector: cosines and sines, then two linear layers."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)
        half = channels // 2
        self._frequencies = mx.exp(mx.arange(half) * (-math.log(MAX_PERIOD) / half))

    def __call__(self, timesteps: mx.array) -> mx.array:
        """[B] -> [B, D]."""
        waves = self.sinusoid(timesteps).astype(self.linear_2.weight.dtype)
        return self.linear_2(silu(self.linear_1(waves)))

    def sinusoid(self, timesteps: mx.array) -> mx.array:
        """[B] -> [B, channels]: cosines first. Always float32, where 1000 radians are still exact enough."""
        phase = timesteps.astype(mx.float32)[:, None] * self._frequencies
        return mx.concatenate([mx.cos(phase), mx.sin(phase)], -1)


class MidBlock(nn.Module):
    """Blocks of equal width, one behind the other."""

    def __init__(self, channels: int, config: ConvNextConfig, width: int) -> None:
        super().__init__()
        self.res_blocks = [ConvNextBlock(channels, config.norm_eps, width) for _ in range(config.blocks)]

    def __call__(self, x: mx.array, time: mx.array) -> mx.array:
        """[B, h, w, channels] and time [B, D] -> [B, h, w, channels]."""
        for block in self.res_blocks:
            x = block(x, time)
        return x


class ConvNextBlock(nn.Module):
    """Depthwise 7x7 convolution and a wide feed-forward layer around a shortcut, then scale and shift by the time.

    The time steers the sum, so it scales the shortcut too.
    """

    def __init__(self, channels: int, eps: float, width: int) -> None:
        super().__init__()
        self.depthwise = Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.RMSNorm(channels, eps=eps)
        self.channelwise_linear_1 = nn.Linear(channels, WIDENING * channels)
        self.channelwise_norm = GlobalResponseNorm(WIDENING * channels)
        self.channelwise_linear_2 = nn.Linear(WIDENING * channels, channels)
        self.cond_embeds_mapper = nn.Linear(width, 2 * channels)

    def __call__(self, x: mx.array, time: mx.array) -> mx.array:
        """[B, h, w, channels] and time [B, D] -> [B, h, w, channels]."""
        h = gelu_erf(self.channelwise_linear_1(self.norm(self.depthwise(x))))
        x = x + self.channelwise_linear_2(self.channelwise_norm(h))
        scale, shift = mx.split(self.cond_embeds_mapper(silu(time))[:, None, None], 2, -1)
        return x * (1 + scale) + shift


class GlobalResponseNorm(nn.Module):
    """x (w n + 1) + b, where n is a channel's norm over the picture, relative to the mean of all channels.

    ConvNeXt V2 (arXiv 2301.00808), equations 1 to 3, with the 1 + of its implementation as a shortcut.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = mx.zeros((1, 1, 1, channels))
        self.bias = mx.zeros((1, 1, 1, channels))

    def __call__(self, x: mx.array) -> mx.array:
        """[B, h, w, channels] -> [B, h, w, channels]."""
        # Squares of half-precision numbers overflow, and 576 of them lose digits when added.
        norm = mx.sqrt(x.astype(mx.float32).square().sum((1, 2), keepdims=True))
        relative = (norm / (norm.mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)
        return x * (self.weight * relative + 1) + self.bias


class Unpatchify(nn.Module):
    """Norm, one linear map of every patch, and its elements put in their places."""

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__()
        channels, self._patch = 2 * config.channels, config.patch_size
        self.norm = nn.RMSNorm(channels, eps=config.norm_eps)
        self.unpatch_conv = Conv2d(channels, config.latent_channels * config.patch_size**2, 1)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, h, w, 2 C] -> [B, H, W, L]. The elements of a patch run channel, row, column."""
        x = self.unpatch_conv(self.norm(x))
        b, h, w, _ = x.shape
        p = self._patch
        x = x.reshape(b, h, w, -1, p, p).transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(b, h * p, w * p, -1)
