"""The autoencoder of Wan 2.1 (arXiv 2503.20314) for single pictures.

It is made for films: its convolutions see a frame and the two before it. A picture is one frame behind two of zeros,
so of every kernel only the last time step meets anything but zeros, and it is that 2-D kernel which is applied here.
The kernels are kept whole, as they are stored. The convolutions between frames, in the halvings and doublings, do
not touch a single frame and are left out.
Shapes: B pictures of H x W pixels; h = H / factor, w = W / factor; C latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.config import check_positive
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.convolution import Conv2d, conv2d
from mlx_transfusion.models.gates import silu


@dataclass(frozen=True)
class WanConfig:
    """Sizes, and the statistics of the latents; the names are the original's."""

    dim: int
    z_dim: int
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2

    def __post_init__(self) -> None:
        check_positive(self, "autoencoder config", ("dim", "z_dim", "num_res_blocks"))
        if len(self.dim_mult) < 2 or min(self.dim_mult) < 1:
            raise UserError(
                f"autoencoder config: dim_mult is {self.dim_mult}, expected 2 or more whole numbers"
            )
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise UserError(
                    f"autoencoder config: {name} has {len(getattr(self, name))} values, expected z_dim ({self.z_dim})"
                )
        if not min(self.latent_std) > 0:
            raise UserError("autoencoder config: latent_std holds a number that is not positive")

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent element."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def encoder_stages(self) -> list[tuple[int, int]]:
        """Channels before and behind the residual blocks of each size, from the full one down."""
        widths = [self.dim * m for m in (1, *self.dim_mult)]
        return list(pairwise(widths))

    @property
    def decoder_stages(self) -> list[tuple[int, int]]:
        """The same up to the full size; each doubling has halved the channels before."""
        mult = self.dim_mult[::-1]
        widths = [self.dim * m for m in (mult[0], *mult)]
        return [(a // 2 if i else a, b) for i, (a, b) in enumerate(pairwise(widths))]


class FrameConv(nn.Module):
    """A causal convolution over frames, on a single one: of its kernel [O, time, height, width, I] the last time."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        bound = (inputs * kernel**3) ** -0.5
        self.weight = mx.random.uniform(-bound, bound, (outputs, kernel, kernel, kernel, inputs))
        self.bias = mx.zeros((outputs,))
        self._padding = kernel // 2

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, inputs] -> [B, H, W, outputs]."""
        return conv2d(x, self.weight[:, -1], padding=self._padding) + self.bias


class ChannelNorm(nn.Module):
    """Divided by the length over channels, times their root, times a learned gain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = mx.ones((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        """[..., C] -> [..., C]."""
        length = mx.sqrt(mx.square(x).sum(-1, keepdims=True))
        return x / mx.maximum(length, 1e-12) * (x.shape[-1] ** 0.5 * self.gamma)


class Residual(nn.Module):
    """Two convolutions, each behind a norm, with a shortcut around them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(inputs), FrameConv(inputs, outputs, 3)
        self.norm2, self.conv2 = ChannelNorm(outputs), FrameConv(outputs, outputs, 3)
        if inputs != outputs:
            self.shortcut = FrameConv(inputs, outputs, 1)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, inputs] -> [B, H, W, outputs]."""
        h = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return h + (self.shortcut(x) if "shortcut" in self else x)


class Attend(nn.Module):
    """One head of attention over the whole picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, C] -> [B, H, W, C]."""
        b, h, w, c = x.shape
        q, k, v = mx.split(self.to_qkv(self.norm(x)).reshape(b, 1, h * w, 3 * c), 3, -1)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=c**-0.5)
        return x + self.proj(out.reshape(b, h, w, c))


class Halve(nn.Module):
    """A convolution of stride 2 on a picture with a row and a column of zeros more, right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, C] -> [B, H/2, W/2, C]."""
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Double(nn.Module):
    """Every element four times, and a convolution that halves the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels // 2, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, C] -> [B, 2H, 2W, C/2]."""
        return self.conv(mx.repeat(mx.repeat(x, 2, 1), 2, 2))


def _stages(
    stages: Sequence[tuple[int, int]], blocks: int, between: type[Halve] | type[Double]
) -> list[nn.Module]:
    """Residual blocks of each size, and what leads to the next."""
    out: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(stages):
        out += [Residual(outputs if j else inputs, outputs) for j in range(blocks)]
        out += [between(outputs)] if i < len(stages) - 1 else []
    return out


class Coder(nn.Module):
    """One direction: a first convolution, the middle before or behind the stages, and a last one behind a norm."""

    def __init__(
        self, first: tuple[int, int], stages: list[nn.Module], middle: int, last: tuple[int, int]
    ) -> None:
        super().__init__()
        self.conv1 = FrameConv(*first, 3)
        self.stages = stages
        self.middle = [Residual(middle, middle), Attend(middle), Residual(middle, middle)]
        self.norm = ChannelNorm(last[0])
        self.conv2 = FrameConv(*last, 3)

    def run(self, x: mx.array, middle_first: bool) -> mx.array:
        """[B, H, W, first[0]] -> [B, H', W', last[1]]."""
        layers = [*self.middle, *self.stages] if middle_first else [*self.stages, *self.middle]
        x = self.conv1(x)
        for layer in layers:
            x = layer(x)
        return self.conv2(silu(self.norm(x)))


class WanVAE(nn.Module):
    """Pictures to latents and back."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self._config = config
        z, n = config.z_dim, config.num_res_blocks
        down, up = config.encoder_stages, config.decoder_stages
        low, high = down[-1][1], up[-1][1]
        self.encoder = Coder((3, config.dim), _stages(down, n, Halve), low, (low, 2 * z))
        self.decoder = Coder((z, low), _stages(up, n + 1, Double), low, (high, 3))
        self.conv1 = FrameConv(2 * z, 2 * z, 1)
        self.conv2 = FrameConv(z, z, 1)

    @property
    def config(self) -> WanConfig:
        """The configuration it was built from."""
        return self._config

    def encode(self, pixels: mx.array) -> tuple[mx.array, mx.array]:
        """Pixels [B, H, W, 3] in [-1, 1] -> normalised mean and logarithm of the variance, [B, h, w, C] each.

        A latent is drawn as mean + exp(logvar / 2) noise: the original normalises the mean alone.
        Raises UserError for a size that the halvings do not divide.
        """
        factor = self.config.factor
        if any(side % factor for side in pixels.shape[1:3]):
            raise UserError(
                f"pictures of {pixels.shape[2]}x{pixels.shape[1]} pixels: expected multiples of {factor}"
            )
        x = self.encoder.run(pixels.astype(self.conv1.bias.dtype), middle_first=False)
        mean, logvar = mx.split(self.conv1(x), 2, -1)
        return (mean - mx.array(self.config.latent_mean)) / mx.array(self.config.latent_std), logvar

    def decode(self, z: mx.array) -> mx.array:
        """Normalised latents [B, h, w, C] -> pixels [B, H, W, 3], clipped to [-1, 1]."""
        z = z * mx.array(self.config.latent_std) + mx.array(self.config.latent_mean)
        x = self.conv2(z.astype(self.conv1.bias.dtype))
        return mx.clip(self.decoder.run(x, middle_first=True), -1, 1)
