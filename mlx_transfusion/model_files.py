"""The files of model folders: checked when read, and written complete or not at all.

A file is written under another name, forced to the disk and renamed, so that a name never stands for half a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mlx_transfusion.errors import UserError

if TYPE_CHECKING:  # the PyTorch path reads and writes JSON with this module, and has no mlx
    import mlx.core as mx

EXTRA_KEYS = ("training", "objective", "generation", "coder", "quantization", "quantization_config")
"""Tables that config.json may hold besides the model's own fields: how it was trained, which loss it was
distilled with, how it paints unless told otherwise, {"fingerprint"} of the autoencoder whose latents or codes it
learnt, and {"group_size", "bits"} of quantised weights (the last is a copy for the hub)."""

SHOWN_FAULTS = 8
"""How many faults a message lists."""


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Array = TypeVar("Array", bound=_Sized)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for a file that cannot be read and for anything else in it."""
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot read the config: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected an object, found {type(data).__name__}")
    return data


def read_safetensors(file: Path) -> dict[str, mx.array]:
    """The (lazy) arrays of a safetensors file. Raises UserError for a corrupt one."""
    import mlx.core as mx

    try:
        return mx.load(str(file))  # type: ignore[return-value]
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{file}: corrupt weights, copy or download the file again: {error}") from error


def check_shapes(
    expected: Mapping[str, Sequence[int]], weights: Mapping[str, mx.array], complaint: str
) -> None:
    """Raises UserError, `complaint` and a list, for missing, unexpected and misshapen arrays."""
    faults = [f"missing {name}" for name in sorted(expected.keys() - weights.keys())]
    faults += [f"unexpected {name}" for name in sorted(weights.keys() - expected.keys())]
    faults += [
        f"{name} has shape {list(weights[name].shape)}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & weights.keys())
        if tuple(weights[name].shape) != tuple(expected[name])
    ]
    if faults:
        more = len(faults) - SHOWN_FAULTS
        shown = "; ".join(faults[:SHOWN_FAULTS]) + (f"; and {more} more" if more > 0 else "")
        raise UserError(f"{complaint}: {shown}")


def write_safetensors(file: Path, arrays: Mapping[str, mx.array]) -> None:
    """Write arrays. Raises OSError, or RuntimeError, which is how mlx reports a full disk."""
    import mlx.core as mx

    temporary = file.with_name(
        f".{file.name}.partial.safetensors"
    )  # mlx adds that ending where it is missing
    try:
        mx.save_safetensors(str(temporary), dict(arrays), {"format": "mlx"})
        _sync(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write an object, indented and with sorted keys. Raises OSError."""
    temporary = file.with_name(f".{file.name}.partial")
    try:
        temporary.write_text(json.dumps(data, indent=4, sort_keys=True) + "\n", encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(file: Path) -> None:
    """Force a file to the disk, so that a rename after it never shows a name without the bytes."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def in_files(weights: Mapping[str, Array], limit: int) -> list[dict[str, Array]]:
    """Weights of any library in their order, in groups of at most `limit` bytes (a larger weight stands alone)."""
    files: list[dict[str, Array]] = [{}]
    size = 0
    for name, value in weights.items():
        if files[-1] and size + value.nbytes > limit:
            files.append({})
            size = 0
        files[-1][name] = value
        size += value.nbytes
    return files
