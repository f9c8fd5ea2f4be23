"""`mlx-transfusion info`: a model's size, a picture's settings, or this installation."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_transfusion.cli import options
from mlx_transfusion.cli.terminal import result
from mlx_transfusion.errors import UserError

if TYPE_CHECKING:
    from mlx_transfusion.models.family import FamilyConfig

BYTES = {"float32": 4.0, "bfloat16": 2.0, "8-bit": 1 + 4 / 64, "4-bit": 0.5 + 4 / 64}
"""Bytes a weight; quantised ones have a 16-bit scale and bias for each group of 64."""

TRANSFORMER = ("embed_tokens", "layers", "decoder", "model", "language_model", "norm", "lm_head")
"""Names that the families give to what reads and writes."""


def info(
    target: Annotated[
        str | None, typer.Argument(metavar="MODEL|FILE.png", help="Model, or a picture made here.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A size of the paper: 0.16b, 0.37b, 0.76b, 1.4b, 7b; with its U-Net: 7b-unet.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show a model's parameters and memory, the settings in a picture, or (without either) what runs here."""
    if target is not None and preset is not None:
        raise UserError("give either a MODEL or FILE.png, or --preset")
    if preset is not None:
        from mlx_transfusion.config import preset as paper

        facts = {"preset": preset} | model_facts(paper(preset))
    elif target is None:
        facts = installation_facts()
    elif Path(target).suffix.lower() == ".png" and not Path(target).is_dir():
        from mlx_transfusion.images import read_record
        from mlx_transfusion.records import record_objective

        record = read_record(target)
        objective = record_objective(record)
        facts = {"file": target} | record | ({"objective": objective} if objective else {})
    else:
        facts = stored_model_facts(target)
    if as_json:
        result(facts)
    else:
        for line in lines(facts):
            result(line)


def model_facts(config: FamilyConfig, autoencoder: Path | None = None) -> dict[str, Any]:
    """Parameters and memory of a model, counted from its (lazy, never allocated) weights.

    autoencoder: folder of the one that turns its latents into pictures; it may be missing.
    """
    from mlx_transfusion.model_io import attach_autoencoder, build, flat_parameters
    from mlx_transfusion.models.family import CodeFamily, PictureFamily
    from mlx_transfusion.picture_sizes import named

    model = build(config)
    if autoencoder is not None:
        attach_autoencoder(model, autoencoder, weights=False)
    parts: dict[str, int] = {}
    for name, value in flat_parameters(model).items():
        part = _part(name)
        parts[part] = parts.get(part, 0) + value.size
    total = sum(parts.values())
    facts = {
        "parameters": parts | {"total": total},
        "weights in memory": {name: _memory(total * size) for name, size in BYTES.items()},
    }
    if isinstance(model, CodeFamily):
        (height, width), codes = model.picture_size, model.latent_shape[0]
        facts["picture"] = f"{width}x{height}, {codes} codes of {config.vocab_size - model.first_code}"
    elif isinstance(model, PictureFamily):
        (height, width), (n, p), channels = model.picture_size, model.latent_shape, model.picture_channels
        side = math.isqrt(p // channels)
        patch = f"{side}x{side}" if n * side**2 == height * width else f"{p} numbers"
        facts["picture"] = f"{width}x{height}x{channels}, {n} patches of {patch}"
        if len(model.sizes) > 1:
            facts["sizes learnt"] = named(model.sizes)
    return facts | {"config": config.to_dict()}


def _part(name: str) -> str:
    """Where a parameter is counted: the layers around patches, the transformer, or another part by its own name."""
    top, *below = name.split(".")
    if top.startswith("patch_") and below[0] == "unet":
        return "U-Net of patches"
    if top.startswith(("patch_", "angle_")):
        return "patch layers"
    return "transformer" if top in TRANSFORMER else top


def stored_model_facts(name: str) -> dict[str, Any]:
    """The facts of a model folder, from its config and file sizes; the weights are not read."""
    from mlx_transfusion.generation_memory import cache_bytes
    from mlx_transfusion.model_io import read_config, weight_files
    from mlx_transfusion.model_path import AUTOENCODER, display_name, resolve
    from mlx_transfusion.objective import read_objective

    path = resolve(name)
    config, extra = read_config(path)
    size = sum(file.stat().st_size for file in weight_files(path))
    objective = read_objective(extra, display_name(name, path))
    more = model_facts(config, path / AUTOENCODER)
    total = more["parameters"]["total"]
    facts: dict[str, Any] = {"model": display_name(name, path)}
    if "picture" in more:
        facts["objective"] = extra.get("objective", {"name": objective.name})
    facts |= {
        "path": str(path),
        "weights on disk": _memory(size),
        "bits a weight on disk": round(8 * size / total, 2),
        "memory for generation": {
            "weights as stored": _memory(size + cache_bytes(config, 2)),
            "float32 (on a CPU)": _memory(4 * total + cache_bytes(config, 4)),
        },
    }
    return facts | more | extra


def installation_facts() -> dict[str, Any]:
    """Versions, device and BLAS."""
    from importlib.metadata import version

    import mlx.core as mx

    from mlx_transfusion import __version__
    from mlx_transfusion.blas import blas_in_use

    return {
        "mlx-transfusion": __version__,
        "mlx": version("mlx"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(mx.default_device()),
        "BLAS": blas_in_use(),
    }


def lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Facts as aligned lines; tables inside are indented."""
    out = []
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if name == "parameters":
            value = {kind: f"{count:,} ({_rounded(count)})" for kind, count in value.items()}
        if isinstance(value, dict):
            out += [f"{indent}{name}:", *lines(value, indent + "  ")]
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            out.append(f"{indent}{name.ljust(width)}  {shown}")
    return out


def _rounded(count: int) -> str:
    return f"{count / 1e9:.3f} billion" if count >= 100_000_000 else f"{count / 1e6:.2f} million"


def _memory(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
