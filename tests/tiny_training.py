"""A training run of seconds: generated captions and pictures, one TOML file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_transfusion.tokenizer import Tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 230), "happy": (240, 220, 60)}
SHAPES = ["heart", "star", "moon", "face"]

TOML = """\
output = "runs"
tokenizer = "tokenizer.model"
steps = 6
batch_size = 6
sequence_length = 32
log_every = 1
save_every = 2
ema = 0.9

[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 48
image_height = 8
image_width = 8
patch_size = 4
time_frequencies = 8
max_position = 64

[[data.train]]
rows = "pairs.jsonl"
images = "pictures"
weight = 2

[[data.train]]
rows = "texts.jsonl"

[optimizer]
learning_rate = 3e-3
warmup = 2
"""


def write_run(folder: Path, tokenizer: Tokenizer) -> Path:
    """Sixteen captioned pictures, eight texts, a tokenizer, and `train.toml`, whose path is returned."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    pairs = []
    for colour, rgb in COLOURS.items():
        for k, shape in enumerate(SHAPES):
            pixels = np.full((8, 8, 3), 255, np.uint8)
            pixels[k : k + 4, 2:7] = rgb
            name = f"{colour}-{shape}.png"
            Image.fromarray(pixels).save(pictures / name)
            pairs.append({"image": name, "text": f"{colour} {shape}"})
    texts = [{"text": f"{c} {s} {s}"} for c in ("big", "sad") for s in SHAPES]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "texts.jsonl", texts)
    tokenizer.save(folder)
    toml = folder / "train.toml"
    toml.write_text(TOML)
    return toml


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
