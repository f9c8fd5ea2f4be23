"""Make `data/` beside this file from the full-size data set: pictures at 32x32, rows as they are.

    python examples/emoji/make_data.py FOLDER

FOLDER holds emoji/{train,val}.{jsonl,tar} (64x64 pictures, rows {"image", "text", ...}) and
glosses/{train,val}.jsonl. Every picture is the mean over 2x2 pixels, which is what training at 32x32 reads from
the large one too, so both folders train the same model.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tarfile
from pathlib import Path

from PIL import Image

from mlx_transfusion.training.pixels import decode_image, fit

SIZE = 32


def shrink(source: Path, target: Path) -> None:
    """Copy a tar of pictures, each one SIZE x SIZE, without dates or owners: equal input gives equal bytes."""
    with tarfile.open(source) as big, tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as small:
        for member in sorted(big, key=lambda m: m.name):
            file = big.extractfile(member)
            if file is None:
                continue
            png = io.BytesIO()
            Image.fromarray(fit(decode_image(file.read(), member.name), SIZE, SIZE)).save(
                png, "PNG", optimize=True
            )
            info = tarfile.TarInfo(member.name)
            info.size = len(png.getvalue())
            small.addfile(info, io.BytesIO(png.getvalue()))


def main() -> None:
    """Write data/emoji and data/glosses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    source = parser.parse_args().folder
    target = Path(__file__).parent / "data"
    for kind in ("emoji", "glosses"):
        (target / kind).mkdir(parents=True, exist_ok=True)
        for rows in sorted((source / kind).glob("*.jsonl")):
            shutil.copyfile(rows, target / kind / rows.name)
    for split in ("train", "val"):
        shrink(source / "emoji" / f"{split}.tar", target / "emoji" / f"{split}.tar")


if __name__ == "__main__":
    main()
