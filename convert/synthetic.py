"""`python -m mlx_transfusion.convert.synthetic`: a checkpoint with true names and shapes, and zeros for weights.

It is built from a foreign config.json alone and takes no room on the disk (the numbers are a hole in the file), so
conversions of real sizes can be tried without the real checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer

from .account import Stored
from .families import converter, find
from .safetensors_file import TensorInfo
from .shards import NAMES, header
from .sources import Checkpoint, Source
from .table import Entry, Plan


class _Hollow:
    """A checkpoint that is yet to be made."""

    tensors: Mapping[str, TensorInfo] = {}

    def __init__(self, where: Path) -> None:
        self.where = where

    def read(self, name: str) -> mx.array:
        raise KeyError(name)


class _HollowSource(Source):
    """A folder with configs and no weights."""

    def open(self, name: str | Path = "") -> Checkpoint:
        path = self.folder / name if name else self.path
        return _Hollow(path / "model.safetensors" if path.is_dir() else path)


def plan_from_config(folder: Path, family: str | None = None, **flags: Any) -> Plan:
    """The plan of a folder that holds the small files of a checkpoint. Raises UserError as the family does."""
    source = _HollowSource(folder, folder.name, **flags)
    return (converter(family) if family else find(source)).plan(source)


def write_zeros(plan: Plan, dtype: mx.Dtype = mx.bfloat16, optional: bool = False) -> dict[Path, list[Entry]]:
    """Write the checkpoints of a plan at the places that its parts name; returns what each holds.

    optional: also tensors that a checkpoint may lack. Raises OSError.
    """
    out: dict[Path, list[Entry]] = {}
    for prefix, part in sorted(plan.parts.items(), key=lambda item: -len(item[0])):
        taken = {e.source for entries in out.values() for e in entries}
        own = [
            e for e in plan.entries
            if e.source.startswith(prefix) and e.source not in taken and (optional or not e.optional)
        ]  # fmt: skip
        own = list({e.source: e for e in own}.values())
        stored = [
            Stored(e.source.removeprefix(prefix), e.shape, mx.uint32 if e.packed else dtype) for e in own
        ]
        assert dtype in NAMES
        file = part.where
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            stream.write(header(stored))
            stream.truncate(stream.tell() + sum(t.nbytes for t in stored))
        out[file] = own
    return out


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with config.json; the weights are written into it.")],
    family: Annotated[str | None, typer.Option(help="See `convert --family`.")] = None,
    autoencoder: Annotated[Path | None, typer.Option(help="See `convert --autoencoder`.")] = None,
) -> None:
    """Write zeros with the names and shapes that a checkpoint of this config has."""
    for file, entries in write_zeros(plan_from_config(folder, family, autoencoder=autoencoder)).items():
        typer.echo(f"{file}: {len(entries)} tensors")


if __name__ == "__main__":
    typer.run(main)
