from __future__ import annotations

import io
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_transfusion.errors import UserError
from mlx_transfusion.training.image_store import ImageFolder, ImageRef, open_images
from mlx_transfusion.training.pixels import PixelCache, decode_image, fit, load_pixels


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class Images(ImageFolder):
    """Images in memory, counting how often each is read."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(Path("memory"))
        self.files = files
        self.reads: Counter[str] = Counter()

    def read(self, name: str) -> bytes:
        self.reads[name] += 1
        return self.files[name]

    def refs(self) -> list[ImageRef]:
        return [ImageRef(self, name, f"rows.jsonl:{i}") for i, name in enumerate(self.files, start=1)]


def numbered(count: int, size: int = 16) -> Images:
    """Images of different cost, so that threads finish out of order."""
    sizes = [size * (1 + 7 * (i % 3 == 0)) for i in range(count)]
    return Images({f"{i}.png": encoded(Image.fromarray(noise(s, s, seed=i))) for i, s in enumerate(sizes)})


def test_halving_is_the_mean_of_two_by_two() -> None:
    pixels = noise(64, 64)
    mean = pixels.reshape(32, 2, 32, 2, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(fit(Image.fromarray(pixels), 32, 32) - mean).max() <= 1


def test_the_right_size_is_left_alone() -> None:
    pixels = noise(24, 32)
    assert (fit(Image.fromarray(pixels), 24, 32) == pixels).all()


@pytest.mark.parametrize("size", [48, 50, 63, 65, 96, 100, 333])
def test_shrinking_does_not_alias(size: int) -> None:
    checks = (np.indices((size, size)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = fit(Image.fromarray(np.stack([checks] * 3, -1)), 32, 32).astype(float)
    assert small.mean() == pytest.approx(127.5, abs=2)
    assert small[2:-2, 2:-2].std() < 64  # picking every so-many-th pixel gives 127


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40))
def test_any_size_fits_any_other(height: int, width: int, to_height: int, to_width: int) -> None:
    out = fit(Image.new("RGB", (width, height), (10, 200, 30)), to_height, to_width)
    assert out.shape == (to_height, to_width, 3)
    assert out.dtype == np.uint8
    assert (out == (10, 200, 30)).all()


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(0, 20), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_centre_crop_against_slices(factor: int, extra: int, height: int, width: int, tall: bool) -> None:
    rows, columns = height * factor + extra * tall, width * factor + extra * (not tall)
    pixels = noise(rows, columns, seed=extra)
    top, left = (rows - height * factor) // 2, (columns - width * factor) // 2
    crop = pixels[top : top + height * factor, left : left + width * factor].astype(float)
    mean = crop.reshape(height, factor, width, factor, 3).mean(axis=(1, 3))
    assert np.abs(fit(Image.fromarray(pixels), height, width) - mean).max() <= 1


def test_transparency_is_composited_on_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = 255, 0, 0, 255
    rgba[0, 1] = 255, 0, 0, 0
    rgba[1, 0] = 0, 0, 0, 128
    image = Image.fromarray(rgba)
    out = np.asarray(decode_image(encoded(image), "x"))
    assert out[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert np.abs(out[1, 0].astype(int) - 127).max() <= 1
    webp = np.asarray(decode_image(encoded(image, "WEBP", lossless=True), "x"))
    assert (webp == out).all()

    gray_alpha = Image.fromarray(np.array([[[0, 0], [0, 255]]], np.uint8))
    assert np.asarray(decode_image(encoded(gray_alpha), "x")).tolist() == [[[255] * 3, [0] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.putdata([0, 1])
    assert np.asarray(decode_image(encoded(palette, transparency=0), "x")).tolist() == [
        [[255] * 3, [4, 5, 6]]
    ]


def test_gray_and_deep_images_become_rgb() -> None:
    gray = noise(3, 5, 1)
    expected = np.stack([gray] * 3, -1)
    assert (np.asarray(decode_image(encoded(Image.fromarray(gray)), "x")) == expected).all()
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    assert (np.asarray(decode_image(encoded(deep), "x")) == expected).all()
    with pytest.raises(UserError, match="x: cannot decode the image: floating-point pixels"):
        decode_image(encoded(Image.fromarray(gray.astype(np.float32) / 255), "TIFF"), "x")
    bits = np.asarray(decode_image(encoded(Image.fromarray(gray > 99)), "x"))
    assert (bits == np.where(expected > 99, 255, 0)).all()


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("BMP", "RGB")]
)
def test_other_formats(kind: str, mode: str) -> None:
    image = Image.new("RGB", (16, 16), (250, 128, 60))
    out = np.asarray(decode_image(encoded(image.convert(mode), kind), "x")).astype(int)
    assert out.shape == (16, 16, 3)
    assert np.abs(out - np.asarray(image.convert(mode).convert("RGB"))).max() <= 4


def test_a_photo_is_turned_upright() -> None:
    image = Image.fromarray(np.array([[[255] * 3, [0] * 3]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees clockwise
    assert np.asarray(decode_image(encoded(image, exif=exif), "x"))[..., 0].tolist() == [[255], [0]]


def test_order_is_the_callers_for_every_number_of_threads() -> None:
    store = numbered(40)
    refs = store.refs()[::-1] + store.refs()[:5]
    expected = np.stack([fit(decode_image(ref.read(), ""), 8, 12) for ref in refs])
    for threads in (1, 2, 3, 8):
        pixels = load_pixels(refs, 8, 12, threads)
        assert pixels.dtype == np.uint8
        assert (pixels == expected).all()


def test_nothing_to_load() -> None:
    assert load_pixels([], 8, 12).shape == (0, 8, 12, 3)
    assert PixelCache(8, 12).load([]).shape == (0, 8, 12, 3)


def test_folder_and_tar_give_the_same_pixels(tmp_path: Path) -> None:
    files = numbered(6).files
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in files:
            tar.add(tmp_path / name, name)
    both = [
        load_pixels([ImageRef(open_images(path), name) for name in files], 8, 8, threads=2)
        for path in (tmp_path, tmp_path / "x.tar")
    ]
    assert (both[0] == both[1]).all()


def test_flips_are_per_image() -> None:
    refs = numbered(5).refs()
    plain = load_pixels(refs, 8, 8)
    flips = [False, True, True, False, True]
    for flipped in (load_pixels(refs, 8, 8, 2, flips), PixelCache(8, 8).load(refs, flips)):
        for i, flag in enumerate(flips):
            assert (flipped[i] == (plain[i, :, ::-1] if flag else plain[i])).all()
    with pytest.raises(ValueError, match="2 flips for 5"):
        load_pixels(refs, 8, 8, flips=[True, False])


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(
    ("data", "message"), [(b"", "0 bytes"), (b"hello", "cannot identify"), (None, "truncated")]
)
def test_the_first_bad_image_is_named(threads: int, data: bytes | None, message: str) -> None:
    store = numbered(20)
    for name in ("5.png", "6.png", "13.png"):
        store.files[name] = store.files[name][:-40] if data is None else data
    with pytest.raises(UserError, match=rf"5\.png \(rows\.jsonl:6\): .*{message}") as error:
        load_pixels(store.refs(), 8, 8, threads)
    assert "object at" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png: cannot read"):
        load_pixels([ImageRef(ImageFolder(tmp_path), "gone.png")], 8, 8)


def test_sizes_are_checked() -> None:
    for height, width, threads in ((0, 8, 1), (8, -1, 1), (8, 8, 0)):
        with pytest.raises(UserError, match="at least 1"):
            load_pixels([], height, width, threads)


def test_cache_decodes_each_image_once() -> None:
    store = numbered(10)
    refs = store.refs()
    cache = PixelCache(8, 8, threads=2)
    order = [refs[i] for i in (3, 1, 3, 9, 1)]
    expected = load_pixels(order, 8, 8)
    store.reads.clear()
    for _ in range(3):
        pixels = cache.load(order)
        assert (pixels == expected).all()
        pixels[:] = 0  # the caller's own copy
    assert store.reads == {"3.png": 1, "1.png": 1, "9.png": 1}
    assert len(cache) == 3


def test_cache_stays_within_its_limit() -> None:
    store = numbered(10)
    refs = store.refs()
    cache = PixelCache(8, 8, limit_bytes=4 * 8 * 8 * 3 + 5)
    expected = load_pixels(refs, 8, 8)
    store.reads.clear()
    for _ in range(2):
        assert (cache.load(refs) == expected).all()
    assert len(cache) == 4
    assert sorted(store.reads.values()) == [1] * 4 + [2] * 6
    assert all(pixels.base is None for pixels in cache._kept.values())  # no view that keeps a batch alive
    assert (PixelCache(8, 8, limit_bytes=0).load(refs) == expected).all()


def test_the_same_image_named_in_two_rows_is_one() -> None:
    store = numbered(1)
    cache = PixelCache(8, 8)
    cache.load([ImageRef(store, "0.png", "a:1"), ImageRef(store, "0.png", "b:2")])
    assert store.reads["0.png"] == 1


def test_ctrl_c_while_loading_ends_the_process_cleanly(tmp_path: Path) -> None:
    for name, data in numbered(8).files.items():
        (tmp_path / name).write_bytes(data)
    code = (
        "import sys; from pathlib import Path\n"
        "from mlx_transfusion.training.image_store import *; from mlx_transfusion.training.pixels import *\n"
        "refs = [ImageRef(ImageFolder(Path(sys.argv[1])), f'{i % 8}.png') for i in range(100)]\n"
        "while True: load_pixels(refs, 8, 8, 4); print('turn', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "turn\n"
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT  # and not SIGABRT
    assert messages.endswith("KeyboardInterrupt\n")


def test_no_image_is_read_twice_and_no_thread_goes_on() -> None:
    for count in (1, 2, 3, 9):
        for threads in (1, 4):
            store = numbered(count)
            load_pixels(store.refs(), 8, 8, threads)
            assert set(store.reads.values()) == {1}
