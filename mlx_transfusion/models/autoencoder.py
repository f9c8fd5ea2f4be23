"""The KL autoencoder: pictures to small latents and back (arXiv 2112.10752; the paper's own, arXiv 2408.11039, 3.3).

One graph for all public layouts: Stable Diffusion and SDXL (4 channels), FLUX (16 channels, a shift, no 1x1
convolutions around the latents), the paper's 8 channels. It is configured by diffusers' config.json, and parameter
names are diffusers'. Pixels lie in [-1, 1]. Two spaces of latents: z, as the encoder gives and the decoder takes
them, and the normalised ones, of about unit variance, that a generator works on (`normalize`, `denormalize`).
Shapes: B pictures of H x W pixels; h = H / factor, w = W / factor; C latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.autoencoder_config import AutoencoderConfig
from mlx_transfusion.models.autoencoder_parts import WHOLE, DownBlock, MidBlock, Scope, UpBlock, group_norm
from mlx_transfusion.models.convolution import Conv2d
from mlx_transfusion.models.gates import silu

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0


class Moments(NamedTuple):
    """The normal distribution that a picture is encoded to."""

    mean: mx.array
    """[B, h, w, C]."""
    logvar: mx.array
    """[B, h, w, C], within [-30, 20]."""

    @property
    def std(self) -> mx.array:
        """Standard deviations [B, h, w, C]."""
        return mx.exp(0.5 * self.logvar)

    def sample(self, noise: mx.array) -> mx.array:
        """mean + std * noise, for unit normal noise [B, h, w, C] (of noise.py, so that a seed addresses it)."""
        return self.mean + self.std * noise

    def kl(self) -> mx.array:
        """Divergence [B] from the unit normal distribution in nats, summed over the latent."""
        terms = self.mean.square() + mx.exp(self.logvar) - 1 - self.logvar
        return 0.5 * terms.sum((1, 2, 3))


class Autoencoder(nn.Module):
    """Encoder, decoder and the scale of the latents: what the kinds of latents share."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self._config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = Conv2d(config.encoder_channels, config.encoder_channels, 1)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv2d(channels, channels, 1)

    @property
    def config(self) -> AutoencoderConfig:
        """The configuration it was built from."""
        return self._config

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent element."""
        return self.config.factor

    def latents(self, pixels: mx.array) -> mx.array:
        """Pixels [B, H, W, 3] in [-1, 1] -> what `decode` takes for them, z [B, h, w, C]. Raises as `encoded`."""
        raise NotImplementedError

    def encoded(self, pixels: mx.array, scope: Scope = WHOLE) -> mx.array:
        """Pixels [B, H, W, 3] in [-1, 1] -> the encoder's numbers [B, h, w, encoder_channels].

        Raises UserError for a size that the halvings do not divide, and for another number of channels.
        """
        self.check_pixels(pixels.shape)
        h = self.encoder(pixels.astype(self._dtype), scope)
        return self.quant_conv(h) if "quant_conv" in self else h

    def decode(self, z: mx.array, scope: Scope = WHOLE) -> mx.array:
        """Latents z [B, h, w, C], not normalised -> pixels [B, H, W, 3], about [-1, 1] and not clipped.

        Raises UserError for latents of another number of channels.
        """
        self.check_latents(z.shape)
        z = z.astype(self._dtype)
        if "post_quant_conv" in self:
            z = self.post_quant_conv(z)
        return self.decoder(z, scope)

    def normalize(self, z: mx.array) -> mx.array:
        """Latents of the encoder -> those of about unit variance that a generator works on."""
        shift, scale = self._shift_and_scale()
        return (z - shift) * scale

    def denormalize(self, z: mx.array) -> mx.array:
        """The way back: a generator's latents -> those that `decode` takes."""
        shift, scale = self._shift_and_scale()
        return z / scale + shift

    def _shift_and_scale(self) -> tuple[mx.array | float, mx.array | float]:
        c = self.config
        if c.latents_mean is not None and c.latents_std is not None:
            return mx.array(c.latents_mean), c.scaling_factor / mx.array(c.latents_std)
        return c.shift_factor or 0.0, c.scaling_factor

    def check_pixels(self, shape: Sequence[int]) -> None:
        """Raises UserError unless `encode` takes pictures of that shape."""
        c = self.config
        if len(shape) != 4 or shape[-1] != c.in_channels:
            raise UserError(
                f"pictures of shape {list(shape)}: this autoencoder takes [B, H, W, {c.in_channels}]"
            )
        _, height, width, _ = shape
        if height % c.factor or width % c.factor or not height * width:
            raise UserError(
                f"pictures of {width}x{height} pixels: this autoencoder takes multiples of {c.factor}: crop or "
                "resize them"
            )

    def check_latents(self, shape: Sequence[int]) -> None:
        """Raises UserError unless `decode` takes latents of that shape."""
        channels = self.config.latent_channels
        if len(shape) != 4 or shape[-1] != channels:
            raise UserError(
                f"latents of shape {list(shape)}: this autoencoder takes [B, h, w, {channels}]: use the "
                "autoencoder that they were made with"
            )

    @property
    def _dtype(self) -> mx.Dtype:
        return self.encoder.conv_in.weight.dtype


class AutoencoderKL(Autoencoder):
    """Each picture is encoded to a normal distribution."""

    def encode(self, pixels: mx.array, scope: Scope = WHOLE) -> Moments:
        """Pixels [B, H, W, 3] in [-1, 1] -> moments [B, h, w, C], not normalised. Raises as `encoded`."""
        mean, logvar = mx.split(self.encoded(pixels, scope), 2, -1)
        return Moments(mean, mx.clip(logvar, MIN_LOGVAR, MAX_LOGVAR))

    def latents(self, pixels: mx.array) -> mx.array:
        """The means."""
        return self.encode(pixels).mean


class Encoder(nn.Module):
    """Pixels to the latents' numbers, before the 1x1 convolution behind them."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, config.stem, 3, padding=1)
        self.down_blocks = [
            DownBlock(inputs, outputs, config.layers_per_block, groups, halves=i < len(channels) - 1)
            for i, (inputs, outputs) in enumerate(zip([config.stem, *channels], channels, strict=False))
        ]
        self.mid_block = MidBlock(channels[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = group_norm(groups, channels[-1])
        self.conv_out = Conv2d(channels[-1], config.encoder_channels, 3, padding=1)

    def __call__(self, x: mx.array, scope: Scope = WHOLE) -> mx.array:
        """[B, H, W, 3] -> [B, h, w, encoder_channels]."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x, scope)
        x = self.mid_block(x, scope)
        return self.conv_out(silu(scope.normalize(self.conv_norm_out, x)))


class Decoder(nn.Module):
    """Latents to pixels, behind the 1x1 convolution before it."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups, config.mid_block_add_attention)
        self.up_blocks = [
            UpBlock(inputs, outputs, config.layers_per_block + 1, groups, doubles=i < len(channels) - 1)
            for i, (inputs, outputs) in enumerate(zip([channels[0], *channels], channels, strict=False))
        ]
        self.conv_norm_out = group_norm(groups, channels[-1])
        self.conv_out = Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def __call__(self, z: mx.array, scope: Scope = WHOLE) -> mx.array:
        """[B, h, w, C] -> [B, H, W, 3]."""
        x = self.mid_block(self.conv_in(z), scope)
        for block in self.up_blocks:
            x = block(x, scope)
        return self.conv_out(silu(scope.normalize(self.conv_norm_out, x)))


__all__ = ["Autoencoder", "AutoencoderConfig", "AutoencoderKL", "Decoder", "Encoder", "Moments"]
