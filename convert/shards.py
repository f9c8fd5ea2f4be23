"""Writing safetensors files tensor by tensor: shapes are known beforehand, so the header is written first.

Nothing is gathered in memory: the peak is the tensor that is being written.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import mlx.core as mx
import numpy as np

from mlx_transfusion.model_files import write_json
from mlx_transfusion.model_io import INDEX_FILE, MAX_FILE_BYTES

from .account import Stored

NAMES = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8",
}  # fmt: skip
"""Names of dtypes in a header."""


class ShardWriter:
    """model.safetensors, or several files of at most `limit` bytes, and their index.

    `write` takes the tensors in the order of `tensors`. Raises OSError when the disk is full.
    """

    def __init__(
        self, folder: Path, tensors: Sequence[Stored], parameters: int, limit: int = MAX_FILE_BYTES
    ) -> None:
        self._folder, self._parameters = folder, parameters
        self._shards = _shards(tensors, limit)
        self._pending: list[Stored] = []
        self._stream: IO[bytes] | None = None
        self._next = 0

    def __enter__(self) -> ShardWriter:
        return self

    def write(self, array: mx.array) -> None:
        """The next tensor."""
        if not self._pending:
            self._begin()
        expected = self._pending.pop(0)
        if tuple(array.shape) != expected.shape or array.dtype != expected.dtype:
            raise ValueError(f"{expected.name}: {array.dtype} {array.shape} is not as announced")
        assert self._stream is not None
        self._stream.write(numbers(array))

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._stream is not None:
                self._stream.close()
            return
        if self._pending or self._next < len(self._shards):
            raise ValueError("not all tensors were written")
        self._end()
        places = {t.name: self._name(i) for i, shard in enumerate(self._shards) for t in shard}
        size = sum(t.nbytes for shard in self._shards for t in shard)
        metadata = {"total_size": size, "total_parameters": self._parameters}
        write_json(self._folder / INDEX_FILE, {"metadata": metadata, "weight_map": places})

    def _name(self, index: int) -> str:
        count = len(self._shards)
        return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def _begin(self) -> None:
        self._end()
        self._pending = list(self._shards[self._next])
        self._stream = (self._folder / self._name(self._next)).open("wb")
        self._stream.write(header(self._pending))
        self._next += 1

    def _end(self) -> None:
        """Force a finished file to the disk."""
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None


def header(tensors: Sequence[Stored]) -> bytes:
    """The beginning of a safetensors file, as long as a multiple of 8."""
    out: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    begin = 0
    for t in tensors:
        offsets = [begin, begin + t.nbytes]
        out[t.name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
        begin += t.nbytes
    text = json.dumps(out, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def numbers(array: mx.array) -> memoryview:
    """The bytes of an array in row-major order, without a copy where it lies so already."""
    if array.dtype == mx.bfloat16:  # numpy has no such type
        array = array.view(mx.uint16)
    return np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8).data


def _shards(tensors: Sequence[Stored], limit: int) -> list[list[Stored]]:
    """Tensors in their order, in groups of at most `limit` bytes (a larger tensor stands alone)."""
    shards: list[list[Stored]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards
