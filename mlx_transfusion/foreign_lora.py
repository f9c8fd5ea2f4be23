"""LoRA files of other programs: PEFT's and diffusers' names, and those with underscores (kohya).

    PREFIX.NAME.lora_A.weight [r, inputs], PREFIX.NAME.lora_B.weight [outputs, r]      PEFT, diffusers
    PREFIX.NAME.lora.down.weight, PREFIX.NAME.lora.up.weight                           older diffusers
    lora_unet_NAME_WITH_UNDERSCORES.lora_down.weight, .lora_up.weight, .alpha          kohya

Our arrays are their transposes. A file fits when every one of its layers is a linear layer of the model, whatever
stands before its name; one that fits only in part would quietly do less than it should, so it is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion import lora
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import read_json, read_safetensors
from mlx_transfusion.model_path import ADAPTER_CONFIG

if TYPE_CHECKING:
    from mlx_transfusion.adapters import Adapter

FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_DOWN = re.compile(r"^(.+?)[._](?:lora_A|lora_down|lora\.down|lora_linear_layer\.down)(?:\.[\w-]+)?\.weight$")
_UP = re.compile(r"^(.+?)[._](?:lora_B|lora_up|lora\.up|lora_linear_layer\.up)(?:\.[\w-]+)?\.weight$")
_LENGTH = re.compile(r"^(.+?)\.(?:lora_magnitude_vector(?:\.[\w-]+)*?|dora_scale)(?:\.weight)?$")
_ALPHA = re.compile(r"^(.+?)\.alpha$")
SHOWN = 3


def is_foreign(path: Path) -> bool:
    """Whether a path is a LoRA file, or a folder as PEFT or diffusers write it."""
    return path.suffix == ".safetensors" or any((path / name).is_file() for name in FILES)


def read_foreign(path: Path, model: nn.Module, name: str) -> tuple[Adapter, Path]:
    """A LoRA of another program for the float model `model`, and its file.

    Raises UserError when no layer of it is in the model, when only some are, and for what is no plain LoRA.
    """
    from mlx_transfusion.adapters import Adapter

    file = path if path.is_file() else next(path / one for one in FILES if (path / one).is_file())
    arrays = read_safetensors(file)
    peft = path / ADAPTER_CONFIG
    settings = read_json(peft) if peft.is_file() else {}
    found = {kind: _named(arrays, pattern) for kind, pattern in _KINDS.items()}
    known = {key for names in found.values() for key, _ in names.values()}
    if strange := sorted(arrays.keys() - known):
        raise UserError(
            f"{file}: not a plain LoRA of linear layers: it also has {', '.join(strange[:SHOWN])}"
            f"{' and others' if len(strange) > SHOWN else ''}"
        )
    layers = lora.linear_layers(model)
    place = {theirs: _layer(theirs, layers) for theirs in sorted(found["down"])}
    _check_matches(file, name, place, layers)
    out: dict[str, mx.array] = {}
    keys: list[str] = []
    rank = 1
    for theirs, key in place.items():
        assert key is not None
        a, b = _pair(file, theirs, found)
        rank = max(rank, a.shape[1])
        factor = _factor(file, theirs, a.shape[1], found["alpha"], settings)
        out |= {f"{key}.lora_a": a, f"{key}.lora_b": factor * b}
        if theirs in found["length"]:
            out[f"{key}.m"] = found["length"][theirs][1].astype(mx.float32).reshape(-1)
        keys.append(key)
    _check_shapes(file, out, keys, layers)
    if found["length"] and len(found["length"]) != len(keys):
        raise UserError(f"{file}: some of its layers are DoRA and some are not: expected one kind")
    config = lora.AdapterConfig(
        model=name,
        lora_parameters=lora.LoraParameters(rank, 1.0, tuple(keys)),
        model_fingerprint="",
        fine_tune_type="dora" if found["length"] else "lora",
    )
    return Adapter(config, out), file


_KINDS = {"down": _DOWN, "up": _UP, "length": _LENGTH, "alpha": _ALPHA}


def _named(arrays: dict[str, mx.array], pattern: re.Pattern[str]) -> dict[str, tuple[str, mx.array]]:
    """Layer -> (array's name, array) of all names that the pattern fits."""
    matches = ((pattern.match(key), key) for key in arrays)
    return {match.group(1): (key, arrays[key]) for match, key in matches if match}


def _layer(theirs: str, layers: dict[str, nn.Linear]) -> str | None:
    """Our name of a layer: the longest that theirs ends in, dots or underscores between its parts."""
    flat = theirs.replace(".", "_")
    fits = [n for n in layers if flat == n.replace(".", "_") or flat.endswith("_" + n.replace(".", "_"))]
    return max(fits, key=len, default=None)


def _check_matches(file: Path, name: str, place: dict[str, str | None], layers: dict[str, nn.Linear]) -> None:
    missing = [theirs for theirs, key in place.items() if key is None]
    if len(missing) == len(place):
        raise UserError(
            f"{file}: none of its {len(place)} layers is in model {name}: it has {_some(list(place))}; "
            f"the model has {_some(sorted(layers))}"
        )
    if missing:
        raise UserError(
            f"{file}: {len(missing)} of its {len(place)} layers are not in model {name}: {_some(missing)}; "
            "use it with the model it was made for"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "") if names else "no layers"


def _pair(file: Path, theirs: str, found: dict[str, Any]) -> tuple[mx.array, mx.array]:
    """A [inputs, r] and B [r, outputs] of a layer."""
    if theirs not in found["up"]:
        raise UserError(f"{file}: {theirs} has only one half of its LoRA: copy or download the file again")
    down, up = (found[kind][theirs][1].astype(mx.float32) for kind in ("down", "up"))
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise UserError(
            f"{file}: {theirs} has factors of shapes {list(down.shape)} and {list(up.shape)}, which do not fit "
            "each other: expected [r, inputs] and [outputs, r]"
        )
    return down.T, up.T


def _factor(file: Path, theirs: str, rank: int, alphas: dict[str, Any], settings: dict[str, Any]) -> float:
    """alpha / r of a layer: from the file, from PEFT's config (the layer's own or that of all), or 1."""
    if theirs in alphas:
        return float(alphas[theirs][1].item()) / rank
    alpha = settings.get("lora_alpha")
    try:
        for pattern, own in (settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(?:.*\.)?(?:{pattern})$", theirs):  # as PEFT reads it
                alpha = own
                break
    except (AttributeError, re.error) as error:
        raise UserError(f"{file}: alpha_pattern in {ADAPTER_CONFIG} cannot be read: {error}") from error
    if not isinstance(alpha, int | float):
        return 1.0
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _check_shapes(
    file: Path, arrays: dict[str, mx.array], keys: list[str], layers: dict[str, nn.Linear]
) -> None:
    for key in keys:
        outputs, inputs = layers[key].weight.shape
        a, b = arrays[f"{key}.lora_a"].shape, arrays[f"{key}.lora_b"].shape
        if (a[0], b[1]) != (inputs, outputs):
            raise UserError(
                f"{file}: {key} is for a layer of {a[0]} inputs and {b[1]} outputs, the model's has {inputs} and "
                f"{outputs}: use it with the model it was made for"
            )
