"""Make `data/` beside this file: the emoji of examples/emoji, each cut to one of three shapes.

    python examples/picture_sizes/cut_emoji.py

The emoji are squares of 32 pixels. By their place in the file every third one stays whole, the next loses its left
and right eighth (24x32), the next its top and bottom eighth (32x24).
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
EMOJI = HERE.parent / "emoji" / "data" / "emoji"
BOXES = ((0, 0, 32, 32), (4, 0, 28, 32), (0, 4, 32, 28))


def cut(data: bytes, box: tuple[int, int, int, int]) -> bytes:
    """A PNG of a part of a picture."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(data)).crop(box).save(stream, "PNG")
    return stream.getvalue()


def main() -> None:
    """Write data/{train,val}.{jsonl,tar}."""
    target = HERE / "data"
    target.mkdir(exist_ok=True)
    for split in ("train", "val"):
        lines = (EMOJI / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [{key: row[key] for key in ("image", "text")} for row in map(json.loads, lines)]
        (target / f"{split}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        box_of = {row["image"]: BOXES[i % 3] for i, row in enumerate(rows)}
        with tarfile.open(EMOJI / f"{split}.tar") as whole, tarfile.open(target / f"{split}.tar", "w") as tar:
            for member in whole:
                name, file = member.name.removeprefix("./"), whole.extractfile(member)
                if file is not None and name in box_of:
                    data = cut(file.read(), box_of[name])
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        print(f"{split}: {len(rows)} pictures")


if __name__ == "__main__":
    main()
