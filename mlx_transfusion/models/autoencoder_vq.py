"""The autoencoder with a codebook, for models that write pictures as words (arXiv 2408.11039, section 4.2).

The graph and its configuration are those of autoencoder.py.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.autoencoder import Autoencoder, AutoencoderConfig, AutoencoderKL
from mlx_transfusion.models.quantizer import Quantized, VectorQuantizer


class AutoencoderVQ(Autoencoder):
    """Each latent element is one of K codes."""

    def __init__(self, config: AutoencoderConfig) -> None:
        """config: with a `quantizer`."""
        super().__init__(config)
        assert config.quantizer is not None
        self.quantizer = VectorQuantizer(config.quantizer.codes, config.latent_channels)

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.quantizer.size

    def quantize(self, pixels: mx.array) -> tuple[mx.array, Quantized]:
        """Pixels [B, H, W, 3] in [-1, 1] -> elements [B, h, w, C] as the encoder gives them, and quantised."""
        z = self.encoded(pixels)
        return z, self.quantizer(z)

    def latents(self, pixels: mx.array) -> mx.array:
        """The vectors of the nearest codes."""
        return self.quantizer.vectors(self.quantizer.codes(self.encoded(pixels)))

    def vectors(self, codes: mx.array) -> mx.array:
        """Codes int [B, h, w] -> what `decode` takes for them, z [B, h, w, C].

        Raises UserError for another number of axes, and for codes that the codebook does not have.
        """
        if codes.ndim != 3:
            raise UserError(f"codes of shape {list(codes.shape)}: this autoencoder takes [B, h, w]")
        low, high = (int(np.array(end)) for end in (codes.min(), codes.max()))
        if not 0 <= low <= high < self.codebook_size:
            raise UserError(
                f"codes from {low} to {high}: this codebook has {self.codebook_size}: use the autoencoder that they "
                "were made with"
            )
        return self.quantizer.vectors(codes)

    def encode_codes(self, pixels: mx.array) -> mx.array:
        """Pixels [B, H, W, 3] in [0, 1] -> codes int32 [B, h, w]. Raises as `encoded`."""
        return self.quantizer.codes(self.encoded(pixels * 2 - 1))

    def decode_codes(self, codes: mx.array) -> mx.array:
        """Codes int [B, h, w] -> pixels [B, H, W, 3], clipped to [0, 1]. Raises as `vectors`."""
        return mx.clip((self.decode(self.vectors(codes)) + 1) / 2, 0, 1)


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL | AutoencoderVQ:
    """The kind that a config describes, with fresh weights."""
    return AutoencoderKL(config) if config.quantizer is None else AutoencoderVQ(config)
