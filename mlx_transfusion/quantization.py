"""Weight quantisation in mlx-lm's convention: which layers, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_transfusion.errors import UserError


def quantize(model: nn.Module, bits: int = 8, group_size: int = 64) -> nn.Module:
    """Quantise the text embedding, the head and the matrices of decoder and painter in place; returns the model.

    The layers of patches and angles stay as they are: they are small, and every pixel passes them. So does a
    matrix whose rows do not divide into groups. Raises UserError for bits or a group size that mlx lacks.
    """
    if bits not in (2, 3, 4, 5, 6, 8) or group_size not in (32, 64, 128):
        raise UserError(
            f"cannot quantise to {bits} bits in groups of {group_size}: use 2, 3, 4, 5, 6 or 8 bits "
            "and groups of 32, 64 or 128"
        )

    def wanted(path: str, module: nn.Module) -> bool:
        divides = hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0
        return divides and path.startswith(("embed_tokens", "lm_head", "layers.", "painter.layers."))

    nn.quantize(model, group_size, bits, class_predicate=wanted)
    return model


def dequantize(model: nn.Module) -> bool:
    """Replace quantised layers by plain ones in place; returns whether there were any."""
    plain: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            weight = mx.dequantize(
                module.weight, module.scales, module.biases, module.group_size, module.bits
            )
            rows, columns = weight.shape
            new: nn.Module
            if isinstance(module, nn.QuantizedEmbedding):
                new = nn.Embedding(rows, columns)
            else:
                new = nn.Linear(columns, rows, bias="bias" in module)
                if "bias" in module:
                    new.bias = module.bias
            new.weight = weight
            plain.append((path, new))
    if plain:
        model.update_modules(tree_unflatten(plain))
    return bool(plain)


def quantization_of(model: nn.Module) -> dict[str, int] | None:
    """{"group_size", "bits"} of a quantised model, None for a plain one."""
    for _, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            return {"group_size": module.group_size, "bits": module.bits}
    return None


def parameter_count(model: nn.Module) -> int:
    """Number of parameters; a quantised matrix counts what it stands for. Allocates nothing."""
    total = 0
    for _, module in model.named_modules():
        own = {k: v for k, v in module.items() if isinstance(v, mx.array) and not k.startswith("_")}
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            total += own["weight"].size * 32 // module.bits + (own["bias"].size if "bias" in own else 0)
        else:
            total += sum(v.size for v in own.values())
    return total


def quantize_like(model: nn.Module, weights: Mapping[str, mx.array], setting: Any, where: str) -> None:
    """Quantise exactly the modules whose scales are stored, as mlx-lm does."""
    if not (isinstance(setting, dict) and {"group_size", "bits"} <= setting.keys()):
        raise UserError(f'{where}: "quantization" in config.json must hold group_size and bits')
    try:
        nn.quantize(
            model, int(setting["group_size"]), int(setting["bits"]),
            class_predicate=lambda p, m: hasattr(m, "to_quantized") and f"{p}.scales" in weights,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: cannot quantise as config.json says: {error}") from error
