"""InceptionV3 as the Frechet inception distance uses it: 2048 features of a picture (arXiv 1512.00567, 1706.08500).

The network behind FID is TensorFlow's of December 2015, not torchvision's: its average pools leave padding out of the
mean, and the last block pools by the maximum. Parameter names are those of torchvision, which its PyTorch port kept.
Shapes: B pictures, H x W places, C channels; convolutions have no bias, a batch norm with its statistics instead.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.config import from_dict
from mlx_transfusion.models.efficientnet import bilinear

MODEL_TYPE = "inception_v3"
SIZE = 299
"""Height and width that pictures are resized to."""
FEATURES = 2048
CLASSES = 1008
"""Of the classifier behind the features, which is not used; torchvision's own weights have 1000."""
EPS = 1e-3


@dataclass(frozen=True)
class InceptionConfig:
    """There is one such network."""

    model_type: str = MODEL_TYPE

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config.json") -> InceptionConfig:
        """Read that strictly. Raises UserError for unknown keys."""
        return from_dict(cls, data, where)


class Step(NamedTuple):
    """One convolution with its batch norm and ReLU."""

    name: str
    outputs: int
    height: int = 1
    width: int = 1
    stride: int = 1
    padded: bool = True
    """Zeros around, so that stride 1 keeps the size."""


Path = tuple[Step | tuple[Step, ...], ...]
"""Steps one behind the other; several in one place read the same and stand side by side."""


class Shape(NamedTuple):
    """A block: paths side by side, and a pool of its input as the last path."""

    paths: tuple[Path, ...]
    pool: str
    """"average" or "maximum" with the step `pooled` behind it, or "half": the maximum at stride 2."""
    pooled: Step | None = None


def _a(pooled: int) -> Shape:
    return Shape(
        (
            (Step("branch1x1", 64),),
            (Step("branch5x5_1", 48), Step("branch5x5_2", 64, 5, 5)),
            (Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, 3, 3), Step("branch3x3dbl_3", 96, 3, 3)),
        ),
        "average",
        Step("branch_pool", pooled),
    )


def _c(inner: int) -> Shape:
    double = ((inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7))
    return Shape(
        (
            (Step("branch1x1", 192),),
            (
                Step("branch7x7_1", inner),
                Step("branch7x7_2", inner, 1, 7),
                Step("branch7x7_3", 192, 7, 1),
            ),
            tuple(Step(f"branch7x7dbl_{i}", *sizes) for i, sizes in enumerate(double, start=1)),
        ),
        "average",
        Step("branch_pool", 192),
    )


def _e(pool: str) -> Shape:
    def fork(name: str) -> tuple[Step, ...]:
        return Step(f"{name}a", 384, 1, 3), Step(f"{name}b", 384, 3, 1)

    return Shape(
        (
            (Step("branch1x1", 320),),
            (Step("branch3x3_1", 384), fork("branch3x3_2")),
            (Step("branch3x3dbl_1", 448), Step("branch3x3dbl_2", 384, 3, 3), fork("branch3x3dbl_3")),
        ),
        pool,
        Step("branch_pool", 192),
    )


STEM: tuple[Step | None, ...] = (
    Step("Conv2d_1a_3x3", 32, 3, 3, 2, False), Step("Conv2d_2a_3x3", 32, 3, 3, 1, False),
    Step("Conv2d_2b_3x3", 64, 3, 3), None, Step("Conv2d_3b_1x1", 80),
    Step("Conv2d_4a_3x3", 192, 3, 3, 1, False), None,
)  # fmt: skip
"""None is a maximum pool at stride 2."""
_HALVING_B = Shape(
    (
        (Step("branch3x3", 384, 3, 3, 2, False),),
        (
            Step("branch3x3dbl_1", 64),
            Step("branch3x3dbl_2", 96, 3, 3),
            Step("branch3x3dbl_3", 96, 3, 3, 2, False),
        ),
    ),
    "half",
)
_HALVING_D = Shape(
    (
        (Step("branch3x3_1", 192), Step("branch3x3_2", 320, 3, 3, 2, False)),
        (Step("branch7x7x3_1", 192), Step("branch7x7x3_2", 192, 1, 7), Step("branch7x7x3_3", 192, 7, 1),
         Step("branch7x7x3_4", 192, 3, 3, 2, False)),
    ),
    "half",
)  # fmt: skip
BLOCKS: dict[str, Shape] = {
    "Mixed_5b": _a(32), "Mixed_5c": _a(64), "Mixed_5d": _a(64), "Mixed_6a": _HALVING_B,
    "Mixed_6b": _c(128), "Mixed_6c": _c(160), "Mixed_6d": _c(160), "Mixed_6e": _c(192),
    "Mixed_7a": _HALVING_D, "Mixed_7b": _e("average"), "Mixed_7c": _e("maximum"),
}  # fmt: skip


class Unit(nn.Module):
    """Convolution, batch norm by stored statistics, ReLU."""

    def __init__(self, inputs: int, step: Step) -> None:
        super().__init__()
        padding = (step.height // 2, step.width // 2) if step.padded else 0
        self.conv = nn.Conv2d(
            inputs, step.outputs, (step.height, step.width), step.stride, padding, bias=False
        )
        self.bn = nn.BatchNorm(step.outputs, EPS)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, inputs] -> [B, H', W', outputs]."""
        return mx.maximum(self.bn(self.conv(x)), 0)


class Block(nn.Module):
    """Paths side by side, their channels one behind the other."""

    def __init__(self, inputs: int, shape: Shape) -> None:
        super().__init__()
        self._shape = shape
        self.outputs = inputs if shape.pooled is None else shape.pooled.outputs
        for path in shape.paths:
            self.outputs += self._add(path, inputs)
        if shape.pooled is not None:
            self._add((shape.pooled,), inputs)

    def _add(self, path: Path, inputs: int) -> int:
        """The path's layers; returns the channels at its end."""
        for place in path:
            steps = side_by_side(place)
            for step in steps:
                self[step.name] = Unit(inputs, step)
            inputs = sum(step.outputs for step in steps)
        return inputs

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, C] -> [B, H', W', outputs]."""
        parts = [self._follow(path, x) for path in self._shape.paths]
        if self._shape.pooled is None:
            return mx.concatenate([*parts, half(x)], -1)
        pooled = average(x) if self._shape.pool == "average" else nn.MaxPool2d(3, 1, 1)(x)
        return mx.concatenate([*parts, self[self._shape.pooled.name](pooled)], -1)

    def _follow(self, path: Path, x: mx.array) -> mx.array:
        for place in path:
            x = mx.concatenate([self[step.name](x) for step in side_by_side(place)], -1)
        return x


class InceptionV3(nn.Module):
    """The network up to the features that FID compares."""

    def __init__(self, config: InceptionConfig | None = None) -> None:
        super().__init__()
        inputs = 3
        for step in STEM:
            if step is not None:
                self[step.name] = Unit(inputs, step)
                inputs = step.outputs
        for name, shape in BLOCKS.items():
            self[name] = Block(inputs, shape)
            inputs = self[name].outputs
        self.eval()

    def __call__(self, pixels: mx.array, size: int = SIZE) -> mx.array:
        """Pixels [B, H, W, 3] in [0, 1] -> float32 [B, 2048]: resized to size x size, then to [-1, 1]."""
        rows, columns = (mx.array(bilinear(n, size)) for n in pixels.shape[1:3])
        x = rows @ pixels.transpose(0, 3, 1, 2) @ columns.T
        x = 2 * x.transpose(0, 2, 3, 1) - 1
        for step in STEM:
            x = half(x) if step is None else self[step.name](x)
        for name in BLOCKS:
            x = self[name](x)
        return x.mean((1, 2))


def side_by_side(place: Step | tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps that read the same."""
    return (place,) if isinstance(place, Step) else place


def half(x: mx.array) -> mx.array:
    """The maximum of 3x3 places at stride 2, without padding."""
    return nn.MaxPool2d(3, 2)(x)


def average(x: mx.array) -> mx.array:
    """The mean of each place and its eight neighbours; at the edge, of those there are."""
    for axis in (1, 2):
        n = x.shape[axis]
        around = mx.pad(x, [(int(i == axis),) * 2 for i in range(4)])
        total = sum((mx.take(around, mx.arange(n) + i, axis) for i in range(3)), mx.array(0.0))
        counts = 3.0 - (mx.arange(n) == 0) - (mx.arange(n) == n - 1)
        x = total / counts.reshape([n if i == axis else 1 for i in range(4)])
    return x
