"""LPIPS, how different two pictures look (arXiv 1801.03924, version 0.1): VGG16 or AlexNet, channels weighted.

The features behind five ReLUs are brought to unit length over the channels; squared differences, weighted by channel,
are averaged over places and summed over the five. Weights are the user's (the package `lpips` has them); `convert`
reads its state dict. Shapes: B pictures, H x W places, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.convolution import Conv2d

MODEL_TYPE = "lpips"
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""Mean and deviation of ImageNet's pixels, for pixels in [-1, 1]."""
EPS = 1e-10


class Layer(NamedTuple):
    """One convolution, and its place in torchvision's list of layers."""

    place: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


class Trunk(NamedTuple):
    """Five groups of convolutions; a pooling by the maximum stands before some of them."""

    groups: tuple[tuple[Layer, ...], ...]
    pooled: tuple[int, ...]
    """The groups behind a pooling."""
    window: int
    """Of the pooling, whose stride is 2."""


TRUNKS = {
    "vgg": Trunk(
        (
            (Layer(0, 64), Layer(2, 64)),
            (Layer(5, 128), Layer(7, 128)),
            (Layer(10, 256), Layer(12, 256), Layer(14, 256)),
            (Layer(17, 512), Layer(19, 512), Layer(21, 512)),
            (Layer(24, 512), Layer(26, 512), Layer(28, 512)),
        ),
        (1, 2, 3, 4),
        2,
    ),
    "alex": Trunk(
        (
            (Layer(0, 64, 11, 4, 2),),
            (Layer(3, 192, 5, 1, 2),),
            (Layer(6, 384),),
            (Layer(8, 256),),
            (Layer(10, 256),),
        ),
        (1, 2),
        3,
    ),
}


@dataclass(frozen=True)
class LPIPSConfig:
    """Which trunk."""

    network: str
    model_type: str = MODEL_TYPE

    def __post_init__(self) -> None:
        if self.model_type != MODEL_TYPE:
            raise UserError(f'LPIPS: model_type is "{self.model_type}", expected "{MODEL_TYPE}"')
        if self.network not in TRUNKS:
            raise UserError(f'LPIPS: network is "{self.network}", expected one of {", ".join(TRUNKS)}')

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config.json") -> LPIPSConfig:
        """Read that strictly. Raises UserError for unknown keys."""
        return from_dict(cls, data, where)


class LPIPS(nn.Module):
    """The distance of pictures."""

    def __init__(self, config: LPIPSConfig) -> None:
        super().__init__()
        self._trunk = TRUNKS[config.network]
        inputs, self.groups = 3, []
        for group in self._trunk.groups:
            layers = []
            for _, outputs, kernel, stride, padding in group:
                layers.append(Conv2d(inputs, outputs, kernel, stride, padding))
                inputs = outputs
            self.groups.append(layers)
        self.lins = [mx.zeros((1, group[-1].outputs, 1, 1)) for group in self._trunk.groups]

    def __call__(self, x: mx.array, y: mx.array) -> mx.array:
        """Pictures [B, H, W, 3] in [-1, 1] -> distances [B]; y is the goal and gets no gradient."""
        total = mx.zeros((len(x),))
        for a, b, weight in zip(self._features(x), self._features(y), self.lins, strict=True):
            difference = (_unit(a) - mx.stop_gradient(_unit(b))).square()
            total = total + (difference @ weight.reshape(-1, 1)).mean((1, 2, 3))
        return total

    def _features(self, x: mx.array) -> Iterator[mx.array]:
        """[B, h, w, C] behind each group."""
        x = (x - mx.array(SHIFT)) / mx.array(SCALE)
        for i, group in enumerate(self.groups):
            if i in self._trunk.pooled:
                x = nn.MaxPool2d(self._trunk.window, 2)(x)
            for layer in group:
                x = nn.relu(layer(x))
            yield x


def _unit(x: mx.array) -> mx.array:
    return x / (mx.sqrt(x.square().sum(-1, keepdims=True) + EPS**2) + EPS)
