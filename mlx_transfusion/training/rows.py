"""Training rows: lines of a file or samples of a tar -> segments of text and references to images."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_transfusion.errors import UserError
from mlx_transfusion.training.image_store import ImageRef, ImageStore, ImageTar, image_problem, open_images
from mlx_transfusion.training.webdataset import samples

__all__ = ["ImageRef", "LoadedRows", "Row", "Source", "load_rows", "read_texts"]

EXPECTED_ROW = (
    'expected {"image", "text"}, {"text"}, {"segments": [{"text"}, {"image"}, ...]} or '
    '{"source", "instruction", "target"}'
)


Kind = Literal["pair", "text", "segments", "edit"]
_EDIT = {"source", "instruction", "target"}


@dataclass(frozen=True)
class Row:
    """One training document.

    kind: "pair" ({"image", "text"}: the caller chooses which comes first; here the text does), "text",
    "segments" (the order is the row's own), or "edit" (source picture, instruction, target picture). origin: (file,
    number from 1 of the line, or of the sample in a tar). meta: all other keys.
    """

    segments: list[str | ImageRef]
    kind: Kind
    origin: tuple[str, int]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A file of rows, and where its images lie.

    rows: .jsonl (a row each line), .txt (a text each line), either of them also with .gz behind, or .tar with
    pictures and captions side by side (`webdataset.samples`). images: a folder or an uncompressed tar; None means the
    folder of the file of rows, and of a .tar the tar itself. weight: how often rows of this source are drawn,
    relative to other sources.
    """

    rows: Path
    images: Path | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class LoadedRows:
    """The good rows of a source, and one message for each bad one that was skipped."""

    rows: list[Row]
    bad_rows: list[str]


class _BadRowError(Exception):
    pass


def load_rows(source: Source, *, skip_bad_rows: bool = False, check_images: bool = True) -> LoadedRows:
    """Read all rows of `source`.

    check_images: also open each distinct image and verify its format and check sums, without decoding it
    (that an image exists is always checked). Raises UserError naming file and line of the first bad row, or
    with `skip_bad_rows` keeps its message in `bad_rows`; always for a missing file or one without good rows.
    """
    if not source.rows.is_file():
        raise UserError(f"{source.rows}: no such file of rows (jsonl, txt or tar)")
    if not source.weight > 0:
        raise UserError(f"{source.rows}: weight must be positive, got {source.weight}")
    store = _store(source)
    checker = _ImageChecker(store, check_images)
    rows: list[Row] = []
    bad_rows: list[str] = []
    for number, record in _records(source, store):
        origin = f"{source.rows}:{number}"
        try:
            rows.append(_parse(record, checker, (str(source.rows), number)))
        except _BadRowError as error:
            if not skip_bad_rows:
                raise UserError(f"{origin}: {error}") from error.__cause__
            bad_rows.append(f"{origin}: {error}")
    if not rows:
        raise UserError(f"{source.rows}: no usable row ({len(bad_rows)} bad): {EXPECTED_ROW}")
    return LoadedRows(rows, bad_rows)


def _store(source: Source) -> ImageStore:
    if source.images is None and source.rows.suffix == ".tar":
        return ImageTar(source.rows)
    return open_images(source.images if source.images is not None else source.rows.parent)


def _records(source: Source, store: ImageStore) -> Iterator[tuple[int, Any]]:
    """Numbered rows, not yet read: lines of JSON, or {"text"} and {"image", "text"} objects."""
    path = source.rows
    if path.suffix == ".tar":
        yield from samples(store if isinstance(store, ImageTar) else ImageTar(path))
    elif Path(path.name.removesuffix(".gz")).suffix == ".txt":
        for number, line in _lines(path):
            yield number, {"text": line.decode("utf-8", "replace").strip()}
    else:
        yield from _lines(path)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Non-blank lines with their number. Bytes: one line that is no UTF-8 must not hide the others."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from error


def _parse(record: bytes | dict[str, Any], checker: _ImageChecker, origin: tuple[str, int]) -> Row:
    row = _json(record) if isinstance(record, bytes) else record
    keys = ({"image", "text", "segments"} | _EDIT) & row.keys() if isinstance(row, dict) else set()
    where = f"{origin[0]}:{origin[1]}"
    segments: list[str | ImageRef]
    kind: Kind
    if keys == {"image", "text"}:
        kind, segments = "pair", [_text(row["text"]), checker.ref(row["image"], where)]
    elif keys == {"text"}:
        kind, segments = "text", [_text(row["text"])]
    elif keys == {"segments"}:
        kind, segments = "segments", _segments(row["segments"], checker, where)
    elif keys == _EDIT:
        pictures = [checker.ref(row[key], where) for key in ("source", "target")]
        kind, segments = "edit", [pictures[0], _text(row["instruction"]), pictures[1]]
    else:
        found = f"keys {list(row)}" if isinstance(row, dict) else type(row).__name__
        raise _BadRowError(f"{EXPECTED_ROW}, found {found:.200}")
    return Row(segments, kind, origin, {key: row[key] for key in row if key not in keys})


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise _BadRowError(f"not valid JSON: {error}") from error


def _segments(items: object, checker: _ImageChecker, where: str) -> list[str | ImageRef]:
    if not isinstance(items, list) or not items:
        raise _BadRowError('"segments" must be a list of {"text"} and {"image"} objects that is not empty')
    segments: list[str | ImageRef] = []
    for index, item in enumerate(items):
        keys = {"image", "text"} & item.keys() if isinstance(item, dict) else set()
        if len(keys) != 1:
            raise _BadRowError(f'segment {index} must be an object with either "text" or "image"')
        segments.append(_text(item["text"]) if keys == {"text"} else checker.ref(item["image"], where))
    return segments


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _BadRowError(f'"text" must be a string that is not empty, got {value!r:.80}')
    return value


class _ImageChecker:
    """Makes references to images that exist; looks into each distinct one once."""

    def __init__(self, store: ImageStore, open_files: bool) -> None:
        self._store = store
        self._open_files = open_files
        self._verdicts: dict[str, str] = {}

    def ref(self, name: object, where: str) -> ImageRef:
        if not isinstance(name, str) or not name:
            raise _BadRowError(f'"image" must be a file name, got {name!r:.80}')
        if name not in self._verdicts:
            self._verdicts[name] = self._problem(name)
        if problem := self._verdicts[name]:
            raise _BadRowError(f"image {name!r} {problem}")
        return ImageRef(self._store, name, where)

    def _problem(self, name: str) -> str:
        try:
            if name not in self._store:
                return f"is not in {self._store.path}"
            if not self._open_files:
                return ""
            data = self._store.read(name)
        except (UserError, OSError) as error:  # OSError: the name is too long for the file system
            return f"cannot be read: {error}"
        return "is an empty file (0 bytes)" if not data else image_problem(data)


def read_texts(paths: Sequence[str | os.PathLike[str]]) -> Iterator[str]:
    """Texts of .txt files (one a line) and .jsonl files ("text" of each row, or of its "segments").

    Raises UserError naming file and line for a missing file, broken JSON, or a row without text.
    """
    for path in map(Path, paths):
        if path.suffix not in (".txt", ".jsonl"):
            raise UserError(f'{path}: expected a .txt file (one text a line) or a .jsonl file with "text"')
        for number, line in _lines(path):
            try:
                yield from [line.decode("utf-8")] if path.suffix == ".txt" else _row_texts(line)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 text: {error.reason}") from error
            except _BadRowError as error:
                raise UserError(f"{path}:{number}: {error}") from error


def _row_texts(line: bytes) -> list[str]:
    row = _json(line)
    if isinstance(row, dict):
        parts = row["segments"] if isinstance(row.get("segments"), list) else [row]
        texts = [
            part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)
        ]
        if texts:
            return texts
    raise _BadRowError('expected an object with "text"')
