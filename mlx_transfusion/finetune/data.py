"""A user's folder as training rows: pictures with captions beside them, or train.jsonl and valid.jsonl.

    DIR/cat.png, DIR/cat.txt, ...          each picture with its caption; sub-folders too
    DIR/train.jsonl [, DIR/valid.jsonl]    rows as in training: {"image", "text"}, {"source", "instruction",
                                           "target"}, {"text"}, {"segments"}; file names are relative to DIR, or
                                           in DIR/train.tar, DIR/valid.tar, or DIR/pictures.tar of both

What cannot be used is left out, each with one line that names the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_transfusion.errors import UserError
from mlx_transfusion.training.image_store import IMAGE_FORMATS
from mlx_transfusion.training.pixels import decode_image
from mlx_transfusion.training.rows import ImageRef, Row, Source, load_rows

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
ROWS = {"train": "train.jsonl", "valid": "valid.jsonl"}
MAX_PIXELS = 64_000_000


@dataclass
class UserData:
    """What is in a user's folder."""

    folder: Path
    captions: list[dict[str, str]] = field(default_factory=list)
    """{"image", "text"} of pictures with captions, where it has none."""
    rows: dict[str, list[Row]] = field(default_factory=dict)
    """The usable rows of "train" and "valid", of jsonl files."""
    images: dict[str, Path] = field(default_factory=dict)
    """Where the pictures of "train" and "valid" are: the folder, or a tar in it."""
    skipped: list[str] = field(default_factory=list)
    """One line for each thing that is left out."""
    notes: list[str] = field(default_factory=list)
    """One line for each thing that is used in part."""
    sizes: Counter[str] = field(default_factory=Counter)
    """How many pictures have which size, "640x480"."""
    modes: Counter[str] = field(default_factory=Counter)
    """How many pictures have which kind of pixels, by Pillow's names."""

    @property
    def texts(self) -> list[str]:
        """All captions and instructions of the training rows."""
        if self.captions:
            return [row["text"] for row in self.captions]
        return [s for row in self.rows.get("train", []) for s in row.segments if isinstance(s, str)]

    @property
    def count(self) -> int:
        """Number of training rows."""
        return len(self.captions) or len(self.rows.get("train", []))

    @property
    def edits(self) -> int:
        """Number of training rows that are edits."""
        return sum(row.kind == "edit" for row in self.rows.get("train", []))


def read_user_data(folder: Path, caption: str | None = None) -> UserData:
    """Look through a folder, and decode every picture once.

    caption: of pictures that have none of their own. Raises UserError when there is nothing to train on.
    """
    if not folder.is_dir():
        raise UserError(
            f"--data {folder}: expected a folder with pictures and captions, or with {ROWS['train']}"
        )
    data = UserData(folder)
    if (folder / ROWS["train"]).is_file():
        _read_jsonl(data)
    else:
        _read_captions(data, caption)
    if not data.count:
        reason = f": {data.skipped[0]}" if data.skipped else ""
        raise UserError(
            f"--data {folder}: nothing to train on: expected pictures with a .txt of the same name beside each, or "
            f"{ROWS['train']}{reason}"
        )
    return data


def write_rows(data: UserData, target: Path) -> dict[str, Path]:
    """Write what is usable as jsonl files into the folder `target`; returns those of "train" and "valid"."""
    plain = {split: [_plain(row) for row in rows] for split, rows in data.rows.items() if rows}
    if data.captions:
        plain["train"] = data.captions
    return {split: _write(target / ROWS[split], rows) for split, rows in plain.items()}


def _plain(row: Row) -> dict[str, Any]:
    """The jsonl line of a row."""
    plain = [s if isinstance(s, str) else s.name for s in row.segments]
    if row.kind == "edit":
        return dict(zip(("source", "instruction", "target"), plain, strict=True))
    if row.kind == "pair":
        return {"text": plain[0], "image": plain[1]}
    if row.kind == "text":
        return {"text": plain[0]}
    return {
        "segments": [
            {"text" if isinstance(s, str) else "image": p} for s, p in zip(row.segments, plain, strict=True)
        ]
    }


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    temporary = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"{file}: cannot write the rows: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return file


# ---- jsonl ----


def _read_jsonl(data: UserData) -> None:
    seen: dict[ImageRef, str] = {}
    for split, name in ROWS.items():
        file = data.folder / name
        if not file.is_file():
            continue
        tars = (data.folder / f"{split}.tar", data.folder / "pictures.tar")
        data.images[split] = next((tar for tar in tars if tar.is_file()), data.folder)
        loaded = load_rows(Source(file, data.images[split]), skip_bad_rows=True)
        data.skipped += loaded.bad_rows
        for row in loaded.rows:
            refs = [s for s in row.segments if isinstance(s, ImageRef)]
            for ref in refs:
                if ref not in seen:
                    seen[ref] = _look(data, str(ref), ref.read())
        bad = [seen[ref] for row in loaded.rows for ref in _refs(row) if seen[ref]]
        data.skipped += list(dict.fromkeys(bad))
        data.rows[split] = [row for row in loaded.rows if not any(seen[ref] for ref in _refs(row))]
        _check_duplicates(data, data.rows[split])


def _refs(row: Row) -> list[ImageRef]:
    return [s for s in row.segments if isinstance(s, ImageRef)]


def _check_duplicates(data: UserData, rows: list[Row]) -> None:
    first: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(s if isinstance(s, str) else s.name for s in row.segments)
        if key in first:
            where = f"{row.origin[0]}:{row.origin[1]}"
            data.notes.append(f"{where}: the same row as line {first[key].origin[1]}: it counts twice")
        first.setdefault(key, row)


# ---- pictures with captions ----


def _read_captions(data: UserData, caption: str | None) -> None:
    data.images["train"] = data.folder
    files = sorted(p for p in data.folder.rglob("*") if p.is_file() and not _hidden(p, data.folder))
    pictures = [p for p in files if p.suffix.lower() in SUFFIXES]
    known = {p.with_suffix("") for p in pictures}
    for text_file in (p for p in files if p.suffix.lower() == ".txt"):
        if text_file.with_suffix("") not in known:
            data.skipped.append(f"{text_file}: a caption without a picture")
    first: dict[tuple[str, str], Path] = {}
    for picture in pictures:
        text, problem = _caption(picture, caption)
        if not problem:
            content = _bytes(picture)
            problem = (
                _look(data, str(picture), content) if content is not None else f"{picture}: cannot be read"
            )
            key = (hashlib.sha256(content or b"").hexdigest(), text)
            if not problem and key in first:
                problem = f"{picture}: the same picture and caption as {first[key].name}"
            first.setdefault(key, picture)
        if problem:
            data.skipped.append(problem)
        else:
            data.captions.append({"image": picture.relative_to(data.folder).as_posix(), "text": text})


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _caption(picture: Path, default: str | None) -> tuple[str, str]:
    """The caption of a picture, or why it has none."""
    file = picture.with_suffix(".txt")
    if not file.is_file():
        if default is not None:
            return default, ""
        return "", f"{picture}: no caption: expected {file.name} beside it, or --caption for all"
    try:
        text = " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        return "", f"{file}: not UTF-8 text"
    except OSError as error:
        return "", f"{file}: cannot be read: {error.strerror}"
    return text, "" if text else f"{file}: an empty caption"


def _bytes(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _look(data: UserData, name: str, content: bytes) -> str:
    """Decode a picture and count it; returns why it cannot be used, or nothing."""
    from PIL import Image

    if not content:
        return f"{name}: an empty file (0 bytes)"
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            size, mode, frames = image.size, image.mode, getattr(image, "n_frames", 1)
    except Exception as error:  # noqa: BLE001 - Pillow raises SyntaxError, struct.error and others
        return f"{name}: cannot be decoded: {type(error).__name__}"
    if size[0] * size[1] > MAX_PIXELS:
        return (
            f"{name}: {size[0]}x{size[1]} is more than {MAX_PIXELS // 1_000_000} megapixels: make it smaller"
        )
    try:
        decode_image(content, name)
    except UserError as error:
        return str(error)
    data.sizes[f"{size[0]}x{size[1]}"] += 1
    data.modes[mode] += 1
    if frames > 1:
        data.notes.append(f"{name}: {frames} frames: the first one is used")
    return ""
