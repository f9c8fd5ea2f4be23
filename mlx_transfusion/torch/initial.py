"""First weights: the distributions of the MLX model, from one generator per parameter.

A parameter's numbers depend on the seed and on its name alone, so a sharded model begins with the same weights on any
number of processes, and a model on the meta device is filled one parameter at a time.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mlx_transfusion.config import ModelConfig

ZERO_LAYERS = ("patch_decoder.proj", "loss_weight.fc2")
"""Layers whose weights and shifts start at zero."""


def initialise(model: nn.Module, config: ModelConfig, seed: int, prefix: str = "") -> None:
    """Fill all parameters in place (shards of a distributed model: each process its own part).

    prefix: of the names of a module that is no part of a model.
    """
    shapes = {prefix + name: tuple(p.shape) for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in zip(shapes, model.parameters(), strict=True):
            device = parameter.device
            put(parameter, first_value(name, shapes, config, seed, device))


def put(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this process's part of it into its shard."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        # No source rank: every process has the whole value already, so nothing is sent.
        value = distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
    parameter.copy_(value)


def first_value(
    name: str, shapes: dict[str, tuple[int, ...]], config: ModelConfig, seed: int, device: torch.device
) -> Tensor:
    """The first value of the parameter `name`, float32 of its shape.

    Linear layers and kernels uniform within 1/sqrt(inputs), embeddings of unit variance, residual branches smaller
    by sqrt(2 layers), what a picture is decoded with at zero: `models/` has the same rules beside each layer.
    """
    shape = shapes[name]
    layer, _, kind = name.rpartition(".")
    owner = layer.rpartition(".")[2]
    if "norm" in owner:
        return torch.full(shape, float(kind == "weight"), device=device)
    zero_kernel = owner in ("conv_out", "conv2") and kind == "weight"
    if zero_kernel or owner in ("guidance", "skip_gain") or layer in ZERO_LAYERS:
        return torch.zeros(shape, device=device)
    generator = torch.Generator(device).manual_seed(_seed(seed, name))
    if name == "embed_tokens.weight":
        return torch.randn(shape, generator=generator, device=device)
    if name == "patch_encoder.position":
        return 0.02 * torch.randn(shape, generator=generator, device=device)
    weight = shapes[f"{layer}.weight"]
    if len(weight) == 4 and kind == "bias":  # of a convolution
        return torch.zeros(shape, device=device)
    bound = math.prod(weight[1:]) ** -0.5
    value = (2 * torch.rand(shape, generator=generator, device=device) - 1) * bound
    if owner in ("o_proj", "down_proj"):
        value *= (2 * config.num_hidden_layers) ** -0.5
    if owner == "time_emb_proj" and kind == "bias":
        value[: shape[0] // 2] += 1  # gains around one
    return value


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
