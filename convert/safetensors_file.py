"""One safetensors file: its header verified before anything else is believed, its tensors read one at a time.

A header is data from a stranger: 8 bytes of length, JSON, and offsets into what follows. Whatever it says is compared
with the size of the file, so that no tensor can be missing, overlap another, or reach beyond the end.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_transfusion.errors import UserError

MAX_HEADER = 100_000_000
"""Longest header in bytes, as the format's own library has it."""

DTYPES: dict[str, tuple[str, mx.Dtype | None]] = {
    "BOOL": ("bool", mx.bool_), "U8": ("u1", mx.uint8), "I8": ("i1", mx.int8), "I16": ("<i2", mx.int16),
    "U16": ("<u2", mx.uint16), "I32": ("<i4", mx.int32), "U32": ("<u4", mx.uint32), "I64": ("<i8", mx.int64),
    "U64": ("<u8", mx.uint64), "F16": ("<f2", mx.float16), "BF16": ("<u2", mx.bfloat16),
    "F32": ("<f4", mx.float32), "F64": ("<f8", None), "F8_E4M3": ("u1", None), "F8_E5M2": ("u1", None),
}  # fmt: skip
"""Name in a header -> numpy's type of the same width, and ours; None: we have no such numbers."""

FLOATS = ("F32", "F16", "BF16")
"""Names of the types that weights may have."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known about a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str
    """Key of DTYPES."""
    file: Path
    """Where it lies; tensors are converted file by file."""

    @property
    def nbytes(self) -> int:
        """Size of its numbers in bytes."""
        return prod(self.shape) * np.dtype(DTYPES[self.dtype][0]).itemsize


class SafetensorsFile:
    """A verified file. Raises UserError for a corrupt one."""

    def __init__(self, file: Path) -> None:
        self.where = file
        self.tensors: Mapping[str, TensorInfo] = {}
        self._begin: dict[str, int] = {}
        try:
            size = file.stat().st_size
            with file.open("rb") as stream:
                header, start = _read_header(stream, size)
        except OSError as error:
            raise UserError(f"{file}: cannot read the weights: {error.strerror}") from error
        except _FaultyError as fault:
            raise UserError(
                f"{file}: cannot read the weights: {fault}: copy or download the file again"
            ) from fault
        try:
            self.tensors, self._begin = _tensors(header, size - start, file)
        except _FaultyError as fault:
            raise UserError(
                f"{file}: cannot read the weights: {fault}: copy or download the file again"
            ) from fault
        self._start = start

    def read(self, name: str) -> mx.array:
        """One tensor. Raises UserError for a dtype that we have no numbers for, and a file that has changed."""
        info = self.tensors[name]
        numpy_type, dtype = DTYPES[info.dtype]
        if dtype is None:
            raise UserError(f"{self.where}: {name} has dtype {info.dtype}: save it as F32, F16 or BF16")
        try:
            offset = self._start + self._begin[name]
            flat = np.fromfile(self.where, numpy_type, prod(info.shape), offset=offset)
        except OSError as error:
            raise UserError(f"{self.where}: cannot read the weights: {error.strerror}") from error
        if flat.size != prod(info.shape):
            raise UserError(f"{self.where}: {name} is cut short: the file changed while it was read")
        array = mx.array(flat.reshape(info.shape))
        return array.view(dtype) if array.dtype != dtype else array


class _FaultyError(Exception):
    """What is wrong with a header."""


def _read_header(stream: Any, size: int) -> tuple[dict[str, Any], int]:
    """The header's object, and where the numbers begin."""
    if size < 8:
        raise _FaultyError(f"it has {size} bytes, too few for a header")
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > MAX_HEADER or 8 + length > size:
        raise _FaultyError(f"its header should have {length} bytes and the file has {size}")
    try:
        header = json.loads(stream.read(length).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _FaultyError(f"its header is not valid JSON ({_short(error)})") from error
    if not isinstance(header, dict):
        raise _FaultyError("its header is no object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name stands twice")
    return out


def _tensors(header: dict[str, Any], size: int, file: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Every tensor and where it begins; together they must fill the `size` bytes without gap or overlap."""
    header.pop("__metadata__", None)
    infos: dict[str, TensorInfo] = {}
    spans: dict[str, tuple[int, int]] = {}
    for name, entry in header.items():
        if not name.isprintable():
            raise _FaultyError(f"{name!a} is no name of a tensor")
        infos[name], spans[name] = _tensor(name, entry, file)
    end = 0
    for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end:
            raise _FaultyError(f"{name} begins at byte {begin} and the tensor before it ends at {end}")
        end = stop
    if end != size:
        raise _FaultyError(f"its tensors take {end} bytes and the file has {size} for them")
    return infos, {name: begin for name, (begin, _) in spans.items()}


def _tensor(name: str, entry: Any, file: Path) -> tuple[TensorInfo, tuple[int, int]]:
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        raise _FaultyError(f"{_short(name)} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and dtype in DTYPES):
        raise _FaultyError(f"{_short(name)} has the unknown dtype {_short(dtype)}")
    if not _counts(shape) or len(shape) > 32:
        raise _FaultyError(f"{_short(name)} has the shape {_short(shape)}")
    if not (_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise _FaultyError(f"{_short(name)} has the offsets {_short(offsets)}")
    info = TensorInfo(tuple(shape), dtype, file)
    if info.nbytes != offsets[1] - offsets[0]:
        raise _FaultyError(
            f"{_short(name)} takes {offsets[1] - offsets[0]} bytes and its shape and dtype need {_short(info.nbytes)}"
        )
    return info, (offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    """Whether it is a list of plausible whole numbers."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


MAX_NAMED = 5
"""Most names that a message lists when any number of them says the same thing."""


def some(names: Sequence[Any]) -> str:
    """The first few names (a path's own), and how many more there are."""
    shown = ", ".join(name.name if isinstance(name, Path) else str(name) for name in names[:MAX_NAMED])
    return shown + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
