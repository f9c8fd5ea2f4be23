"""Pictures as files: settings inside, whole or not at all, user images as in training."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mlx_transfusion import images
from mlx_transfusion.errors import UserError

RECORD = {
    "version": "1.2", "model": "emoji", "model_hash": "abc", "prompt": "rotes Herz \u2764 \u4e2d\nzwei",
    "seed": 7, "negative_prompt": "blue", "steps": 25, "sampler": "ddim", "guidance": 3.5, "width": 8,
    "height": 8,
}  # fmt: skip


def noise_picture(seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, channels), np.uint8)


def test_settings_and_pixels_round_trip(tmp_path: Path) -> None:
    pixels = noise_picture()
    path = images.save_png(tmp_path / "new" / "a.png", pixels, RECORD)
    assert images.read_record(path) == RECORD
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_parameters_text_for_image_viewers(tmp_path: Path) -> None:
    path = images.save_png(tmp_path / "a.png", noise_picture(), RECORD)
    with Image.open(path) as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        assert image.text["parameters"].splitlines() == [
            "rotes Herz \u2764 \u4e2d",
            "zwei",
            "Negative prompt: blue",
            "Steps: 25, Sampler: ddim, CFG scale: 3.5, Seed: 7, Model hash: abc, Model: emoji, Size: 8x8, "
            "Version: mlx-transfusion 1.2",
        ]


def test_gray_pictures(tmp_path: Path) -> None:
    pixels = noise_picture(channels=1)
    path = images.save_png(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels[..., 0])


@pytest.mark.parametrize("content", [b"not a picture", b"\x89PNG\r\n\x1a\n rest"])
def test_record_of_what_is_no_png(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match="not a readable PNG"):
        images.read_record(tmp_path / "a.png")


def test_record_of_files_without_one(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="holds no settings"):
        images.read_record(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="0 bytes"):
        images.read_record(tmp_path / "a.png")
    with pytest.raises(UserError, match="cannot read the image"):
        images.read_record(tmp_path / "none.png")
    info = PngImagePlugin.PngInfo()
    info.add_text(images.CHUNK, "{broken")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png", pnginfo=info)
    with pytest.raises(UserError, match="not a readable PNG"):
        images.read_record(tmp_path / "b.png")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = images.save_png(tmp_path / "a.png", noise_picture(1), RECORD)
    before = path.read_bytes()

    def full(self: Image.Image, fp: io.BufferedWriter, *_: object, **__: object) -> None:
        fp.write(b"half of a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        images.save_png(path, noise_picture(2), RECORD)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_user_images_of_every_kind_give_the_same_pixels(tmp_path: Path) -> None:
    pixels = noise_picture()
    path = images.save_png(tmp_path / "a.png", pixels)
    for image in (path, str(path), pixels, Image.open(path)):
        np.testing.assert_array_equal(images.load_pixels(image, 8, 8), pixels)
    gray = noise_picture(channels=1)
    expected = np.repeat(gray, 3, 2)
    np.testing.assert_array_equal(images.load_pixels(gray, 8, 8), expected)
    np.testing.assert_array_equal(images.load_pixels(gray[..., 0], 8, 8), expected)


def test_user_images_are_resized_and_cropped_to_the_centre() -> None:
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200
    np.testing.assert_array_equal(images.load_pixels(wide, 8, 8), np.full((8, 8, 3), 200))


@pytest.mark.parametrize(
    "array", [np.zeros((8, 8, 3), np.float32), np.zeros((8,), np.uint8), np.zeros((0, 8, 3), np.uint8),
              np.zeros((8, 8, 2), np.uint8)]
)  # fmt: skip
def test_arrays_that_are_no_image(array: np.ndarray) -> None:
    with pytest.raises(UserError, match="must be uint8"):
        images.load_pixels(array, 8, 8)


def test_grid() -> None:
    pictures = [np.full((4, 6, 3), value, np.uint8) for value in (10, 20, 30, 40, 50)]
    sheet = images.grid(pictures)
    assert sheet.shape == (2 * 4 + 2, 3 * 6 + 2 * 2, 3)
    assert [int(sheet[0, x, 0]) for x in (0, 8, 16)] == [10, 20, 30]
    assert [int(sheet[6, x, 0]) for x in (0, 8, 16)] == [40, 50, 255]
    assert (sheet[4:6] == 255).all()
    assert images.grid(pictures, columns=5, gap=0).shape == (4, 30, 3)
    with pytest.raises(UserError):
        images.grid([])


def test_free_path(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert images.free_path(path) == path
    path.touch()
    (tmp_path / "a_1.png").symlink_to("nowhere")
    assert images.free_path(path) == tmp_path / "a_2.png"
    assert images.free_path(path, {tmp_path / "a_2.png"}) == tmp_path / "a_3.png"


def test_check_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    images.check_folder(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        images.check_folder(tmp_path / "file" / "folder")


def test_record_is_plain_json_in_the_file(tmp_path: Path) -> None:
    """Any program can read it: the chunk is ASCII JSON under the package's name."""
    data = images.save_png(tmp_path / "a.png", noise_picture(), RECORD).read_bytes()
    at = data.index(b"tEXt" + images.CHUNK.encode() + b"\0")
    length = int.from_bytes(data[at - 4 : at], "big")
    assert json.loads(data[at + 4 + len(images.CHUNK) + 1 : at + 4 + length]) == RECORD
