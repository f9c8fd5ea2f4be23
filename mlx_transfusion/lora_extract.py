"""Make an adapter (lora.py) from two models: what one is more than the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.lora import (
    ADAPTER_FILE,
    AdapterConfig,
    LoraParameters,
    Part,
    check_rank,
    layout,
    pack,
    unpack,
)
from mlx_transfusion.model_files import check_shapes, write_json, write_safetensors
from mlx_transfusion.model_io import Loaded, flat_parameters, load, weight_files
from mlx_transfusion.model_path import ADAPTER_CONFIG, CONFIG_FILE, is_adapter
from mlx_transfusion.models.transfusion import with_painter
from mlx_transfusion.quantization import dequantize

FLOAT16_LIMIT = 65504.0


@dataclass(frozen=True)
class Extracted:
    """An adapter beside the model that it stands for."""

    folder: Path
    rank: int
    bytes: int
    """Of its weight file."""
    model_bytes: int
    """Of the weight files of the model."""
    lost: float
    """Size of what is left out of the difference, as a share of the difference (Frobenius norms, all weights)."""


def extract(
    base: str | os.PathLike[str],
    model: str | os.PathLike[str],
    rank: int,
    output: str | os.PathLike[str],
    overwrite: bool = False,
) -> Extracted:
    """Write `model` as its difference from `base` into the folder `output`, which `load` then reads.

    rank: of every matrix. Raises UserError for models that cannot be loaded, differ in shape or tokens, are equal
    or not finite, for a base that is an adapter, for an output folder that is in use, and a full disk.
    """
    check_rank(rank, "--rank")
    target = Path(output)
    _check_target(target, overwrite)
    old, new = _load(base), _load(model)
    if is_adapter(old.path):
        raise UserError(f"base {old.name} is an adapter itself: give the whole model that it belongs to")
    if new.transfusion.config.painter and not old.transfusion.config.painter:
        old.model = with_painter(old.transfusion)
    _check_pair(old, new)
    arrays: dict[str, mx.array] = {}
    unchanged: list[str] = []
    size = lost = 0.0
    for name, difference, part in _differences(old, new, rank):
        if not difference.any():
            unchanged.append(name)
            continue
        stored = pack(difference, part)
        arrays |= {key: mx.array(value) for key, value in stored.items()}
        size += float(np.square(difference).sum())
        lost += float(np.square(difference - unpack(stored, part)).sum())
    if not arrays:
        raise UserError(f"{new.name} has the weights of {old.name}: there is no difference to store")
    theirs = old.config.to_dict()
    try:
        target.mkdir(parents=True, exist_ok=True)
        config = AdapterConfig(
            model=base_name(base, target),
            lora_parameters=LoraParameters(rank),
            model_fingerprint=old.fingerprint,
            config={key: value for key, value in new.config.to_dict().items() if value != theirs[key]},
            unchanged=tuple(unchanged),
            objective=new.extra.get("objective"),
        )
        write_safetensors(target / ADAPTER_FILE, arrays)
        write_json(target / ADAPTER_CONFIG, config.to_dict())
    except (OSError, RuntimeError) as error:  # mlx reports a full disk as RuntimeError
        raise UserError(f"{target}: cannot write the adapter: {error}") from error
    whole = sum(file.stat().st_size for file in weight_files(new.path))
    return Extracted(target, rank, (target / ADAPTER_FILE).stat().st_size, whole, (lost / size) ** 0.5)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file: give a folder with --output")
    if (target / CONFIG_FILE).exists():
        raise UserError(f"{target}: holds a whole model: choose another --output")
    if not overwrite and any((target / name).exists() for name in (ADAPTER_CONFIG, ADAPTER_FILE)):
        raise UserError(f"{target}: holds an adapter already: choose another --output or give --overwrite")


def _load(name: str | os.PathLike[str]) -> Loaded:
    loaded = load(name, dtype=mx.float32)
    dequantize(loaded.model)
    return loaded


def _check_pair(old: Loaded, new: Loaded) -> None:
    """Raises UserError when one cannot stand for the other plus a difference."""
    shapes = {name: value.shape for name, value in flat_parameters(old.model).items()}
    check_shapes(shapes, flat_parameters(new.model), f"{new.name} has not the shape of its base {old.name}")
    ours, theirs = new.tokenizer, old.tokenizer
    same = ours.vocab_size == theirs.vocab_size
    if not same or any(ours.decode([i]) != theirs.decode([i]) for i in range(ours.vocab_size)):
        raise UserError(
            f"{new.name} and its base {old.name} have different tokenizers: expected the same one"
        )


def _differences(old: Loaded, new: Loaded, rank: int) -> Iterator[tuple[str, np.ndarray, Part]]:
    """Name, difference (float64) and way of storing of every parameter."""
    before, after = flat_parameters(old.model), flat_parameters(new.model)
    for name, part in layout(old.model, rank).items():
        difference = np.array(after[name]).astype(np.float64) - np.array(before[name])
        if not np.abs(difference).max(initial=0) < FLOAT16_LIMIT:
            raise UserError(
                f"{new.name} and {old.name} differ in {name} by more than float16 holds: broken weights?"
            )
        yield name, difference, part


def base_name(base: str | os.PathLike[str], target: Path) -> str:
    """A bundled name or hub id as it is; a folder by its way from the adapter, so that both can move together."""
    path = Path(base).expanduser()
    if not path.exists():
        return os.fspath(base)
    way = Path(os.path.relpath(path.resolve(), target.resolve())).as_posix()
    return way if way.startswith("..") else f"./{way}"
