"""A tiny data set with its evaluate.toml."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN, VAL = 12, 6
CAPTIONS = [f"{color} {thing}" for thing in ("heart", "star", "cat", "dog", "hand", "moon")
            for color in ("red", "green", "blue")]  # fmt: skip
TOML = """
data = "data"
train_texts = "texts/train.jsonl"
val_texts = "texts/val.jsonl"
description_tokens = 6
[train]
rows = "pairs/train.jsonl"
images = "pairs/train.tar"
[val]
rows = "pairs/val.jsonl"
[counts]
pictures = 5
descriptions = 5
losses = 5
texts = 8
[generation]
steps = 2
batch_size = 4
"""


def write_evaluation(folder: Path) -> Path:
    """evaluate.toml beside its data: pairs in a tar (train) and in a folder (val), and texts."""
    (folder / "evaluate.toml").write_text(TOML)
    (folder / "data/pairs").mkdir(parents=True)
    (folder / "data/texts").mkdir()
    rng = np.random.default_rng(0)
    files = {}
    for i in range(TRAIN + VAL):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(stream, "PNG")
        files[f"{i}.png"] = stream.getvalue()
    rows = [{"image": f"{i}.png", "text": CAPTIONS[i]} for i in range(TRAIN + VAL)]
    rows[1]["base"] = rows[TRAIN]["base"] = "0.png"  # a variant in either split
    with tarfile.open(folder / "data/pairs/train.tar", "w") as tar:
        for name in list(files)[:TRAIN]:
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            tar.addfile(member, io.BytesIO(files[name]))
    for name in list(files)[TRAIN:]:
        (folder / "data/pairs" / name).write_bytes(files[name])
    write_rows(folder / "data/pairs/train.jsonl", rows[:TRAIN])
    write_rows(folder / "data/pairs/val.jsonl", rows[TRAIN:])
    texts = [{"text": f"{a} {b}"} for a in CAPTIONS for b in CAPTIONS]
    write_rows(folder / "data/texts/train.jsonl", texts[:-20])
    write_rows(folder / "data/texts/val.jsonl", texts[-20:])
    return folder


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
