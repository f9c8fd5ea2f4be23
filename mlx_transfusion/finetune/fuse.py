"""A model and its adapters as one whole model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_transfusion import quantization
from mlx_transfusion.adapters import PAINTER, load_adapted
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import read_config, read_weights, save_model
from mlx_transfusion.model_path import is_adapter, resolve

TABLES = ("training", "objective", "generation")


def fuse(
    name: str | os.PathLike[str] | None, adapters: Sequence[str], output: Path, dequantize: bool = False
) -> Path:
    """Write the model `name` with `adapters` (`adapters.parse`) into the new folder `output`; returns it.

    A quantised model is quantised again, the same matrices in the same way, unless `dequantize`. Raises UserError
    when there is nothing to do, and as `load_adapted` and `save_model`.
    """
    path = resolve(name)
    stored = {} if is_adapter(path) else read_config(path)[1].get("quantization", {})
    if not adapters and not is_adapter(path) and not (stored and dequantize):
        raise UserError("nothing to fuse: give --adapter DIR, or a --model that is an adapter")
    # float32, as products of half precision are slow where there is no GPU; stored as the base was.
    loaded = load_adapted(name, adapters, dtype=mx.float32)
    model: Any = loaded.model
    if stored and not dequantize:
        weights = read_weights(path)
        quantization.quantize_like(
            model, {*weights, *(PAINTER + name for name in weights)}, stored, str(path)
        )
    elif stored:
        quantization.dequantize(model, mx.float32)
    dtype = None if stored else _dtype(path)
    extra = {key: table for key, table in loaded.extra.items() if key in TABLES}
    return save_model(output, model, loaded.tokenizer, extra, dtype=dtype)


def _dtype(path: Path) -> mx.Dtype | None:
    """Of the stored matrices of a whole model; None for an adapter."""
    if is_adapter(path):
        return None
    kinds = {value.dtype for value in read_weights(path).values() if value.ndim == 2}
    return next(iter(kinds)) if len(kinds) == 1 else None
