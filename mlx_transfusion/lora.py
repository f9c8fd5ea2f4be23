"""A model stored as its difference from another one of the same shape: an adapter, a fraction of its size.

    W' = W + scale * A B        A [m, r], B [r, n]: the difference of a matrix [m, n] from r of its directions

Files, arrays and keys have the names that mlx-lm's adapters have, or ComfyUI's where mlx-lm has none (`diff`). In
`adapters.safetensors`, all float16:

NAME.lora_a, NAME.lora_b   of a linear layer NAME: [inputs, r] and [r, outputs], y = x W^T + scale (x A) B;
                           of an embedding or another matrix NAME: [rows, r] and [r, columns]; a convolution is a
                           matrix of its outputs and all the rest
NAME.diff, NAME.diff_b     the whole difference of NAME's weight and bias: of vectors, and of a matrix so small that
                           its factors would not be smaller

`adapter_config.json` is an `AdapterConfig`. Parameters that it lists as unchanged have no array at all. With float16
an adapter of rank r has 2 bytes for each of min(r (m + n), m n) numbers of a matrix and n of a vector.

That is what `lora_extract` writes. A fine-tuned adapter (finetune/) lists its linear layers as `keys` instead: those
have NAME.lora_a and NAME.lora_b whatever their size, float32, and nothing else differs from the base. With
fine_tune_type "dora" they also have NAME.m [outputs], the length of each row of the new matrix (arXiv 2402.09353):

    W' = m (W + scale * (A B)^T) / |W + scale * (A B)^T|
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import check_shapes, read_json, read_safetensors
from mlx_transfusion.model_path import ADAPTER_CONFIG, is_adapter, resolve_beside

ADAPTER_FILE = "adapters.safetensors"
METHODS = ("lora", "dora")

Shape = tuple[int, ...]


class Part(NamedTuple):
    """How the difference of one parameter is stored."""

    arrays: dict[str, Shape]
    """`.lora_a` and `.lora_b`, or one with the whole difference: names and shapes."""
    shape: Shape
    """Of the parameter."""
    transposed: bool
    """Whether A B is the transpose of the difference, as for linear layers."""


@dataclass(frozen=True)
class LoraParameters:
    """The table of mlx-lm's name."""

    rank: int
    scale: float = 1.0
    keys: tuple[str, ...] | None = None
    """The linear layers of a fine-tuned adapter, by their whole names; None is every parameter of the model."""


@dataclass(frozen=True)
class AdapterConfig:
    """adapter_config.json. The first three names are mlx-lm's."""

    model: str
    """The base: a bundled name, "org/name" of the hub, or a folder, relative to the adapter's own."""
    lora_parameters: LoraParameters
    model_fingerprint: str
    """Of the base's weights (`model_io.Loaded.fingerprint`)."""
    fine_tune_type: str = METHODS[0]
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of config.json that differ from the base's: what the network predicts, for one."""
    unchanged: tuple[str, ...] = ()
    """Parameters that are those of the base."""
    objective: dict[str, Any] | None = None
    """The table of config.json (objective.py)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for adapter_config.json; without `keys` where there are none."""
        data = asdict(self)
        if self.lora_parameters.keys is None:
            del data["lora_parameters"]["keys"]
        return data


def read_adapter_config(path: Path) -> AdapterConfig:
    """adapter_config.json of a folder. Raises UserError for what is missing, unknown or out of range in it."""
    file = path / ADAPTER_CONFIG
    config = from_dict(AdapterConfig, read_json(file), str(file))
    if config.fine_tune_type not in METHODS:
        raise UserError(
            f'{file}: fine_tune_type is "{config.fine_tune_type}", expected one of {", ".join(METHODS)}'
        )
    if config.fine_tune_type == "dora" and config.lora_parameters.keys is None:
        raise UserError(f"{file}: lora_parameters.keys is missing: an adapter of type dora names its layers")
    check_rank(config.lora_parameters.rank, f"{file}: lora_parameters.rank")
    if not math.isfinite(config.lora_parameters.scale):
        raise UserError(f"{file}: lora_parameters.scale is {config.lora_parameters.scale}, expected a number")
    return config


def check_rank(rank: int, name: str) -> None:
    """Raises UserError for a rank below 1."""
    if rank < 1:
        raise UserError(f"{name} is {rank}: use at least 1")


def base_folder(path: Path, config: AdapterConfig) -> Path:
    """The folder of the adapter's base. Raises UserError when it is not there or is an adapter itself."""
    try:
        folder = resolve_beside(config.model, path)
    except UserError as error:
        raise UserError(f"{path}: the base of this adapter is not to be had: {error}") from error
    if is_adapter(folder):
        raise UserError(f"{path}: its base {config.model} is an adapter itself: expected a whole model")
    return folder


def adapter_file(path: Path) -> Path:
    """The file with an adapter's arrays. Raises UserError when it is missing."""
    file = path / ADAPTER_FILE
    if not file.is_file():
        raise UserError(f"{path}: the adapter's weights are missing: {ADAPTER_FILE}")
    return file


def read_adapter(path: Path, config: AdapterConfig, base: nn.Module) -> dict[str, mx.array]:
    """The arrays of an adapter for the float model `base`. Raises UserError when they do not fit it."""
    where = f"{path}: the adapter does not fit its base {config.model}"
    if config.lora_parameters.keys is not None:
        arrays = read_safetensors(adapter_file(path))
        check_shapes(trained_shapes(base, config, where), arrays, where)
        return arrays
    parts = layout(base, config.lora_parameters.rank)
    if strange := sorted(set(config.unchanged) - parts.keys()):
        raise UserError(f"{where}: it lists as unchanged what is no parameter: {', '.join(strange)}")
    arrays = read_safetensors(adapter_file(path))
    changed = [part.arrays for name, part in parts.items() if name not in config.unchanged]
    check_shapes({name: shape for shapes in changed for name, shape in shapes.items()}, arrays, where)
    return arrays


def trained_shapes(base: nn.Module, config: AdapterConfig, where: str) -> dict[str, Shape]:
    """Names and shapes of the arrays of an adapter with `keys`. Raises UserError for what is no linear layer."""
    layers, rank = linear_layers(base), config.lora_parameters.rank
    shapes: dict[str, Shape] = {}
    for key in config.lora_parameters.keys or ():
        if key not in layers:
            raise UserError(f"{where}: there is no linear layer {key}")
        outputs, inputs = layers[key].weight.shape
        shapes |= {f"{key}.lora_a": (inputs, rank), f"{key}.lora_b": (rank, outputs)}
        if config.fine_tune_type == "dora":
            shapes[f"{key}.m"] = (outputs,)
    return shapes


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a float model by name."""
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def layout(model: nn.Module, rank: int) -> dict[str, Part]:
    """How the difference of each parameter of a float model is stored at this rank."""
    linear = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = {name: value.shape for name, value in dict(tree_flatten(model.parameters())).items()}
    return {name: _part(name, shape, rank, name in linear) for name, shape in shapes.items()}


def _part(name: str, shape: Shape, rank: int, linear: bool) -> Part:
    matrix = (shape[0], math.prod(shape[1:]))
    layer = name.removesuffix(".weight")
    if len(shape) < 2 or rank * sum(matrix) >= math.prod(shape):
        bias = layer.endswith(".bias")
        return Part({f"{layer.removesuffix('.bias')}.diff{'_b' if bias else ''}": shape}, shape, False)
    rows, columns = reversed(matrix) if linear else matrix
    return Part({f"{layer}.lora_a": (rows, rank), f"{layer}.lora_b": (rank, columns)}, shape, linear)


def factors(difference: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [m, r] and B [r, n] whose product is nearest to a matrix [m, n] (Eckart and Young: its truncated SVD).

    Computed in float64. Either gets the square root of the singular values, which suits float16's range best.
    """
    u, s, v = np.linalg.svd(difference.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]


def pack(difference: np.ndarray, part: Part) -> dict[str, np.ndarray]:
    """The difference of one parameter as the float16 arrays that `layout` gives it."""
    names = list(part.arrays)
    if len(names) == 1:
        return {names[0]: difference.astype(np.float16)}
    rank = part.arrays[names[0]][1]
    matrix = difference.reshape(part.shape[0], -1)
    a, b = factors(matrix.T if part.transposed else matrix, rank)
    return {names[0]: a.astype(np.float16), names[1]: b.astype(np.float16)}


def unpack(arrays: Mapping[str, np.ndarray], part: Part) -> np.ndarray:
    """Inverse of `pack`: the difference of one parameter, float32, without the scale."""
    first, *second = (arrays[name].astype(np.float32) for name in part.arrays)
    if not second:
        return first
    product = first @ second[0]
    return (product.T if part.transposed else product).reshape(part.shape)


def fuse(model: nn.Module, config: AdapterConfig, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The weights of a float model with an adapter (of `read_adapter`) added, by name, each in its own type."""
    weights = dict(tree_flatten(model.parameters()))
    if config.lora_parameters.keys is not None:
        for key in config.lora_parameters.keys:
            old = weights[f"{key}.weight"]
            weights[f"{key}.weight"] = adapted(old, key, config, arrays).astype(old.dtype)
        return weights
    for name, part in layout(model, config.lora_parameters.rank).items():
        if name not in config.unchanged:
            stored = {key: np.array(arrays[key].astype(mx.float32)) for key in part.arrays}
            difference = mx.array(config.lora_parameters.scale * unpack(stored, part))
            old = weights[name]
            weights[name] = (old.astype(mx.float32) + difference).astype(old.dtype)
    return weights


def adapted(weight: mx.array, key: str, config: AdapterConfig, arrays: Mapping[str, mx.array]) -> mx.array:
    """The matrix [outputs, inputs] of the linear layer `key` with a fine-tuned adapter in it, float32."""
    a, b = (arrays[f"{key}.lora_{half}"].astype(mx.float32) for half in "ab")
    new = weight.astype(mx.float32) + config.lora_parameters.scale * (a @ b).T
    if config.fine_tune_type == "dora":
        new = new * (arrays[f"{key}.m"].astype(mx.float32) / mx.linalg.norm(new, axis=1))[:, None]
    return new
