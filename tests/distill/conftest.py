"""A briefly trained teacher, and the file of a distillation of seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from tiny_training import DATA, MakeConfig, top, write_jsonl, write_run

from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import TrainConfig, load_train_config
from mlx_transfusion.training.trainer import train

DISTILL = """
[consistency]
teacher = "teacher"
adaptive_weight = true
guidance = 2.0
tangent_warmup = 2
valid_pictures = 3

[data]
caption_drop = 0.2

[[data.valid]]
rows = "pairs.jsonl"
images = "pictures"
"""
OPTIMIZER = """
[optimizer]
learning_rate = 1e-3
warmup = 2
"""

COLOURS = 48
"""Pictures of one colour each, 4x4 pixels. Their captions tell nothing, so a picture is decided by its noise, and
the way from noise to picture is smooth: a student of this size can learn it, and a posterior mean is far from it.
A patch has 12 numbers, fewer than the network is wide, or else no network could take the noise away."""
TEACHER = (
    "steps=300", "ema=0.98", "batch_size=16", "optimizer.learning_rate=5e-3", "data.caption_first=1.0",
    "model.image_height=4", "model.image_width=4", "model.patch_size=2", "model.image_std=0.58",
)  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """Data, a briefly trained teacher in `teacher`, and `distill.toml`."""
    folder = tmp_path_factory.mktemp("distill")
    toml = write_run(folder, tiny_tokenizer)
    rng = np.random.default_rng(0)
    for i in range(COLOURS):
        pixels = np.broadcast_to(rng.integers(0, 256, 3).astype(np.uint8), (4, 4, 3))
        PIL.Image.fromarray(pixels.copy()).save(folder / "pictures" / f"{i}.png")
    write_jsonl(
        folder / "pairs.jsonl",
        [{"image": f"{i}.png", "text": f"{('red', 'blue')[i % 2]} face"} for i in range(COLOURS)],
    )
    last = train(load_train_config(toml, [f"output={folder / 'first'}", *TEACHER]))
    last.rename(folder / "teacher")
    (folder / "distill.toml").write_text(top(output="students", batch_size=9) + DISTILL + DATA + OPTIMIZER)
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> MakeConfig:
    def make(*overrides: str, output: str = "students") -> TrainConfig:
        return load_train_config(folder / "distill.toml", [f"output={tmp_path / output}", *overrides])

    return make
