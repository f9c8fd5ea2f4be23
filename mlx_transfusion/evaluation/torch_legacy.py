"""Reading a state dict that torch wrote before version 1.6, without torch and without running anything.

Such a file is a row of pickles: a magic number, the protocol, facts of the machine, the state dict, the names
of its storages; then, for each storage, its number of elements (int64) and the elements. A pickle names
functions to call; only those four are accepted that a plain state dict needs, and ours stand in for them.
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_transfusion.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
DTYPES = {"FloatStorage": "<f4", "LongStorage": "<i8"}


@dataclass(frozen=True)
class _Storage:
    """A run of elements that comes later in the file."""

    key: str
    dtype: str
    size: int


@dataclass(frozen=True)
class _Tensor:
    """A window on a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Reader(pickle.Unpickler):
    """Knows ordered dicts, tensors and two kinds of storage."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it holds {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size, view = pid
        if kind != "storage" or view is not None:
            raise pickle.UnpicklingError("it holds something that is no plain storage")
        return _Storage(str(key), str(dtype), int(size))


def _tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def read_legacy_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The tensors of the file by name, float32 or int64.

    Raises UserError for a file that is missing, damaged, of another format, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            return _read(file)
    except OSError as error:
        raise UserError(f"{path}: cannot read the weights: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path}: no plain state dict of torch before 1.6, or damaged: {error}") from error


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
    if _Reader(file).load() != MAGIC or _Reader(file).load() != PROTOCOL:
        raise ValueError("it does not begin as such a file does")
    if not _Reader(file).load()["little_endian"]:
        raise ValueError("it was written on a big-endian machine")
    state = _Reader(file).load()
    if not isinstance(state, Mapping) or not all(isinstance(t, _Tensor) for t in state.values()):
        raise ValueError("it holds more than named tensors")
    kinds = {t.storage.key: t.storage for t in state.values()}
    data = {key: _elements(file, kinds[key]) for key in _Reader(file).load()}
    return {str(name): _window(data[t.storage.key], t, str(name)) for name, t in state.items()}


def _elements(file: BinaryIO, storage: _Storage) -> np.ndarray:
    """The elements of the next storage in the file."""
    (size,) = struct.unpack("<q", file.read(8))
    if size != storage.size:
        raise ValueError(f"a storage of {size} elements was announced with {storage.size}")
    raw = file.read(size * np.dtype(storage.dtype).itemsize)
    return np.frombuffer(raw, storage.dtype, size)


def _window(data: np.ndarray, tensor: _Tensor, name: str) -> np.ndarray:
    """A copy of the elements that a tensor shows, which need not lie in order."""
    if (
        len(tensor.shape) != len(tensor.stride)
        or tensor.offset < 0
        or min((0, *tensor.shape, *tensor.stride)) < 0
    ):
        raise ValueError(f"{name} has no proper shape")
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    if 0 in tensor.shape or last >= len(data):
        raise ValueError(f"{name} reaches beyond its storage")
    steps = [step * data.itemsize for step in tensor.stride]
    return np.lib.stride_tricks.as_strided(data[tensor.offset :], tensor.shape, steps).copy()
