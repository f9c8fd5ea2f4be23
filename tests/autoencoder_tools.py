"""The tiny autoencoders of the official code, and random ones."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_transfusion.models.autoencoder import AutoencoderConfig, AutoencoderKL

try:
    from mlx_transfusion.convert import autoencoder as converter
    from mlx_transfusion.convert import table
except ModuleNotFoundError:  # only the tree is on the path, the package is not installed
    from convert import autoencoder as converter  # type: ignore[no-redef]
    from convert import table  # type: ignore[no-redef]

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("kl-sd", "kl-8ch", "kl-flux")


@cache
def golden(name: str) -> dict[str, mx.array]:
    """Inputs and outputs of the official code, channels last."""
    io = mx.load(str(FIXTURES / name / "io.safetensors"))
    return {key: value.transpose(0, 2, 3, 1) for key, value in io.items()}


@cache
def weights(name: str) -> dict[str, mx.array]:
    """Official names and layouts."""
    return mx.load(str(FIXTURES / name / "model.safetensors"))


def foreign_config(name: str) -> dict:  # type: ignore[type-arg]
    """diffusers' config.json."""
    return json.loads((FIXTURES / name / "config.json").read_text())


@cache
def model(name: str) -> AutoencoderKL:
    """The autoencoder of a fixture."""
    config = AutoencoderConfig.from_diffusers(foreign_config(name))
    found = AutoencoderKL(config)
    found.load_weights(list(table.forward(converter.entries(config), weights(name)).items()), strict=True)
    return found


def randomize(model: nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Weights of which each one matters: gains around 1, everything else around 0."""
    keys = mx.random.split(mx.random.key(seed), 1000)
    out = []
    for (name, value), key in zip(tree_flatten(model.parameters()), keys, strict=False):
        noise = mx.random.normal(value.shape, key=key)
        spread = value.size / value.shape[0] if value.ndim > 1 else 1 / scale**2
        is_gain = "norm" in name and name.endswith("weight")
        out.append((name, is_gain + noise * spread**-0.5))
    model.update(tree_unflatten(out))
    mx.eval(model.parameters())
