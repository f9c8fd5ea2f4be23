"""Our own model from a PyTorch (or safetensors) state dict that uses our parameter names.

Linear layers, embeddings and norms are laid out alike in PyTorch and MLX, so no tensor needs arithmetic here
(convolutions of a U-Net are expected as MLX has them, [out, height, width, in]), and the table of names and shapes is
the model's own tree of parameters.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import read_json
from mlx_transfusion.model_io import build, flat_parameters, save_model, special_ids
from mlx_transfusion.model_path import CONFIG_FILE
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.tokenizer import Tokenizer

from .sources import read_state_dict

PathLike = str | os.PathLike[str]
Shapes = Mapping[str, tuple[int, ...]]


def convert_state(
    source: PathLike,
    config_path: PathLike,
    tokenizer_path: PathLike,
    output: PathLike,
    dtype: mx.Dtype | None = None,
) -> Path:
    """Write the model folder `output`, which `mlx_transfusion.load` reads, and return its path.

    source: see `read_state_dict`. config_path: a config.json with ModelConfig's fields, or the folder of one.
    tokenizer_path: tokenizer.model or tokenizer.json, or the folder of one. dtype: of the stored weights;
    None keeps each as it is, bit for bit. Raises UserError, with nothing left behind, when a tensor is
    missing, unexpected, of a wrong shape or no floating-point one (all such are listed), when a value does
    not fit into `dtype`, when an input cannot be read, and when `output` exists or cannot be written.
    """
    path = Path(output)
    if path.exists():
        raise UserError(f"{path}: exists already: choose another output folder")
    config = _read_config(Path(config_path))
    model = build(config)
    tokenizer = Tokenizer.load(tokenizer_path, special=special_ids(config))
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{tokenizer_path}: has {tokenizer.vocab_size} tokens and the config's vocab_size is "
            f"{config.vocab_size}: use the tokenizer that the model was trained with"
        )
    weights = read_state_dict(Path(source))
    expected = {name: value.shape for name, value in flat_parameters(model).items()}
    if found := faults(weights, expected):
        raise UserError(f"{source}: does not fit {config_path}: {'; '.join(found)}")
    if dtype is not None and (overflowing := _overflowing(weights, dtype)):
        raise UserError(
            f"{source}: values beyond the range of {dtype} in {'; '.join(overflowing)}: use a wider dtype"
        )
    model.load_weights(list(weights.items()))
    _write(path, model, tokenizer, dtype)
    return path


def faults(weights: Mapping[str, mx.array], expected: Shapes) -> list[str]:
    """All differences between tensors and the wanted names and shapes, in words; empty without any."""
    out = [f"missing {name}" for name in sorted(expected.keys() - weights.keys())]
    out += [f"unexpected {name}" for name in sorted(weights.keys() - expected.keys())]
    for name in sorted(expected.keys() & weights.keys()):
        value = weights[name]
        if value.shape != tuple(expected[name]):
            out.append(f"{name} has shape {list(value.shape)}, expected {list(expected[name])}")
        if not mx.issubdtype(value.dtype, mx.floating):
            out.append(f"{name} has dtype {value.dtype}, expected a floating-point one")
    return out


def _overflowing(weights: Mapping[str, mx.array], dtype: mx.Dtype) -> list[str]:
    """Names of tensors with a finite value that becomes infinite in `dtype`."""
    return [
        name
        for name, value in sorted(weights.items())
        if mx.any(mx.isfinite(value) & ~mx.isfinite(value.astype(dtype))).item()
    ]


def _read_config(path: Path) -> ModelConfig:
    """Strictly ModelConfig's fields: tables about training or quantisation do not fit foreign weights."""
    file = path / CONFIG_FILE if path.is_dir() else path
    return ModelConfig.from_dict(read_json(file), str(file))


def _write(path: Path, model: Transfusion, tokenizer: Tokenizer, dtype: mx.Dtype | None) -> None:
    """A whole folder or none: written under another name beside `path`, and renamed."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        save_model(temporary, model, tokenizer, dtype=dtype)
        os.rename(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write the model: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
