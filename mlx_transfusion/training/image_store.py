"""Where images lie: a folder or a tar, read by name from any thread."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mlx_transfusion.errors import UserError

# Named, because Pillow also opens formats that run programs (EPS) or hold no picture.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


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

    @property
    def names(self) -> list[str]:
        """The members in their order."""
        return list(self._members)

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


def open_images(path: Path) -> ImageStore:
    """The images in a folder or an uncompressed tar. Raises UserError when `path` is neither."""
    if path.is_dir():
        return ImageFolder(path)
    if path.is_file():
        return ImageTar(path)
    raise UserError(f"{path}: no such folder or tar file of images")


def image_problem(data: bytes) -> str:
    """Why `data` is no readable image, or "". Checks header and check sums; does not decode the pixels."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            image.verify()
    except Exception as error:  # noqa: BLE001 - Pillow raises SyntaxError, struct.error and others
        return f"cannot be decoded: {type(error).__name__}: {error}".split(" <_io")[0]
    return ""
