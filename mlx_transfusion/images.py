"""Pictures as files: PNG with the settings that made it, grids, and reading users' images."""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, PngImagePlugin

from mlx_transfusion.errors import UserError

CHUNK = "mlx-transfusion"
"""Keyword of the PNG text chunk that holds the settings as JSON."""
CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
"""Numbers of channels that are a picture -> Pillow's mode."""

ImageLike = str | os.PathLike[str] | np.ndarray | Image.Image
"""A user's image: a file, uint8 pixels [H, W, 3] or [H, W], or a Pillow image."""


def save_png(
    path: str | os.PathLike[str], pixels: np.ndarray, record: Mapping[str, Any] | None = None
) -> Path:
    """Write uint8 pixels [H, W, C] as PNG, whole or not at all; returns the path.

    record: the settings, stored as JSON in the chunk CHUNK and as the "parameters" text that image viewers
    know. Raises UserError when the file cannot be written.
    """
    path = Path(path)
    info = PngImagePlugin.PngInfo()
    if record is not None:
        info.add_text(CHUNK, json.dumps(record))
        if "prompt" in record:
            info.add_text("parameters", parameters_text(record))
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}", delete=False) as file:
            temporary = Path(file.name)
            to_image(pixels).save(file, "PNG", pnginfo=info)
        temporary.chmod(0o644)  # NamedTemporaryFile makes files that only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write the picture: {error.strerror or error}") from error
    finally:  # after Ctrl-C too
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 pixels [H, W, C] with C of CHANNELS, or [H, W], as a Pillow image."""
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def parameters_text(record: Mapping[str, Any]) -> str:
    """The settings in the form that many image viewers read from the chunk "parameters"."""
    lines = [str(record["prompt"])]
    if record.get("negative_prompt"):
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    names = {
        "Steps": "steps", "Sampler": "sampler", "CFG scale": "guidance", "Seed": "seed",
        "Model hash": "model_hash", "Model": "model",
    }  # fmt: skip
    parts = [f"{name}: {record[key]}" for name, key in names.items() if key in record]
    if "width" in record and "height" in record:
        parts.append(f"Size: {record['width']}x{record['height']}")
    parts.append(f"Version: mlx-transfusion {record.get('version', '')}".rstrip())
    return "\n".join([*lines, ", ".join(parts)])


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a picture that this package made. Raises UserError for any other file."""
    data = read_bytes(path)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()  # text may stand behind the pixels
            text = getattr(image, "text", {}).get(CHUNK)
        record = None if text is None else json.loads(text)
    except (
        Exception
    ) as error:  # Pillow's readers raise SyntaxError, struct.error and others for corrupt files
        raise UserError(f"{path}: not a readable PNG with settings of {CHUNK}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: holds no settings: expected a PNG made by {CHUNK}")
    return record


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Content of a user's image file. Raises UserError when it is missing, unreadable or empty."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the image: {error.strerror}") from error
    if not data:
        raise UserError(f"{path}: empty image file (0 bytes)")
    return data


def load_pixels(image: ImageLike, height: int, width: int, pad: bool = False) -> np.ndarray:
    """A user's image as the model saw images in training: uint8 [H, W, 3], resized and cropped to the centre.

    pad: nothing is cropped, but `pad_square` makes a square of `height`. Raises UserError when it is no
    readable image.
    """
    picture = _open(image)
    if pad:
        return pad_square(picture, height)
    from mlx_transfusion.training.pixels import fit

    return fit(picture, height, width)


class Reader(Protocol):
    """A model that reads pictures (models/family.py)."""

    @property
    def pads_input(self) -> bool:
        """Whether nothing is cropped."""

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of what it reads."""

    def reading_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture of that size is brought to."""


def load_for(reader: Reader, image: ImageLike) -> np.ndarray:
    """A user's image as the model reads it: as `load_pixels`, in that of the model's sizes that it belongs to."""
    picture = _open(image)
    size = reader.input_size if reader.pads_input else reader.reading_size(picture.height, picture.width)
    return load_pixels(picture, *size, reader.pads_input)


def pad_square(image: Image.Image, size: int, least: int = 14) -> np.ndarray:
    """The whole RGB image in the middle of a grey square: uint8 [size, size, 3], its longer side over all of it.

    The shorter side has at least `least` pixels. Rounding, filter and grey are those of DeepSeek's VLM processor.
    """
    longest = max(image.width, image.height)
    width, height = (max(int(side / longest * size), least) for side in (image.width, image.height))
    square = np.full((size, size, 3), int(255 * 0.5), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square[top : top + height, left : left + width] = np.asarray(resized)
    return square


def _open(image: ImageLike) -> Image.Image:
    """A user's image in RGB, upright. Raises UserError when it is no readable image."""
    from mlx_transfusion.training.pixels import decode_image

    if isinstance(image, np.ndarray):
        right_shape = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in CHANNELS)
        if image.dtype != np.uint8 or not right_shape or not image.size:
            raise UserError(
                f"an image array must be uint8 [H, W, 3] or [H, W], not {image.dtype} {list(image.shape)}"
            )
        image = to_image(image)
    if isinstance(image, Image.Image):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return decode_image(stream.getvalue(), "image")
    return decode_image(read_bytes(image), str(image))


def grid(pictures: Sequence[np.ndarray], columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Pictures uint8 [H, W, C] of one size, in reading order on a white sheet with `gap` pixels between them.

    columns: None makes the sheet as square as possible.
    """
    if not pictures:
        raise UserError("a grid needs at least one picture")
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = -(-len(pictures) // columns)
    h, w, c = pictures[0].shape
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = (i // columns) * (h + gap), (i % columns) * (w + gap)
        sheet[y : y + h, x : x + w] = picture
    return sheet


def free_path(path: Path, taken: set[Path] | None = None) -> Path:
    """`path`, or with _1, _2, ... before the suffix when a file of that name exists or is in `taken`."""
    candidate, number = path, 0
    while candidate.exists() or candidate.is_symlink() or (taken is not None and candidate in taken):
        number += 1
        candidate = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return candidate


def check_folder(folder: Path) -> None:
    """Try whether files can be written into an output folder (which need not exist); leaves nothing behind.

    For use before work that takes long. Raises UserError.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".check"):
            pass
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be written: {error.strerror}") from error
