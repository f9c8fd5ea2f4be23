"""A folder of shards from many inputs: processes share the inputs, and the index is written when all are done."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.shards.recipe import Recipe
from mlx_transfusion.shards.shard import build_shard, write_whole
from mlx_transfusion.training.shard_files import FORMAT, INDEX, TABLE, fault_of, map_arrays, read_index

RECIPE = "recipe.json"
Unit = tuple[Recipe, Path, int, Path]
"""The arguments of `build_shard`."""
Record = dict[str, Any]
Runner = Callable[[Sequence[Unit]], Iterator[Record]]
"""Builds all units, in any order, and yields their records."""


def build(
    recipe: Recipe,
    folder: Path,
    sources: Sequence[Path],
    runner: Runner,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Build the shards that are missing and write the index, which is returned.

    Started again after a fault it goes on, and the bytes are those of a build that nothing disturbed. One build at a
    time in a folder. Raises UserError for bad input and for a folder of another recipe.
    """
    if not sources:
        raise UserError("shards build needs inputs: .jsonl, .txt (.gz) or .tar files")
    record = recipe.record()
    _prepare(folder, record)
    if left := sorted(folder.glob("shard-*.json"))[len(sources) :]:
        raise UserError(
            f"{folder}: holds {left[-1].stem} of a build with more inputs: give all of them, in their order"
        )
    units = [(recipe, folder, i, source) for i, source in enumerate(sources)]
    records = []
    for done in runner(units):
        records.append(done)
        progress(len(records))
    records.sort(key=lambda r: str(r["name"]))
    index = {"format": FORMAT, "recipe": record, "shards": records}
    _write_table(folder, records)
    write_whole(folder / INDEX, lambda file: file.write_text(json.dumps(index, indent=1) + "\n"))
    return index


def in_processes(count: int) -> Runner:
    """Runs units in `count` processes of this machine."""

    def run(units: Sequence[Unit]) -> Iterator[Record]:
        if count == 1:
            yield from (build_shard(*unit) for unit in units)
            return
        # Spawned: a fork of a process that has used mlx may hang.
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(build_shard, *unit) for unit in units]
            try:
                for future in as_completed(waiting):
                    yield future.result()
            except BrokenProcessPool as error:
                raise UserError(
                    "a process of the build was killed; if memory ran out, use fewer --processes or smaller inputs; "
                    "start again to go on: finished shards stay"
                ) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    return run


def check(folder: Path, count: int = 1) -> list[str]:
    """Read all shards and compare their check sums: one line for each fault. Raises UserError without an index."""
    shards = read_index(folder)["shards"]
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        faults = pool.map(fault_of, [folder] * len(shards), shards)
        return [f"{folder / s['name']}: {fault}" for s, fault in zip(shards, faults, strict=True) if fault]


def _prepare(folder: Path, record: dict[str, Any]) -> None:
    """Make the folder, note the recipe or compare it, and remove what a killed build left half written."""
    file = folder / RECIPE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.partial-*"):
            left.unlink()
        before = json.loads(file.read_text()) if file.is_file() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot build shards here: {error}") from error
    if before is None:
        write_whole(file, lambda f: f.write_text(json.dumps(record, indent=1) + "\n"))
    elif differs := [key for key in record if before.get(key) != record[key]]:
        key = differs[0]
        raise UserError(
            f"{folder}: its shards have {key} {before.get(key)}, this build has {record[key]}: choose another folder"
        )


def _write_table(folder: Path, records: Sequence[Record]) -> None:
    parts = [map_arrays(folder / r["name"])["table"] for r in records]

    def write(file: Path) -> None:
        with file.open("wb") as stream:
            np.save(stream, np.concatenate(parts))

    write_whole(folder / TABLE, write)
