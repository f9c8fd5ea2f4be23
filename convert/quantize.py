"""Quantising while converting: which matrices, how, and what is stored of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.errors import UserError
from mlx_transfusion.quantization import AFFINE, quantization_table

from .table import Plan, Precision, Shape

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
GROUP_SIZE = 64
MODES: dict[str, dict[str, Any]] = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
}
"""Microscaling formats, whose group size is part of the format."""
HIGHER = {2: 4, 3: 5, 4: 6, 5: 8, 6: 8, 8: 8}
"""Bits of embeddings and heads where the rest gets so many."""


@dataclass(frozen=True)
class Options:
    """How the new weights are stored."""

    quantize: str | None = None
    """Bits ("4"), or a name of MODES; None stores every tensor whole."""
    group_size: int = GROUP_SIZE
    """Of the affine matrices; mxfp4 has its own."""
    dtype: mx.Dtype | None = None
    """Of whole tensors and of scales; None keeps each as it is, bit for bit."""

    def __post_init__(self) -> None:
        """Raises UserError for bits or a group size that mlx lacks."""
        known = (*map(str, AFFINE_BITS), *MODES)
        if self.quantize is not None and self.quantize not in known:
            raise UserError(f'cannot quantise to "{self.quantize}": expected one of {", ".join(known)}')
        if self.group_size not in GROUP_SIZES:
            raise UserError(
                f"cannot quantise in groups of {self.group_size}: expected {', '.join(map(str, GROUP_SIZES))}"
            )

    def setting(self, precision: Precision) -> dict[str, Any] | None:
        """{"group_size", "bits"} and perhaps "mode" of a matrix; None leaves it whole."""
        if self.quantize is None or precision is Precision.WHOLE:
            return None
        if self.quantize in MODES:
            low = MODES[self.quantize]
            if precision is Precision.LOW:
                return dict(low)
            return {"group_size": self.group_size, "bits": HIGHER[low["bits"]]}
        bits = int(self.quantize)
        return {"group_size": self.group_size, "bits": bits if precision is Precision.LOW else HIGHER[bits]}

    def table(self, settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """config.json's table "quantization" of these matrices."""
        return quantization_table(settings)


def settings_of(model: nn.Module, plan: Plan, options: Options) -> dict[str, dict[str, Any]]:
    """How each matrix of `model` that is quantised is, by the path of its module.

    A matrix whose rows do not divide into groups stays whole. Raises UserError for a checkpoint whose matrices are
    quantised already.
    """
    if options.quantize is None:
        return {}
    if plan.quantization is not None:
        raise UserError(
            f"{plan.family}: these weights are quantised already: leave out --quantize to keep them as they are"
        )
    out: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        if not hasattr(module, "to_quantized"):
            continue
        setting = options.setting(plan.precision(path))
        if setting is not None and module.weight.shape[-1] % setting["group_size"] == 0:
            out[path] = setting
    return out


def stored_parts(shape: Shape, dtype: mx.Dtype, setting: dict[str, Any]) -> list[tuple[str, Shape, mx.Dtype]]:
    """(name, shape, dtype) of what `quantized` gives for a matrix [rows, columns]."""
    rows, columns = shape
    grid = rows, columns // setting["group_size"]
    packed: list[tuple[str, Shape, mx.Dtype]] = [
        ("weight", (rows, columns * setting["bits"] // 32), mx.uint32)
    ]
    if setting.get("mode", AFFINE) != AFFINE:
        return [*packed, ("scales", grid, mx.uint8)]
    return [*packed, ("scales", grid, dtype), ("biases", grid, dtype)]


def quantized(matrix: mx.array, setting: dict[str, Any]) -> list[mx.array]:
    """Packed numbers, scales and (of affine ones) biases of a matrix."""
    return list(mx.quantize(matrix, setting["group_size"], setting["bits"], mode=setting.get("mode", AFFINE)))
