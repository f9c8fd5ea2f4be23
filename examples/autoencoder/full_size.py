"""Make `data/` beside this file: the pictures of examples/emoji at their full 64x64 pixels.

    npm pack emoji-datasource-google@16.0.0
    python examples/autoencoder/full_size.py emoji-datasource-google-16.0.0.tgz

The package has Noto Emoji by Google (Apache-2.0) with transparent backgrounds; they are put on white. Rows are those
of examples/emoji/data, whose pictures are the same ones at 32x32.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tarfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
ROWS = HERE.parent / "emoji" / "data" / "emoji"
INSIDE = "package/img/google/64/"


def plain(name: str) -> str:
    """A file name without the variation selector, which the package writes and the rows do not."""
    return name.replace("-fe0f", "")


def on_white(png: bytes) -> Image.Image:
    """RGB, composited."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def read_package(package: Path) -> dict[str, bytes]:
    """Every picture by its plain name."""
    found = {}
    with tarfile.open(package) as tar:
        for member in tar:
            if member.name.startswith(INSIDE) and (file := tar.extractfile(member)) is not None:
                found[plain(member.name.removeprefix(INSIDE))] = file.read()
    return found


def write(split: str, pictures: dict[str, bytes]) -> None:
    """data/emoji/SPLIT.jsonl and SPLIT.tar."""
    target = HERE / "data" / "emoji"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROWS / f"{split}.jsonl", target / f"{split}.jsonl")
    names = [json.loads(line)["image"] for line in (ROWS / f"{split}.jsonl").read_text().splitlines()]
    with tarfile.open(target / f"{split}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(set(names)):
            png = io.BytesIO()
            on_white(pictures[plain(name)]).save(png, "PNG")
            info = tarfile.TarInfo(name)
            info.size = len(png.getvalue())
            tar.addfile(info, io.BytesIO(png.getvalue()))


def main() -> None:
    """Write data/emoji."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path)
    pictures = read_package(parser.parse_args().package)
    for split in ("train", "val"):
        write(split, pictures)


if __name__ == "__main__":
    main()
