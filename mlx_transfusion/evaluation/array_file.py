"""Arrays kept in one .npz file under names that tell what they were computed from."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlx_transfusion.errors import UserError

CHUNK = 250
"""Rows that are kept together: what an interruption costs at most."""


def chunks(total: int) -> Iterator[slice]:
    """0..total-1 in runs of CHUNK."""
    return (slice(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK))


class ArrayFile:
    """Painted pictures and features of earlier runs; without a file nothing is kept.

    A name holds the hash of everything that decides the array, so a changed model, setting, caption or
    picture is computed anew beside the old one.
    """

    def __init__(self, path: Path | None) -> None:
        """Raises UserError for a file that is no .npz, and where none can be written."""
        self.path = path
        self._arrays: dict[str, np.ndarray] = {}
        if path is None:
            return
        if path.suffix != ".npz":
            raise UserError(f"{path}: expected a name that ends in .npz")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: cannot be written: {path.parent} is no folder that can be written")
        if path.exists():
            self._arrays = _read(path)

    def get(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of this name, computed and written to the file where it is not there yet."""
        if name not in self._arrays:
            self._arrays[name] = make()
            if self.path is not None:
                self._write(self.path)
        return self._arrays[name]

    def _write(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.partial")
        try:
            with temporary.open("wb") as file:
                np.savez(file, **self._arrays)  # type: ignore[arg-type]
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)


def array_name(kind: str, facts: dict[str, Any], *arrays: np.ndarray) -> str:
    """`kind` and the hash of plain data and of arrays."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return f"{kind}-{digest.hexdigest()[:32]}"


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: no .npz file of arrays, or damaged: delete it or give another name"
        ) from error
