"""Image files -> uint8 pixels of one size, on several threads, in the caller's order.

mlx-data carries the samples; decoding and resizing are Pillow's, inside a key_transform, because
mlx-data 0.1 drops the alpha channel without compositing it, gives one channel for gray images, cannot read
WebP, and its resize aliases when it shrinks (64 -> 32 is up to 69 levels away from the mean of 2x2 pixels).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps

from mlx_transfusion.errors import UserError
from mlx_transfusion.training.image_store import IMAGE_FORMATS, ImageRef

BYTES_PER_GIB = 1 << 30
ORIENTATION = 0x0112
"""The EXIF tag."""


def decode_image(data: bytes, name: str) -> Image.Image:
    """RGB image of any supported file, upright (EXIF), transparency composited on white.

    Raises UserError with `name` when the bytes are no readable image.
    """
    if not data:
        raise UserError(f"{name}: empty image file (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
    except (
        Exception
    ) as error:  # Pillow's readers raise SyntaxError, struct.error and others for corrupt files
        reason = str(error).split(" <_io")[0]
        raise UserError(f"{name}: cannot decode the image: {reason or type(error).__name__}") from error


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) of an image file as `decode_image` gives it, from its header. Raises UserError with `name`."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            lies = image.getexif().get(ORIENTATION, 1) >= 5  # the camera was turned by 90 degrees
            return (image.width, image.height) if lies else (image.height, image.width)
    except Exception as error:
        raise UserError(f"{name}: cannot decode the image: {type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if (
        image.mode.startswith("I;16") or image.mode == "I"
    ):  # Pillow would clip 16 bits to 255 instead of scaling
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(wide >> 8, 0, 255).astype(np.uint8))
    if image.mode == "F":  # Pillow would clip: a picture in [0, 1] would be black
        raise ValueError("floating-point pixels, whose white is not known: save it with 8 or 16 bits")
    if image.has_transparency_data:
        color = image.convert("RGBA")
        white = Image.new("RGBA", color.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, color).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resize so that the smaller side fits, and crop the centre: RGB image -> uint8 [H, W, 3].

    A whole shrinking factor is the mean over boxes. Any other factor is Lanczos, which Pillow widens by the
    factor when it shrinks, so that it does not alias.
    """
    if image.width * height <= image.height * width:  # integers decide: 32 / (32 / 96) need not be 96
        crop_width, crop_height = float(image.width), image.width * height / width
    else:
        crop_width, crop_height = image.height * width / height, float(image.height)
    # Whole pixels: a crop that starts between two pixels would blur an image that needs no resizing.
    left, top = math.floor((image.width - crop_width) / 2), math.floor((image.height - crop_height) / 2)
    box = (left, top, left + crop_width, top + crop_height)
    whole = crop_width % width == 0 and crop_height % height == 0
    filter_ = Image.Resampling.BOX if whole else Image.Resampling.LANCZOS
    return np.array(image.resize((width, height), filter_, box=box))  # a copy: mlx-data wants to write to it


def load_pixels(
    refs: Sequence[ImageRef], height: int, width: int, threads: int = 1, flips: Sequence[bool] | None = None
) -> np.ndarray:
    """Pixels of `refs` in their order: uint8 [N, H, W, 3]; the same for every number of threads.

    flips: per image, whether it is mirrored left to right. Raises UserError for the first image of the order
    that cannot be read or decoded, naming its file and row.
    """
    _check_size(height, width, threads)
    if not refs:
        return np.zeros((0, height, width, 3), np.uint8)
    problems: dict[int, str] = {}

    def load(index: np.ndarray) -> np.ndarray:
        # Messages are carried out by hand: mlx-data gives exceptions another type, and the first in time need
        # not be the first in order.
        i = int(index)
        try:
            return fit(decode_image(refs[i].read(), str(refs[i])), height, width)
        except Exception as error:  # noqa: BLE001
            problems[i] = str(error)
            return np.zeros((height, width, 3), np.uint8)

    pixels = np.stack(_in_order(load, len(refs), threads))
    if problems:
        raise UserError(problems[min(problems)])
    return flip(pixels, flips)


def _in_order(load: Callable[[np.ndarray], np.ndarray], count: int, threads: int) -> list[np.ndarray]:
    """load(0), load(1) ... load(count - 1), computed on `threads` threads."""
    try:
        import mlx.data  # late: reading rows and help texts needs no pipeline
    except ImportError:  # the PyTorch path: the same functions on the same threads, without the carrier
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(load, np.arange(count)))

    buffer = mlx.data.buffer_from_vector([{"image": i} for i in range(count)])  # type: ignore[attr-defined]
    buffer = buffer.key_transform("image", load)
    # Python's threads, not mlx-data's: the pools behind the prefetches of mlx-data 0.1 now and then wait for
    # ever, abort the process when a stream dies on one of their own threads, and leave OpenBLAS with one thread.
    with ThreadPoolExecutor(threads) as pool:
        return [sample["image"] for sample in pool.map(buffer.__getitem__, range(count))]


def flip(pixels: np.ndarray, flips: Sequence[bool] | None) -> np.ndarray:
    """Mirror left to right, in place, the images of pixels [N, H, W, C] whose flag is set (None: none)."""
    if flips is not None:
        if len(flips) != len(pixels):
            raise ValueError(f"{len(flips)} flips for {len(pixels)} images")
        chosen = np.flatnonzero(flips)
        pixels[chosen] = pixels[chosen][:, :, ::-1]
    return pixels


class PixelCache:
    """`load_pixels` that decodes each distinct image once, and keeps its pixels up to a limit of memory.

    A small data set costs nothing after its first pass. Nothing is thrown out at the limit: in passes over
    shuffled data every image is equally likely to come next.
    """

    def __init__(
        self, height: int, width: int, *, threads: int = 1, limit_bytes: int = BYTES_PER_GIB
    ) -> None:
        _check_size(height, width, threads)
        self.height, self.width, self.threads = height, width, threads
        self._capacity = limit_bytes // (height * width * 3)
        self._kept: dict[ImageRef, np.ndarray] = {}

    def __len__(self) -> int:
        """Number of images kept."""
        return len(self._kept)

    def load(self, refs: Sequence[ImageRef], flips: Sequence[bool] | None = None) -> np.ndarray:
        """As `load_pixels`: uint8 [N, H, W, 3], a fresh array that the caller may change."""
        missing = list(dict.fromkeys(ref for ref in refs if ref not in self._kept))
        loaded = dict(zip(missing, load_pixels(missing, self.height, self.width, self.threads), strict=True))
        for ref in missing[: max(0, self._capacity - len(self._kept))]:
            self._kept[ref] = loaded[ref].copy()  # a copy, as a view would keep the whole batch alive
        pixels = np.empty((len(refs), self.height, self.width, 3), np.uint8)
        for i, ref in enumerate(refs):
            pixels[i] = self._kept[ref] if ref in self._kept else loaded[ref]
        return flip(pixels, flips)


def _check_size(height: int, width: int, threads: int) -> None:
    if height < 1 or width < 1 or threads < 1:
        raise UserError(f"image size {height}x{width} on {threads} threads: all three must be at least 1")
