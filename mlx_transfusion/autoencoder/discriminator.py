"""The adversary of the autoencoder's training: is this region of a picture real? (arXiv 1611.07004, 2012.09841)

Groups of channels are normalised within each picture, not over the batch as in the papers: nothing to store, and a
verdict does not depend on what else is in the batch.
"""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.models.convolution import Conv2d

SLOPE = 0.2
MAX_WIDENING = 8
GROUPS = 8


class Discriminator(nn.Module):
    """Strided convolutions down to one number for each region."""

    def __init__(self, inputs: int, channels: int, layers: int) -> None:
        """channels: a multiple of 8, of the first layer. layers: halvings."""
        super().__init__()
        widths = [min(2**i, MAX_WIDENING) * channels for i in range(layers + 1)]
        self.conv_in = Conv2d(inputs, widths[0], 4, stride=2, padding=1)
        pairs = list(pairwise(widths))
        self.convs = [
            Conv2d(a, b, 4, stride=2 if i < layers - 1 else 1, padding=1) for i, (a, b) in enumerate(pairs)
        ]
        self.norms = [nn.GroupNorm(GROUPS, b, pytorch_compatible=True) for _, b in pairs]
        self.conv_out = Conv2d(widths[-1], 1, 4, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, inputs] -> verdicts [B, h, w, 1]: above zero means real."""
        x = nn.leaky_relu(self.conv_in(x), SLOPE)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nn.leaky_relu(norm(conv(x)), SLOPE)
        return self.conv_out(x)


def hinge_loss(real: mx.array, fake: mx.array) -> mx.array:
    """The adversary's loss from verdicts on real and on decoded pictures (arXiv 1705.02894): one number."""
    return 0.5 * (mx.maximum(1 - real, 0).mean() + mx.maximum(1 + fake, 0).mean())
