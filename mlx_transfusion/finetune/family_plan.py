"""What a fine-tune of a converted model takes, told from its config: no weight is allocated."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import mlx.core as mx
from mlx.nn import Linear

from mlx_transfusion.finetune.families import PARTS, with_targets, within
from mlx_transfusion.finetune.layers import targets
from mlx_transfusion.finetune.memory import FLOAT, QUANTISED_OVERHEAD, Estimate
from mlx_transfusion.model_io import build, flat_parameters
from mlx_transfusion.models.family import FamilyConfig
from mlx_transfusion.training.config import TrainConfig

CODER = "autoencoder"
"""The module of every family that turns pixels into latents and back; some models have none."""
ENCODER, DECODER = 47, 68
"""Arrays of a picture's size and of the width of the autoencoder's first layer that each half holds at once: measured
on the CPU, whose convolutions unfold their input."""


def estimate_family(config: TrainConfig, model: FamilyConfig, tokens: int, text: bool) -> Estimate:
    """A coarse estimate in bytes for documents of `tokens` positions.

    text: whether there are rows of text alone. Activations are counted as what goes into and comes out of every
    linear layer that is not always frozen, for each token; attention's scores are not.
    """
    size = 2 if config.dtype == "bfloat16" else FLOAT
    parts, whole = PARTS[model.model_type], build(model)
    linear = {name: m.weight for name, m in whole.named_modules() if isinstance(m, Linear)}
    moving = {name: w for name, w in linear.items() if not within(name, parts.frozen)}
    flat = flat_parameters(whole)
    idle = size * _count(flat, parts.idle(config.adapter is not None, text))
    spec = config.adapter
    weights = size * sum(value.size for value in flat.values()) - (idle if config.low_ram else 0)
    if spec is None:
        trained = sum(value.size for name, value in flat.items() if not within(name, parts.frozen))
        weights -= trained * size  # counted among the copies of what is trained
    else:
        spec = with_targets(spec, model.model_type)
        names = targets(whole, spec)
        trained = sum(spec.rank * sum(linear[name].shape) for name in names)
        if spec.quantize is not None:
            bits = spec.quantize + QUANTISED_OVERHEAD
            weights -= int(sum(linear[name].size for name in names) * (size - bits / 8))
    documents = -(-config.batch_size // config.accumulate)
    activations = documents * tokens * size * sum(sum(w.shape) for w in moving.values())
    own = trained * FLOAT
    first = size * _first_layer(flat, whole.picture_size)
    encoding, decoding = ENCODER * first, DECODER * first
    if config.low_ram:  # their weights are not among the others
        encoding += size * _count(flat, [f"{CODER}.encoder"])
        decoding += size * _count(flat, [f"{CODER}.decoder"])
    return Estimate(
        weights,
        3 * own,
        2 * own,
        activations=max(activations, 4 * own, 0 if config.low_ram else encoding),
        painting=decoding if config.sample.every else 0,
        encoding=encoding if config.low_ram else 0,
        idle=0 if config.low_ram else idle,
        checkpoints=False,
    )


def _count(flat: Mapping[str, mx.array], modules: Collection[str]) -> int:
    """Parameters in some modules."""
    return sum(value.size for name, value in flat.items() if within(name, modules))


def _first_layer(flat: Mapping[str, mx.array], picture: tuple[int, int]) -> int:
    """Numbers in a picture of `picture` (height, width) behind the autoencoder's first convolution."""
    convolutions = [v for n, v in flat.items() if within(n, [CODER]) and v.ndim >= 4 and v.shape[-1] == 3]
    return picture[0] * picture[1] * max((int(w.shape[0]) for w in convolutions), default=0)
