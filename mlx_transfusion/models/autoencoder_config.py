"""Configuration of the autoencoders: the fields of diffusers' config.json that change the graph or the latents."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mlx_transfusion.config import check_positive, from_dict
from mlx_transfusion.errors import UserError

MODEL_TYPE = "autoencoder_kl"
FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu", "swish"),
}
"""Keys of diffusers that must have one of these values where they stand."""
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
"""The one kind of block that every entry of these lists must name."""
IGNORED = ("force_upcast",)
"""Keys of diffusers that say nothing about the numbers (ours are computed in the precision of the weights); so do
those that begin with an underscore."""


@dataclass(frozen=True)
class QuantizerConfig:
    """What makes a VQ-VAE of the graph (arXiv 1711.00937)."""

    codes: int = 512
    """Vectors in the codebook, 16,384 in the paper; each has `latent_channels` numbers."""

    def __post_init__(self) -> None:
        if self.codes < 2:
            raise UserError(f"autoencoder config: quantizer.codes is {self.codes}, expected 2 or more")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Names and defaults are diffusers'; the defaults of the latents' scale are Stable Diffusion's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    """Channels at full size and after each halving."""
    stem_channels: int | None = None
    """Behind the encoder's first convolution; None means those of the full size (diffusers has no others)."""
    layers_per_block: int = 1
    """Residual blocks of a size in the encoder; the decoder has one more."""
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    """A 1x1 convolution behind the encoder."""
    use_post_quant_conv: bool = True
    """A 1x1 convolution before the decoder."""
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    """A generator sees (z - shift_factor) * scaling_factor, of about unit variance."""
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    """One number for each channel, in the place of shift_factor, and under scaling_factor."""
    sample_size: int = 32
    """Longer side of the pictures it was trained on; any multiple of `factor` can be encoded."""
    quantizer: QuantizerConfig | None = None
    """A codebook in the place of the normal distribution: VQ, where None is KL."""
    model_type: str = MODEL_TYPE

    def __post_init__(self) -> None:
        check_positive(
            self, "autoencoder config",
            ("in_channels", "out_channels", "latent_channels", "layers_per_block",
             "norm_num_groups", "scaling_factor"),
        )  # fmt: skip
        if self.model_type != MODEL_TYPE:
            raise UserError(f'autoencoder config: model_type is "{self.model_type}", expected "{MODEL_TYPE}"')
        if not self.block_out_channels:
            raise UserError(
                "autoencoder config: block_out_channels is empty, expected a number for each size"
            )
        for channels in self.block_out_channels:
            if channels <= 0 or channels % self.norm_num_groups:
                raise UserError(
                    f"autoencoder config: block_out_channels has {channels}, expected multiples of "
                    f"norm_num_groups ({self.norm_num_groups})"
                )
        if self.stem <= 0 or self.stem % self.norm_num_groups:
            raise UserError(
                f"autoencoder config: stem_channels is {self.stem}, expected a multiple of norm_num_groups "
                f"({self.norm_num_groups})"
            )
        self._check_statistics()

    def _check_statistics(self) -> None:
        if (self.latents_mean is None) != (self.latents_std is None):
            raise UserError("autoencoder config: latents_mean and latents_std stand together or not at all")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.latent_channels:
                raise UserError(
                    f"autoencoder config: {name} has {len(values)} values, expected one for each of the "
                    f"{self.latent_channels} latent channels"
                )
        if self.latents_std is not None and not min(self.latents_std) > 0:
            raise UserError("autoencoder config: latents_std holds a number that is not positive")

    @property
    def stem(self) -> int:
        """Channels behind the encoder's first convolution."""
        return self.block_out_channels[0] if self.stem_channels is None else self.stem_channels

    @property
    def encoder_channels(self) -> int:
        """What the encoder gives for each latent element: mean and log-variance, or the vector to quantise."""
        return self.latent_channels * (2 if self.quantizer is None else 1)

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent element: 2 for each halving."""
        return 2 ** (len(self.block_out_channels) - 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config.json") -> AutoencoderConfig:
        """Read our own config.json strictly. Raises UserError for unknown keys, wrong types and sizes."""
        return from_dict(cls, _sizes(data), where)

    @classmethod
    def from_diffusers(cls, data: dict[str, Any], where: str = "config.json") -> AutoencoderConfig:
        """Read diffusers' config.json. Raises UserError for blocks or activations that the graph does not have.

        Keys that change no number are passed over; any other unknown key is an error.
        """
        for key, allowed in FIXED.items():
            if key in data and data[key] not in allowed:
                raise UserError(f'{where}: {key} is {data[key]!r}, and only "{allowed[0]}" can be converted')
        for key, block in BLOCKS.items():
            kinds = data.get(key, [block])
            if any(kind != block for kind in kinds):
                raise UserError(f'{where}: {key} is {kinds}, and only "{block}" can be converted')
        passed = {*FIXED, *BLOCKS, *IGNORED}
        fields = {k: v for k, v in data.items() if k not in passed and not k.startswith("_")}
        return from_dict(cls, _sizes(fields), where)


def _sizes(data: dict[str, Any]) -> dict[str, Any]:
    """`sample_size` of diffusers is one number or two: the larger."""
    size = data.get("sample_size") if isinstance(data, dict) else None
    if isinstance(size, (list, tuple)) and size and all(isinstance(n, int) for n in size):
        return data | {"sample_size": max(size)}
    return data
