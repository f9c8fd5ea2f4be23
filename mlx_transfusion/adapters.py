"""Several fine-tuned adapters, each with a scale of its own, in one model: `--adapter DIR[:SCALE]`.

    W' = W + sum of scale_i (W_i - W)        W_i: the matrix with adapter i alone

The differences are taken from the model that the adapters were trained on. So an adapter of a diffusion model also
serves its two-step student, which is that model plus a painter: the same differences go into both.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_transfusion import lora
from mlx_transfusion.errors import UserError
from mlx_transfusion.foreign_lora import is_foreign, read_foreign
from mlx_transfusion.model_files import check_shapes, read_safetensors
from mlx_transfusion.model_io import Loaded, load
from mlx_transfusion.model_path import is_adapter
from mlx_transfusion.models.family import TextFamily
from mlx_transfusion.models.transfusion import Transfusion, with_painter
from mlx_transfusion.quantization import dequantize

PAINTER = "painter."
"""Before the names of an image-only adapter's layers: they stand in the painter of the model (models/painter.py)."""


class Adapter(NamedTuple):
    """What one adapter adds to a model."""

    config: lora.AdapterConfig
    """Its `keys` are layers of the model without a painter."""
    arrays: Mapping[str, mx.array]
    scale: float = 1.0
    image_only: bool = False
    """Whether it belongs into the painter alone."""


def parse(text: str) -> tuple[Path, float]:
    """ "DIR:0.8" -> the folder or file, and the scale, 1 without one. Raises UserError for anything else."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        path, scale = text, "1"
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"--adapter {text}: no such adapter: expected a folder, or a folder:scale")
    try:
        factor = float(scale)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise UserError(f'--adapter {text}: the scale is "{scale}", expected a number such as 0.8')
    return found, factor


def load_adapted(
    name: str | os.PathLike[str] | None, adapters: Sequence[str], *, dtype: mx.Dtype | None = None
) -> Loaded:
    """`model_io.load` with adapters (as `parse` takes them) added to the weights, which are float then.

    Its fingerprint is that of all weights together. Raises UserError as `load`, and for an adapter that belongs to
    another model or does not fit.
    """
    places = [parse(text) for text in adapters]
    base = load(name, dtype=dtype)
    if not places:
        return base
    digest = hashlib.sha256(base.fingerprint.encode())
    dequantize(base.model)
    parts = []
    for path, scale in places:
        part, file = _read(path, base)
        parts.append(part._replace(scale=scale))
        digest.update(repr((scale, part.config.lora_parameters.scale)).encode() + file.read_bytes())
    model = with_adapters(base.model, parts)
    if dtype is not None:
        model.set_dtype(dtype)
    mx.eval(model.parameters())
    extra = {k: v for k, v in base.extra.items() if not k.startswith("quantization")}
    extra["adapters"] = [{"name": path.resolve().name, "scale": scale} for path, scale in places]
    out = replace(base, model=model, config=model.config, extra=extra)
    out.__dict__["fingerprint"] = digest.hexdigest()[:16]  # in place of that of the files under `path`
    return out


def with_adapters(model: TextFamily, parts: Sequence[Adapter]) -> TextFamily:
    """A float model with adapters in it: the same object, or one with a painter where an adapter needs that."""
    weights = dict(tree_flatten(model.parameters()))
    source = dict(weights)
    if any(part.image_only for part in parts) and not any(name.startswith(PAINTER) for name in weights):
        if not isinstance(model, Transfusion):
            raise UserError(
                f"an image-only adapter is for models of type transfusion, this is a {model.config.model_type}"
            )
        model = with_painter(model)
        weights = dict(tree_flatten(model.parameters()))
    for part in parts:
        for key in part.config.lora_parameters.keys or ():
            name = f"{key}.weight"
            old = source[name].astype(mx.float32)
            difference = part.scale * (lora.adapted(old, key, part.config, part.arrays) - old)
            for place in (PAINTER + name,) if part.image_only else (name, PAINTER + name):
                if place in weights:
                    weights[place] = (weights[place].astype(mx.float32) + difference).astype(
                        source[name].dtype
                    )
    model.update(tree_unflatten(list(weights.items())))
    model.eval()
    return model


def _read(path: Path, base: Loaded) -> tuple[Adapter, Path]:
    """An adapter for a model, and its weight file."""
    if is_foreign(path):
        return read_foreign(path, base.model, base.name)
    if not is_adapter(path):
        raise UserError(f"{path}: is no adapter: expected a folder with adapter_config.json, or a LoRA file")
    config = lora.read_adapter_config(path)
    if config.objective is not None:
        raise UserError(
            f"{path}: is a student of another model and paints in its own way: name it with --model"
        )
    if config.lora_parameters.keys is None:
        raise UserError(f"{path}: stands for a whole model: name it with --model instead")
    if config.model_fingerprint not in _fingerprints(base):
        raise UserError(
            f"{path}: this adapter belongs to {config.model} with weights {config.model_fingerprint}, and "
            f"{base.name} has weights {base.fingerprint}: use it with the model it was made for"
        )
    keys = config.lora_parameters.keys
    image_only = bool(config.config.get("painter", False))
    prefix = PAINTER if image_only else ""
    own = replace(config.lora_parameters, keys=tuple(key.removeprefix(prefix) for key in keys))
    config = replace(config, lora_parameters=own)
    file = lora.adapter_file(path)
    arrays = read_safetensors(file)
    where = f"{path}: the adapter does not fit {base.name}"
    shapes = lora.trained_shapes(base.model, config, where)
    check_shapes({prefix + name: shape for name, shape in shapes.items()}, arrays, where)
    plain = {name.removeprefix(prefix): value for name, value in arrays.items()}
    return Adapter(config, plain, image_only=image_only), file


def _fingerprints(base: Loaded) -> set[str]:
    """Of the weights of a model, and of those that it is an adapter of."""
    own = {base.fingerprint}
    if is_adapter(base.path):
        own.add(lora.read_adapter_config(base.path).model_fingerprint)
    return own
