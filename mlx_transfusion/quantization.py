"""Weight quantisation in mlx-lm's convention: which layers, and back.

config.json's table "quantization" holds {"group_size", "bits"} and, for anything but affine quantisation, "mode";
then modules that differ by their path, each with such a table of its own, or false for one that stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_transfusion.errors import UserError

AFFINE = "affine"
"""mlx's usual mode: 16-bit (or as the weights) scale and bias for each group."""


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


def dequantize(model: nn.Module, dtype: mx.Dtype | None = None) -> bool:
    """Replace quantised layers by plain ones in place; returns whether there were any.

    dtype: of the new weights, None for that of their scales. Products of float16 scales are not rounded to float16
    on the way to float32.
    """
    plain: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            scales, biases = module.scales, module.biases
            if dtype is not None and biases is not None:
                scales, biases = scales.astype(dtype), biases.astype(dtype)
            weight = mx.dequantize(
                module.weight, scales, biases, module.group_size, module.bits, mode=module.mode
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


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """config.json's table of a quantised model, None for a plain one: the commonest setting, then what differs."""
    settings = {
        path: _setting(module.group_size, module.bits, module.mode)
        for path, module in model.named_modules()
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
    }
    return quantization_table(settings) if settings else None


def quantization_table(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """That table from the settings of all quantised modules, by their paths."""
    known = [dict(setting) for setting in settings.values()]
    usual = max(known, key=known.count)
    return usual | {path: dict(setting) for path, setting in sorted(settings.items()) if setting != usual}


def _setting(group_size: int, bits: int, mode: str = AFFINE) -> dict[str, Any]:
    return {"group_size": group_size, "bits": bits} | ({} if mode == AFFINE else {"mode": mode})


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


def quantize_like(model: nn.Module, weights: Collection[str], setting: Any, where: str) -> None:
    """Quantise exactly the modules whose scales are stored, as mlx-lm does, each as the table `setting` says.

    weights: names of the stored arrays. Raises UserError for a table that is wrong or does not fit the model.
    """
    usual = _checked(setting, where)

    def wanted(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        return _checked(setting[path], f"{where}: {path}") if path in setting else usual

    try:
        nn.quantize(model, class_predicate=wanted)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: cannot quantise as config.json says: {error}") from error


def _checked(setting: Any, where: str) -> dict[str, Any]:
    """One table as arguments of mlx's `to_quantized`."""
    if not (isinstance(setting, dict) and {"group_size", "bits"} <= setting.keys()):
        raise UserError(f'{where}: "quantization" in config.json must hold group_size and bits')
    mode = setting.get("mode", AFFINE)
    if not (_is_count(setting["group_size"]) and _is_count(setting["bits"]) and isinstance(mode, str)):
        raise UserError(
            f'{where}: "quantization" in config.json must hold whole numbers as group_size and bits, and a mode'
        )
    return _setting(setting["group_size"], setting["bits"]) | {"mode": mode}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 16
