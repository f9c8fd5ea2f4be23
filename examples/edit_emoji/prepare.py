"""Make `data/` beside this file: the edits whose two pictures examples/emoji has, and one tar with those pictures.

    python examples/edit_emoji/prepare.py

edits_train.jsonl and edits_val.jsonl hold rows {"source", "instruction", "target"} by file name. Twenty of the
training rows name a source that is in neither tar of examples/emoji; they are left out. data/train-100.jsonl and
data/train-400.jsonl are the first rows of one shuffle, for the learning curve.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

HERE = Path(__file__).parent
EMOJI = HERE.parent / "emoji" / "data" / "emoji"
SPLITS = ("train", "val")
PARTS = (100, 400)
"""Training edits of the learning curve, besides all."""


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    """Rows as a jsonl file."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_pictures() -> dict[str, bytes]:
    """Every picture of examples/emoji, of training and validation, by its name."""
    pictures = {}
    for split in SPLITS:
        with tarfile.open(EMOJI / f"{split}.tar") as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    pictures[member.name.removeprefix("./")] = file.read()
    return pictures


def write_tar(target: Path, pictures: dict[str, bytes]) -> None:
    """An uncompressed tar without dates and owners: equal pictures give equal bytes."""
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in sorted(pictures.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def main() -> None:
    """Write data/{train,val}.jsonl and data/pictures.tar."""
    target = HERE / "data"
    target.mkdir(exist_ok=True)
    pictures = read_pictures()
    used: set[str] = set()
    for split in SPLITS:
        rows = read_rows(HERE / f"edits_{split}.jsonl")
        whole = [row for row in rows if row["source"] in pictures and row["target"] in pictures]
        used |= {row[key] for row in whole for key in ("source", "target")}
        write_rows(target / f"{split}.jsonl", whole)
        print(f"{split}: {len(whole)} of {len(rows)} edits")
        if split == "train":
            random.Random(0).shuffle(whole)
            for count in PARTS:
                write_rows(target / f"train-{count}.jsonl", whole[:count])
    write_tar(target / "pictures.tar", {name: pictures[name] for name in used})


if __name__ == "__main__":
    main()
