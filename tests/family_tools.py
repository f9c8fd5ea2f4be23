"""A tiny model folder of each converted family that can be trained, and a few pictures with captions to train on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import janusflow_tools
import mlx.core as mx
import numpy as np
import test_bagel
import test_bagel_convert
import test_monoformer
import test_show_o2
import test_show_o2_convert
import tokenizers
from PIL import Image

from mlx_transfusion.model_io import flat_parameters, save_model
from mlx_transfusion.models.janusflow import JanusFlow
from mlx_transfusion.models.lucidrains import Lucidrains
from mlx_transfusion.models.lucidrains_config import LucidrainsConfig, ModalityConfig
from mlx_transfusion.training.config import TrainConfig

FAMILIES = ("bagel", "janusflow", "monoformer", "show_o2", "transfusion_pytorch")
COLOURS = {"red": (220, 30, 30), "blue": (30, 40, 220)}


def model_folder(kind: str, folder: Path) -> Path:
    """A model of the goldens (of transfusion-pytorch one of pixels, random), as `convert` would leave it."""
    model, tokenizer = _model(kind)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "words.json"))
    return save_model(folder / "model", model, folder / "words.json")


def _model(kind: str) -> tuple[Any, tokenizers.Tokenizer]:
    if kind == "bagel":
        sizes = {"image_height": 16, "image_width": 16, "input_height": 8, "input_width": 8}
        return test_bagel.load_golden(**sizes), test_bagel_convert.tokenizer()
    if kind == "show_o2":
        return test_show_o2.load_golden(), test_show_o2_convert.tokenizer()
    if kind == "monoformer":
        return test_monoformer.load_golden("monoformer").model, words(164)
    mx.random.seed(4)
    if kind == "janusflow":
        config = dataclasses.replace(janusflow_tools.config(), autoencoder=janusflow_tools.CODER)
        model = JanusFlow(config)
        model.load_weights(list(flat_parameters(janusflow_tools.model()).items()), strict=False)
        return model, janusflow_tools.tokenizer()
    picture = ModalityConfig(12, axial_positions=True, axes=2, shape=(3, 4))
    return Lucidrains(LucidrainsConfig(60, 32, 2, 48, (picture,), dim_head=16, heads=2, patch_size=2)), words(
        194
    )


def words(size: int) -> tokenizers.Tokenizer:
    """Words that are the numbers of their ids, and a few of captions."""
    known = ["<unk>", "<s>", "</s>", *COLOURS, "square"]
    vocab = {word: i for i, word in enumerate([*known, *(f"w{i}" for i in range(size - len(known)))])}
    data = {
        "version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }  # fmt: skip
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def album(folder: Path) -> Path:
    """Two squares with captions and one text."""
    folder.mkdir(parents=True)
    rows = []
    for name, colour in COLOURS.items():
        pixels = np.full((12, 12, 3), 255, np.uint8)
        pixels[3:9, 2:8] = colour
        Image.fromarray(pixels).save(folder / f"{name}.png")
        rows.append({"image": f"{name}.png", "text": f"{name} square"})
    rows.append({"text": "red blue square"})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_config(start: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    """A run of a few steps on an album."""
    from mlx_transfusion.training.config import DataConfig, OptimizerConfig, SourceConfig

    rows = SourceConfig(str(data / "train.jsonl"), str(data))
    settings: dict[str, Any] = {
        "output": str(output), "tokenizer": str(start), "init": str(start), "steps": 4, "batch_size": 4,
        "data": DataConfig((rows,), caption_first=1.0, caption_drop=0.25), "save_every": 2, "log_every": 1,
        "ema": 0.5, "optimizer": OptimizerConfig(learning_rate=3e-3, warmup=1, weight_decay=0.0),
    }  # fmt: skip
    return TrainConfig(**(settings | changes))
