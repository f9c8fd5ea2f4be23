"""Training rows: jsonl lines -> segments of text and references to images in a folder or a tar."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from mlx_transfusion.errors import UserError

# Named, because Pillow also opens formats that run programs (EPS) or hold no picture.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
EXPECTED_ROW = 'expected {"image", "text"}, {"text"} or {"segments": [{"text"}, {"image"}, ...]}'


class ImageStore(Protocol):
    """Where images lie: gives the bytes of an image by its name, from any thread."""

    path: Path

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes: ...


class ImageFolder:
    """Images as files below a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __contains__(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        """Bytes of the file. Raises UserError when it cannot be read."""
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise UserError(f"{self.path / name}: cannot read the image: {error.strerror}") from error


class ImageTar:
    """Images as members of an uncompressed tar, which is indexed once and then read at offsets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with tarfile.open(path, "r:") as tar:
                self._members = {
                    member.name.removeprefix("./"): (member.offset_data, member.size)
                    for member in tar
                    if member.isreg() and not member.issparse()
                }
            self._file = path.open("rb")
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{path}: not an uncompressed tar file: unpack it, or give a folder") from error
        except OSError as error:
            raise UserError(f"{path}: cannot read the tar file: {error.strerror}") from error

    def __contains__(self, name: str) -> bool:
        return name.removeprefix("./") in self._members

    def read(self, name: str) -> bytes:
        """Bytes of the member. Raises UserError when the tar does not hold (all of) it."""
        try:
            offset, size = self._members[name.removeprefix("./")]
        except KeyError:
            raise UserError(f"{self.path}: holds no {name}") from None
        data = os.pread(self._file.fileno(), size, offset)  # no shared file position: any thread may read
        if len(data) != size:
            raise UserError(f"{self.path}: cut off inside {name}: copy the tar file again")
        return data


@dataclass(frozen=True)
class ImageRef:
    """One image: its store and its name there. Equal when both are, whichever row it was named in."""

    source: ImageStore
    name: str
    origin: str = field(default="", compare=False)  # "file.jsonl:12", for messages

    def __str__(self) -> str:
        return f"{self.source.path / self.name}" + (f" ({self.origin})" if self.origin else "")

    def read(self) -> bytes:
        """Bytes of the image file. Raises UserError when they cannot be read."""
        return self.source.read(self.name)


@dataclass(frozen=True)
class Row:
    """One training document.

    kind: "pair" ({"image", "text"}: the caller chooses which comes first; here the text does), "text", or
    "segments" (the order is the row's own). origin: (file, line number from 1). meta: all other keys of the row.
    """

    segments: list[str | ImageRef]
    kind: Literal["pair", "text", "segments"]
    origin: tuple[str, int]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A jsonl file of rows, and where its images lie.

    images: a folder or an uncompressed tar; None means the folder of the jsonl file. weight: how often rows of
    this source are drawn, relative to other sources.
    """

    rows: Path
    images: Path | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class LoadedRows:
    """The good rows of a source, and one message for each bad one that was skipped."""

    rows: list[Row]
    bad_rows: list[str]


class _BadRow(Exception):
    pass


def load_rows(source: Source, *, skip_bad_rows: bool = False, check_images: bool = True) -> LoadedRows:
    """Read all rows of `source`.

    check_images: also open each distinct image and verify its format and check sums, without decoding it; that
    an image exists is always checked. Raises UserError naming file and line of the first bad row, or with
    `skip_bad_rows` keeps its message in `bad_rows`; always for a file that is missing or has no good row.
    """
    if not source.weight > 0:
        raise UserError(f"{source.rows}: weight must be positive, got {source.weight}")
    store = open_images(source.images if source.images is not None else source.rows.parent)
    checker = _ImageChecker(store, check_images)
    rows: list[Row] = []
    bad_rows: list[str] = []
    for number, line in _lines(source.rows):
        origin = f"{source.rows}:{number}"
        try:
            rows.append(_parse(line, checker, (str(source.rows), number)))
        except _BadRow as error:
            if not skip_bad_rows:
                raise UserError(f"{origin}: {error}") from error.__cause__
            bad_rows.append(f"{origin}: {error}")
    if not rows:
        raise UserError(f"{source.rows}: no usable row ({len(bad_rows)} bad): {EXPECTED_ROW}")
    return LoadedRows(rows, bad_rows)


def open_images(path: Path) -> ImageStore:
    """The images in a folder or an uncompressed tar. Raises UserError when `path` is neither."""
    if path.is_dir():
        return ImageFolder(path)
    if path.is_file():
        return ImageTar(path)
    raise UserError(f"{path}: no such folder or tar file of images")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Non-blank lines with their number. Bytes: one line that is no UTF-8 must not hide the others."""
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except OSError as error:
        raise UserError(f"{path}: cannot read the rows: {error.strerror}") from error


def _parse(line: bytes, checker: _ImageChecker, origin: tuple[str, int]) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise _BadRow("not valid JSON") from error
    keys = {"image", "text", "segments"} & row.keys() if isinstance(row, dict) else set()
    where = f"{origin[0]}:{origin[1]}"
    segments: list[str | ImageRef]
    kind: Literal["pair", "text", "segments"]
    if keys == {"image", "text"}:
        kind, segments = "pair", [_text(row["text"]), checker.ref(row["image"], where)]
    elif keys == {"text"}:
        kind, segments = "text", [_text(row["text"])]
    elif keys == {"segments"}:
        kind, segments = "segments", _segments(row["segments"], checker, where)
    else:
        found = f"keys {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        raise _BadRow(f"{EXPECTED_ROW}, found {found}")
    return Row(segments, kind, origin, {key: row[key] for key in row if key not in keys})


def _segments(items: object, checker: _ImageChecker, where: str) -> list[str | ImageRef]:
    if not isinstance(items, list) or not items:
        raise _BadRow('"segments" must be a list of {"text"} and {"image"} objects that is not empty')
    segments: list[str | ImageRef] = []
    for index, item in enumerate(items):
        keys = {"image", "text"} & item.keys() if isinstance(item, dict) else set()
        if len(keys) != 1:
            raise _BadRow(f'segment {index} must be an object with either "text" or "image"')
        segments.append(_text(item["text"]) if keys == {"text"} else checker.ref(item["image"], where))
    return segments


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _BadRow(f'"text" must be a string that is not empty, got {value!r:.80}')
    return value


class _ImageChecker:
    """Makes references to images that exist; looks into each distinct one once."""

    def __init__(self, store: ImageStore, open_files: bool) -> None:
        self._store = store
        self._open_files = open_files
        self._verdicts: dict[str, str] = {}

    def ref(self, name: object, where: str) -> ImageRef:
        if not isinstance(name, str) or not name:
            raise _BadRow(f'"image" must be a file name, got {name!r:.80}')
        if name not in self._verdicts:
            self._verdicts[name] = self._problem(name)
        if problem := self._verdicts[name]:
            raise _BadRow(f"image {name} {problem}")
        return ImageRef(self._store, name, where)

    def _problem(self, name: str) -> str:
        try:
            if name not in self._store:
                return f"is not in {self._store.path}"
            if not self._open_files:
                return ""
            data = self._store.read(name)
        except (UserError, ValueError, OSError) as error:  # ValueError: a NUL in the name; OSError: name too long
            return f"cannot be read: {error}"
        return "is an empty file (0 bytes)" if not data else image_problem(data)


def image_problem(data: bytes) -> str:
    """Why `data` is no readable image, or "". Checks the header and check sums; does not decode the pixels."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            image.verify()
    except Exception as error:  # Pillow's readers raise SyntaxError, struct.error and others for corrupt files
        return f"cannot be decoded: {type(error).__name__}: {error}".split(" <_io")[0]
    return ""
