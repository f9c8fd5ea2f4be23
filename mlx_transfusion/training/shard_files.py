"""Shards: packed, tokenised sequences of one length, in files that are read by memory map. Imports no mlx.

A folder of shards (`shards build` makes it) holds one file for each input, a table of all sequences, and an index:

    index.json             the recipe (what they were made with), and of each shard: name, sequences, bytes, SHA-256
    table.npy              uint16 [N, 3], of each of the N sequences: text targets, pictures, pairs
    shard-00000.safetensors ...

A shard is a safetensors file with n sequences of T positions, d documents and m pictures:

    tokens         uint16 or int32 [n, T]: token ids, caption before picture, the pad id at patches
    first_document int32 [n + 1]: the documents of sequence i are numbers first_document[i] to first_document[i + 1]
    first_picture  int32 [n + 1]: the same of pictures
    length         int32 [d]: positions of each document
    kind           uint8 [d]: TEXT, PAIR or SEGMENTS
    origin         int32 [d]: the row of the input that it was, from 1
    pictures       [m, V, h, w, C] uint8 pixels, or float16 or float32 latents of unit variance; V = 2: also mirrored
    table          uint16 [n, 3]: its part of table.npy

The documents of a sequence follow each other without a gap and fill it to the last position.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.training.latents import read_header

TEXT, PAIR, SEGMENTS = 0, 1, 2
"""Kinds of documents: text or a piece of it; caption and picture; text and pictures in an order of their own."""
INDEX, TABLE, FORMAT = "index.json", "table.npy", "mlx-transfusion-shards-1"
DTYPES = {"U8": "<u1", "U16": "<u2", "I32": "<i4", "F16": "<f2", "F32": "<f4"}
REMEDY = "run shards check"
OPEN = 128
"""Shards that a process keeps open."""


@dataclass(frozen=True)
class PackedSequence:
    """One sequence as it stands in a shard."""

    tokens: np.ndarray
    """int32 [T]"""
    lengths: np.ndarray
    """int32 [documents]"""
    kinds: np.ndarray
    """uint8 [documents]"""
    pictures: np.ndarray
    """[pictures, V, h, w, C]"""


class ShardFolder:
    """A folder of shards, opened for reading; shards are opened when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError for a folder that is not there, not finished, or not one of shards."""
        self.path = folder
        index = read_index(folder)
        self.recipe: dict[str, Any] = index["recipe"]
        self.shards: list[dict[str, Any]] = index["shards"]
        self._ends = np.cumsum([shard["sequences"] for shard in self.shards])
        try:
            self.table = np.load(folder / TABLE, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / TABLE}: cannot read the table of shards: {error}") from error
        if self.table.shape != (self._ends[-1], 3):
            raise UserError(f"{folder / TABLE}: does not belong to {INDEX}: run shards build again")
        self._open: OrderedDict[str, dict[str, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.table)

    def sequence(self, number: int) -> PackedSequence:
        """One sequence by its number in the folder. Raises UserError for a shard that is missing or damaged."""
        place = int(np.searchsorted(self._ends, number, "right"))
        shard = self.shards[place]
        row = number - int(self._ends[place]) + shard["sequences"]
        try:
            part = self._shard(shard["name"])
            first, last = part["first_document"][row : row + 2].tolist()
            picture, end = part["first_picture"][row : row + 2].tolist()
            return PackedSequence(
                part["tokens"][row].astype(np.int32),
                part["length"][first:last],
                part["kind"][first:last],
                part["pictures"][picture:end],
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{self.path / shard['name']}: {error}; {REMEDY}") from error

    def _shard(self, name: str) -> dict[str, np.ndarray]:
        if name not in self._open:
            self._open[name] = map_arrays(self.path / name)
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]


def map_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, by memory map. Raises UserError, and ValueError where it is cut off."""
    header, offset = read_header(file, "shards", REMEDY)
    raw = np.memmap(file, np.uint8, "r")
    out: dict[str, np.ndarray] = {}
    for name, about in header.items():
        if name != "__metadata__":
            first, last = about["data_offsets"]
            flat = raw[offset + first : offset + last].view(DTYPES[about["dtype"]])
            out[name] = flat.reshape(about["shape"])
    return out


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a folder of shards. Raises UserError when there is none, or none of this format."""
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        if index["format"] != FORMAT or not index["shards"]:
            raise ValueError(f"format {index['format']}")
        dict(index["recipe"])
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: no folder of shards, or one that is not finished: run shards build"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: no index of shards: {error}") from error
    return dict(index)


def digest(file: Path) -> str:
    """SHA-256 of a file, as hex digits. Raises OSError."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fault_of(folder: Path, shard: dict[str, Any]) -> str | None:
    """What is wrong with a shard's file, by size and check sum, or None."""
    file = folder / shard["name"]
    try:
        if file.stat().st_size != shard["bytes"]:
            return f"has {file.stat().st_size} bytes instead of {shard['bytes']}"
        return None if digest(file) == shard["sha256"] else "does not have the check sum it was written with"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
