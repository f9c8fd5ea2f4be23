"""Model folders of the MLX side, read and written with PyTorch: same files, names, shapes and bits.

config.json, model.safetensors (or numbered parts above 5 GiB with an index), tokenizer: `model_io.py` describes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import EXTRA_KEYS, check_shapes, in_files, read_json, write_json
from mlx_transfusion.model_path import CONFIG_FILE, is_adapter, resolve
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.torch.initial import put
from mlx_transfusion.torch.model import Transfusion

INDEX_FILE = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 << 30


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The config of a model folder and its extra tables. Raises UserError for another kind of model."""
    data = read_json(folder / CONFIG_FILE)
    extra = {key: data.pop(key) for key in EXTRA_KEYS if key in data}
    if (kind := data.get("model_type", "transfusion")) != "transfusion":
        raise UserError(f'{folder}: model_type is "{kind}", expected "transfusion"')
    if "quantization" in extra:
        raise UserError(f"{folder}: its weights are quantised; PyTorch trains from floating-point ones")
    return ModelConfig.from_dict(data, str(folder / CONFIG_FILE)), extra


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, by its index if it has one. Raises UserError when there are none."""
    index = folder / INDEX_FILE
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else []
    files = [folder / name for name in names] or sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder} is not a model folder: it has no model.safetensors")
    return files


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every weight, one at a time. Raises UserError for missing or corrupt files."""
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118  (a file handle, not a dict)
                    yield name, weights.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: corrupt weights, copy or download the file again: {error}") from error


def fill(model: nn.Module, folder: Path, optional: tuple[str, ...] = ()) -> None:
    """Copy a folder's weights into a model of the same shape, sharded or not; they keep the model's precision.

    optional: beginnings of names that the folder may lack. Raises UserError for missing, unexpected and misshapen
    weights.
    """
    parameters, found = dict(model.named_parameters()), {}
    with torch.no_grad():
        for name, value in read_weights(folder):
            found[name] = value.to("meta")
            if name in parameters and parameters[name].shape == value.shape:
                put(parameters[name], value)
    expected = {
        name: tuple(p.shape)
        for name, p in parameters.items()
        if name in found or not name.startswith(optional)
    }
    check_shapes(expected, found, f"{folder}: the weights do not fit the config")


def load(name: str | os.PathLike[str] | None = None) -> tuple[Transfusion, dict[str, Any]]:
    """A whole model in float32 on the CPU, and the extra tables of its config: a folder or a bundled name.

    Raises UserError for what is missing, corrupt or no plain transfusion model.
    """
    path = resolve(name)
    if is_adapter(path):
        raise UserError(f"{path}: is an adapter; fuse it with its base first (mlx-transfusion)")
    config, extra = read_config(path)
    model = Transfusion(config)
    fill(model, path)
    return model, extra


def save(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model folder that the MLX side loads; config.json comes last. Raises UserError when it cannot."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
        _save_weights(
            path, {name: value.detach().cpu().contiguous() for name, value in sorted(weights.items())}
        )
        write_json(path / CONFIG_FILE, config.to_dict() | dict(extra or {}))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot write the model: {error}") from error
    return path


def _save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    parts = in_files(weights, MAX_FILE_BYTES)
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts):
        name = (
            "model.safetensors" if len(parts) == 1 else f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        )
        temporary = path / f".{name}.partial"
        try:
            save_file(part, temporary, {"format": "mlx"})
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, path / name)
        finally:
            temporary.unlink(missing_ok=True)
        weight_map |= dict.fromkeys(part, name)
    metadata = {
        "total_size": sum(w.nbytes for w in weights.values()),
        "total_parameters": sum(w.numel() for w in weights.values()),
    }
    write_json(path / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})
