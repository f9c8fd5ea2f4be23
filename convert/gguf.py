"""One GGUF file (llama.cpp's format): its header verified before anything else is believed, tensors read one by one.

Whatever the header says is compared with the size of the file. A quantised tensor `X.weight` appears as mlx stores
one: packed `X.weight`, `X.scales` and `X.biases` (gguf_blocks.py); dimensions are in numpy's order.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_transfusion.errors import UserError

from .gguf_blocks import TYPES, BlockType
from .safetensors_file import DTYPES, TensorInfo

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_DIMS = 4
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8",
           12: "<f8"}  # fmt: skip
"""GGUF's number types -> numpy's."""
BOOL, STRING, ARRAY = 7, 8, 9
PARTS = ("weight", "scales", "biases")


@dataclass(frozen=True)
class _Stored:
    """One tensor as it lies in the file."""

    shape: tuple[int, ...]
    kind: BlockType
    offset: int
    """From the beginning of the file, in bytes."""

    @property
    def blocks(self) -> int:
        return prod(self.shape) // self.kind.size

    @property
    def nbytes(self) -> int:
        return self.blocks * self.kind.nbytes


class GGUFFile:
    """A verified file. Raises UserError for a corrupt one, and for tensors of a type that cannot be converted."""

    def __init__(self, file: Path) -> None:
        self.where = file
        self.metadata: Mapping[str, Any] = {}
        """Numbers, bools, strings, and lists of them."""
        self.tensors: Mapping[str, TensorInfo] = {}
        self.bits: dict[str, int] = {}
        """Bits of each quantised matrix, by its name without ".weight"; all are in groups of 32."""
        try:
            with file.open("rb") as stream:
                self._size = stream.seek(0, 2)
                if self._size < 24:
                    raise _FaultyError(f"it has {self._size} bytes, too few for a header")
                with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self.metadata, self._stored = _read_header(data, file)
            self._describe()
        except OSError as error:
            raise UserError(f"{file}: cannot read the weights: {error.strerror}") from error
        except _FaultyError as fault:
            raise UserError(
                f"{file}: cannot read the weights: {fault}: copy or download the file again"
            ) from fault

    def _describe(self) -> None:
        """Fill `tensors` and `bits`; raises _FaultyError for tensors beyond the end of the file."""
        infos: dict[str, TensorInfo] = {}
        for name, stored in self._stored.items():
            if stored.offset + stored.nbytes > self._size:
                raise _FaultyError(
                    f"{name} ends at byte {stored.offset + stored.nbytes} and the file has {self._size}"
                )
            if not stored.kind.bits:
                infos[name] = TensorInfo(stored.shape, stored.kind.dtype, self.where)
                continue
            base, dot, part = name.rpartition(".")
            if part != PARTS[0] or not dot or len(stored.shape) != 2:
                raise UserError(f"{self.where}: {name} is quantised and no matrix: expected a .weight")
            rows, columns = stored.shape
            groups = (rows, columns // stored.kind.size)
            infos[name] = TensorInfo((rows, columns * stored.kind.bits // 32), "U32", self.where)
            infos[f"{base}.scales"] = infos[f"{base}.biases"] = TensorInfo(groups, "F16", self.where)
            self.bits[base] = stored.kind.bits
        self.tensors = infos

    def read(self, name: str) -> mx.array:
        """One tensor, or one part of a quantised one. Raises UserError for a file that has changed."""
        base, _, part = name.rpartition(".")
        stored = self._stored[f"{base}.weight" if base in self.bits else name]
        try:
            flat = np.fromfile(self.where, "u1", stored.nbytes, offset=stored.offset)
        except OSError as error:
            raise UserError(f"{self.where}: cannot read the weights: {error.strerror}") from error
        if flat.size != stored.nbytes:
            raise UserError(f"{self.where}: {name} is cut short: the file changed while it was read")
        blocks = flat.reshape(stored.blocks, stored.kind.nbytes)
        if base in self.bits:
            assert stored.kind.part is not None
            array = mx.array(stored.kind.part(blocks, part).reshape(self.tensors[name].shape))
        elif stored.kind.whole is not None:
            array = mx.array(stored.kind.whole(blocks).reshape(stored.shape))
        else:
            numpy_type, dtype = DTYPES[stored.kind.dtype]
            array = mx.array(flat.view(numpy_type).reshape(stored.shape))
            array = array.view(dtype) if dtype is not None and array.dtype != dtype else array
        return array


class _FaultyError(Exception):
    """What is wrong with a header."""


class _Cursor:
    """Reads numbers and strings from the beginning of a file, never beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise _FaultyError(f"its header goes on behind byte {self.at}, and the file has {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def u32(self) -> int:
        return self.number("<I")

    def u64(self) -> int:
        return self.number("<Q")

    def text(self) -> str:
        # Tokens of a byte vocabulary need not be UTF-8.
        return self.take(self.u64()).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.u32(), self.u64()
            if inner == STRING:
                return _repeat(self.text, count)
            return self.numbers(inner, count)
        return self.numbers(kind, 1)[0]

    def numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in NUMBERS:
            raise _FaultyError(f"it has a value of the unknown type {kind}")
        numpy_type = np.dtype(NUMBERS[kind])
        out = np.frombuffer(self.take(count * numpy_type.itemsize), numpy_type)
        return (out != 0).tolist() if kind == BOOL else out.tolist()


def _repeat(read: Callable[[], str], count: int) -> list[str]:
    # Not a comprehension over range(count): a header that lies about the count ends at the file's end.
    out: list[str] = []
    while len(out) < count:
        out.append(read())
    return out


def _read_header(data: mmap.mmap, file: Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """Metadata and tensors of a file."""
    cursor = _Cursor(data)
    if cursor.take(4) != MAGIC:
        raise _FaultyError("it does not begin with GGUF")
    if (version := cursor.u32()) not in VERSIONS:
        raise _FaultyError(f"it is of version {version}, expected 2 or 3")
    tensor_count, value_count = cursor.u64(), cursor.u64()
    metadata: dict[str, Any] = {}
    while len(metadata) < value_count:
        key = cursor.text()
        if key in metadata:
            raise _FaultyError(f"the key {_short(key)} stands twice")
        metadata[key] = cursor.value(cursor.u32())
    found: dict[str, _Stored] = {}
    while len(found) < tensor_count:
        name, stored = _read_tensor(cursor, file)
        if name in found:
            raise _FaultyError(f"{_short(name)} stands twice")
        found[name] = stored
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not (isinstance(alignment, int) and 0 < alignment <= 1 << 20):
        raise _FaultyError(f"its alignment is {_short(alignment)}")
    start = -(-cursor.at // alignment) * alignment
    return metadata, {n: _Stored(s.shape, s.kind, start + s.offset) for n, s in found.items()}


def _read_tensor(cursor: _Cursor, file: Path) -> tuple[str, _Stored]:
    name = cursor.text()
    dims = cursor.u32()
    if not 0 < dims <= MAX_DIMS:
        raise _FaultyError(f"{_short(name)} has {dims} dimensions")
    shape = tuple(cursor.u64() for _ in range(dims))[::-1]
    number, offset = cursor.u32(), cursor.u64()
    kind = TYPES.get(number)
    if kind is None:
        known = ", ".join(t.name for t in TYPES.values())
        raise UserError(
            f"{file}: {_short(name)} has GGUF type {_name(number)}, and only {known} can be converted"
        )
    if prod(shape) >= 1 << 62 or shape[-1] % kind.size:
        raise _FaultyError(f"{_short(name)} has the shape {list(shape)}")
    return name, _Stored(shape, kind, offset)


def _name(number: int) -> str:
    others = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 39: "MXFP4"}
    return others.get(number, f"number {number}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
