"""One input -> one shard: the unit of work, a function of the recipe and the input's bytes alone.

A shard appears under its name when it is whole, and its record (`shard-00000.json`) after it. So a build that was
killed goes on with the inputs that have no record, and ends with the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_transfusion import sequence
from mlx_transfusion.errors import UserError
from mlx_transfusion.sequence import Image, Segment
from mlx_transfusion.shards.packing import Packed, Tokens, pack
from mlx_transfusion.shards.recipe import Recipe, tools_of
from mlx_transfusion.training.image_store import ImageRef
from mlx_transfusion.training.latents import DTYPES
from mlx_transfusion.training.pixels import decode_image, load_pixels
from mlx_transfusion.training.rows import Row, Source, load_rows
from mlx_transfusion.training.shard_files import PAIR, SEGMENTS, TEXT, digest

PART = 64
"""Pictures decoded at once."""
SHOWN = 20
"""Bad rows that a record tells about."""


def build_shard(recipe: Recipe, folder: Path, number: int, source: Path) -> dict[str, Any]:
    """Build shard `number` of `folder` from the rows of `source`, unless it is there; returns its record.

    Raises UserError for bad rows and pictures, and for a number that another input had before.
    """
    name = f"shard-{number:05d}.safetensors"
    about = folder / name.replace(".safetensors", ".json")
    if (done := _finished(folder / name, about, source)) is not None:
        return done
    documents, captions, bad_rows = _documents(recipe, source)
    try:
        packed = pack(documents, captions, recipe.sequence_length)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    arrays = _arrays(recipe, packed)
    write_whole(folder / name, lambda file: _save(arrays, file))
    record = {
        "name": name,
        "source": source.name,
        "source_bytes": source.stat().st_size,
        "sequences": len(packed.sequences),
        "rows": len(documents),
        "bad_rows": len(bad_rows),
        "bad": bad_rows[:SHOWN],
        "pictures": len(arrays["pictures"]),
        "repeated": packed.repeated,
        "bytes": (folder / name).stat().st_size,
        "sha256": digest(folder / name),
    }
    write_whole(about, lambda file: file.write_text(json.dumps(record, indent=1) + "\n"))
    return record


def _finished(file: Path, about: Path, source: Path) -> dict[str, Any] | None:
    """The record of a shard that is there, whole; None when it has to be built."""
    try:
        record: dict[str, Any] = json.loads(about.read_text())
        same = (record["source"], record["source_bytes"]) == (source.name, source.stat().st_size)
        whole = file.is_file() and file.stat().st_size == record["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not same:
        raise UserError(
            f"{file}: was built from {record['source']} of {record['source_bytes']:,} bytes, now its input is "
            f"{source}: give the same inputs in the same order, new ones last"
        )
    return record if whole else None


def _documents(recipe: Recipe, source: Path) -> tuple[list[Tokens], list[Tokens], list[str]]:
    """Documents of all rows, captions of its pairs as texts, and what is wrong with rows that were left out."""
    images = None if recipe.images is None else Path(recipe.images)
    loaded = load_rows(Source(source, images), skip_bad_rows=recipe.skip_bad_rows, check_images=False)
    documents: list[Tokens] = []
    captions: list[Tokens] = []
    bad_rows = list(loaded.bad_rows)
    for row in loaded.rows:
        try:
            documents.append(_document(recipe, row))
        except UserError as error:
            if not recipe.skip_bad_rows:
                raise
            bad_rows.append(str(error))
            continue
        if row.kind == "pair":
            ids = _ids(recipe, sequence.document([_text(recipe, row, row.segments[0])], recipe.model))
            captions.append(Tokens(ids, TEXT, (), row.origin[1]))
    if not documents:
        raise UserError(f"{source}: no usable row: {bad_rows[0]}")
    return documents, captions, bad_rows


def _document(recipe: Recipe, row: Row) -> Tokens:
    where = f"{row.origin[0]}:{row.origin[1]}"
    if row.kind == "edit":
        raise UserError(f"{where}: edits are no part of shards: train on them as rows")
    refs = tuple(s for s in row.segments if isinstance(s, ImageRef))
    picture = Image(0, recipe.model.patches_per_image)
    segments = [picture if isinstance(s, ImageRef) else _text(recipe, row, s) for s in row.segments]
    ids = _ids(recipe, sequence.document(segments, recipe.model))
    if refs and len(ids) > recipe.sequence_length:
        raise UserError(
            f"{where}: {len(ids)} tokens do not fit sequence_length {recipe.sequence_length}; raise it, shorten the "
            "text, or leave such rows out (data.skip_bad_rows)"
        )
    if recipe.skip_bad_rows:  # else the first picture that cannot be decoded ends the build when it is needed
        for ref in refs:
            decode_image(ref.read(), str(ref))
    kind = PAIR if row.kind == "pair" else SEGMENTS if refs else TEXT
    return Tokens(ids, kind, refs, row.origin[1])


def _text(recipe: Recipe, row: Row, text: str | ImageRef) -> sequence.Text:
    assert isinstance(text, str)
    ids = tuple(tools_of(recipe).tokenizer.encode(text))
    if not ids:
        raise UserError(
            f"{row.origin[0]}:{row.origin[1]}: the tokenizer makes nothing of the text {text!r:.60}"
        )
    return sequence.Text(ids)


def _ids(recipe: Recipe, segments: Sequence[Segment]) -> np.ndarray:
    pad = recipe.model.pad_token_id
    parts = [[pad] * s.patches if isinstance(s, Image) else s.ids for s in segments]
    return np.array([i for part in parts for i in part], np.int32)


def _arrays(recipe: Recipe, packed: Packed) -> dict[str, np.ndarray]:
    """The arrays of a shard, as `training/shard_files.py` lists them."""
    documents = [d for s in packed.sequences for d in s]
    refs = [ref for d in documents for ref in d.pictures]
    dtype = np.uint16 if recipe.model.vocab_size <= 1 << 16 else np.int32
    tokens = np.stack([np.concatenate([d.ids for d in s]) for s in packed.sequences]).astype(dtype)
    pictures = _latents(recipe, refs) if recipe.autoencoder is not None else _pixels(recipe, refs)
    return {
        "tokens": tokens,
        "first_document": _firsts([len(s) for s in packed.sequences]),
        "first_picture": _firsts([sum(len(d.pictures) for d in s) for s in packed.sequences]),
        "length": np.array([len(d.ids) for d in documents], np.int32),
        "kind": np.array([d.kind for d in documents], np.uint8),
        "origin": np.array([d.origin for d in documents], np.int32),
        "pictures": pictures,
        "table": np.array([_summary(recipe, s) for s in packed.sequences], np.uint16),
    }


def _firsts(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _summary(recipe: Recipe, documents: Sequence[Tokens]) -> tuple[int, int, int]:
    """Text targets, pictures and pairs of a sequence, before any caption is dropped."""
    pictures = sum(len(d.pictures) for d in documents)
    text = sum(len(d.ids) for d in documents) - pictures * recipe.model.patches_per_image
    # In each run of text every token but the first is predicted; a picture cuts one run into two.
    return text - len(documents) - pictures, pictures, sum(d.kind == PAIR for d in documents)


def _pixels(recipe: Recipe, refs: Sequence[ImageRef]) -> np.ndarray:
    m = recipe.model
    out = np.empty((len(refs), 1, m.image_height, m.image_width, 3), np.uint8)
    for start in range(0, len(refs), PART):
        out[start : start + PART, 0] = load_pixels(refs[start : start + PART], m.image_height, m.image_width)
    return out


def _latents(recipe: Recipe, refs: Sequence[ImageRef]) -> np.ndarray:
    from mlx_transfusion.autoencoder.latents import PART, encode_pixels  # late: it imports mlx

    autoencoder, m, views = tools_of(recipe).autoencoder, recipe.model, 1 + recipe.flips
    size = m.image_height * autoencoder.config.factor
    out = np.empty(
        (len(refs), views, m.image_height, m.image_width, m.image_channels), DTYPES[recipe.dtype][1]
    )
    for start in range(0, len(refs), PART):
        pixels = load_pixels(refs[start : start + PART], size, size)
        for view in range(views):
            shown = pixels[:, :, ::-1] if view else pixels
            out[start : start + PART, view] = encode_pixels(autoencoder, shown)
    return out


def _save(arrays: dict[str, np.ndarray], file: Path) -> None:
    from safetensors.numpy import save_file

    save_file(arrays, file)


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """The file whole or not at all."""
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target}: cannot write: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
