from __future__ import annotations

import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_transfusion.errors import UserError
from mlx_transfusion.training.image_store import ImageRef, ImageTar, open_images
from mlx_transfusion.training.rows import Source, load_rows


def png(seed: int, size: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON; a str or bytes stands for itself."""
    lines = [
        row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
        for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good images, and one bad file of each kind."""
    (tmp_path / "sub").mkdir()
    good = png(0)
    files = {"a.png": good, "b.png": png(1), "sub/c.png": png(2)}
    bad = {
        "empty.png": b"",
        "text.png": b"hello",
        "cut.png": good[:-20],
        "flipped.png": good[:60] + b"~~" + good[62:],
    }
    for name, data in {**files, **bad}.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_the_three_forms_and_extra_keys(folder: Path) -> None:
    path = write_rows(
        folder / "rows.jsonl",
        [
            {"image": "a.png", "text": "a cat", "tags": ["x"], "group": "g"},
            {"text": "only text", "base": None},
            "",
            {"segments": [{"text": "one"}, {"image": "b.png"}, {"text": "two"}, {"image": "a.png"}]},
        ],
    )
    loaded = load_rows(Source(path))
    pair, text, segments = loaded.rows
    store = pair.segments[1].source if isinstance(pair.segments[1], ImageRef) else None
    assert store is not None
    assert pair.segments == ["a cat", ImageRef(store, "a.png")]
    assert pair.meta == {"tags": ["x"], "group": "g"}
    assert text.segments == ["only text"]
    assert text.meta == {"base": None}
    assert segments.segments == ["one", ImageRef(store, "b.png"), "two", ImageRef(store, "a.png")]
    assert [row.kind for row in loaded.rows] == ["pair", "text", "segments"]
    assert [row.origin for row in loaded.rows] == [(str(path), 1), (str(path), 2), (str(path), 4)]
    assert loaded.bad_rows == []


BAD_ROWS: list[tuple[Any, str]] = [
    ('{"text": "x"', "not valid JSON"),
    (b'{"text": "\xff"}', "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    (["text"], r"expected \{.*found list"),
    ({"image": "a.png"}, r"expected \{.*found keys \['image'\]"),
    ({"caption": "x"}, r"expected \{.*found keys \['caption'\]"),
    ({"text": "x", "segments": [{"text": "y"}]}, r"expected \{"),
    ({"text": ""}, '"text" must be a string that is not empty'),
    ({"text": " \n"}, '"text" must be'),
    ({"text": 3}, '"text" must be'),
    ({"image": 3, "text": "x"}, '"image" must be a file name'),
    ({"image": "", "text": "x"}, '"image" must be a file name'),
    ({"image": "sub", "text": "x"}, "image 'sub' is not in"),
    ({"image": "no.png", "text": "x"}, "image 'no.png' is not in"),
    ({"image": "n\u0000.png", "text": "x"}, "image 'n.x00.png'"),
    ({"image": "n" * 5000, "text": "x"}, "image 'nnn"),
    ({"image": "empty.png", "text": "x"}, "empty file"),
    ({"image": "text.png", "text": "x"}, "cannot be decoded"),
    ({"image": "cut.png", "text": "x"}, "cannot be decoded"),
    ({"image": "flipped.png", "text": "x"}, "cannot be decoded"),
    ({"segments": []}, '"segments" must be a list'),
    ({"segments": "x"}, '"segments" must be a list'),
    ({"segments": ["x"]}, "segment 0 must be an object"),
    ({"segments": [{"text": "x"}, {"text": "x", "image": "a.png"}]}, "segment 1 must be an object"),
    ({"segments": [{"image": "no.png"}]}, "image 'no.png' is not in"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_names_file_and_line(folder: Path, row: Any, message: str) -> None:
    path = write_rows(folder / "rows.jsonl", [{"text": "good"}, row, {"text": "also good"}])
    with pytest.raises(UserError, match=message) as error:
        load_rows(Source(path))
    assert str(error.value).startswith(f"{path}:2: ")
    assert "\n" not in str(error.value)
    assert "0x7" not in str(error.value)  # no address of a Python object
    skipped = load_rows(Source(path), skip_bad_rows=True)
    assert [r.segments for r in skipped.rows] == [["good"], ["also good"]]
    assert skipped.bad_rows == [str(error.value)]


def test_skipping_reports_every_bad_row(folder: Path) -> None:
    path = write_rows(folder / "rows.jsonl", [row for row, _ in BAD_ROWS] + [{"text": "good"}])
    loaded = load_rows(Source(path), skip_bad_rows=True)
    assert len(loaded.rows) == 1
    numbers = [int(message.removeprefix(f"{path}:").split(":")[0]) for message in loaded.bad_rows]
    assert numbers == list(range(1, len(BAD_ROWS) + 1))


def test_check_images_is_an_option_but_existence_is_not(folder: Path) -> None:
    path = write_rows(folder / "rows.jsonl", [{"image": "empty.png", "text": "x"}])
    assert len(load_rows(Source(path), check_images=False).rows) == 1
    write_rows(path, [{"image": "no.png", "text": "x"}])
    with pytest.raises(UserError, match="is not in"):
        load_rows(Source(path), check_images=False)


def test_file_level_errors(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no\.jsonl: no such file"):
        load_rows(Source(folder / "no.jsonl"))
    path = write_rows(folder / "rows.jsonl", [])
    with pytest.raises(UserError, match="no usable row"):
        load_rows(Source(path))
    write_rows(path, ["{"])
    with pytest.raises(UserError, match=r"no usable row \(1 bad\)"):
        load_rows(Source(path), skip_bad_rows=True)
    write_rows(path, [{"text": "x"}])
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="weight must be positive"):
            load_rows(Source(path, weight=weight))
    with pytest.raises(UserError, match="no such folder or tar"):
        load_rows(Source(path, images=folder / "nowhere"))
    with pytest.raises(UserError, match="not an uncompressed tar"):
        load_rows(Source(path, images=folder / "a.png"))


def test_tar_and_folder_hold_the_same(folder: Path) -> None:
    names = ["a.png", "sub/c.png"]
    files = {("./" + name if i else name): (folder / name).read_bytes() for i, name in enumerate(names)}
    tar = open_images(write_tar(folder / "images.tar", files))
    for name in names:
        assert name in tar
        assert ImageRef(tar, name).read() == ImageRef(open_images(folder), name).read()
    assert "no.png" not in tar
    with pytest.raises(UserError, match=r"images\.tar: holds no no\.png"):
        tar.read("no.png")


def test_bad_images_in_a_tar(folder: Path) -> None:
    tar = write_tar(folder / "images.tar", {"empty.png": b"", "text.png": b"hello", "a.png": png(0)})
    names = ["empty.png", "text.png", "no.png", "a.png"]
    path = write_rows(folder / "rows.jsonl", [{"image": name, "text": "x"} for name in names])
    loaded = load_rows(Source(path, tar), skip_bad_rows=True)
    assert [row.origin[1] for row in loaded.rows] == [4]
    assert len(loaded.bad_rows) == 3


def test_a_compressed_tar_is_refused(folder: Path) -> None:
    tar = write_tar(folder / "images.tar.gz", {"a.png": png(0)}, "w:gz")
    with pytest.raises(UserError, match="not an uncompressed tar"):
        open_images(tar)


def test_a_tar_cut_off_names_the_image(folder: Path) -> None:
    tar = write_tar(folder / "images.tar", {"a.png": png(0), "b.png": png(1, 64)})
    store = open_images(tar)
    os.truncate(tar, 4000)
    assert store.read("a.png") == png(0)
    with pytest.raises(UserError, match=r"cut off inside b\.png"):
        store.read("b.png")


@settings(deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-zé🙂]{1,130}\.png", fullmatch=True), st.binary(max_size=2000), max_size=6
    )
)
def test_tar_gives_every_member_back_from_many_threads(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    store = ImageTar(write_tar(tmp_path_factory.mktemp("tar") / "x.tar", files))
    with ThreadPoolExecutor(4) as pool:
        names = list(files) * 3
        assert list(pool.map(store.read, names)) == [files[name] for name in names]
