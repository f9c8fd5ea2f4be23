"""What the tests of the PyTorch path share: batches, twins of MLX models, the objective, processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlx.utils import tree_flatten

from mlx_transfusion import sequence
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.sequence import Image, Segment, Text
from mlx_transfusion.torch import losses
from mlx_transfusion.torch.batch import Example
from mlx_transfusion.torch.model import Transfusion
from mlx_transfusion.training.config import DataConfig, SourceConfig, TrainConfig
from mlx_transfusion.training.data import Batch

ROOT = Path(__file__).parent.parent


def to_torch_model(model: Any) -> Transfusion:
    """The twin of an MLX model, with copies of its weights."""
    twin = Transfusion(model.config)
    state = {name: torch.tensor(np.array(value)) for name, value in tree_flatten(model.parameters())}
    twin.load_state_dict(state, strict=True)
    return twin


def make_batch(config: ModelConfig, pictures: bool = True, seed: int = 0) -> Batch:
    """Captioned pictures in both orders, two pictures in one document, text, padding."""
    rng, n = np.random.default_rng(seed), config.patches_per_image

    def text(count: int) -> Text:
        return Text(tuple(int(i) for i in rng.integers(6, config.vocab_size, count)))

    documents: list[list[Segment]] = [
        sequence.document([text(7)], config),
        sequence.document([text(3)], config),
    ]
    count = 0
    if pictures:
        documents += [
            sequence.document([text(4), Image(0, n)], config),
            sequence.document([Image(1, n), text(5)], config),
            sequence.document([text(2), Image(2, n), Image(3, n), text(2)], config),
        ]
        count = 4
    packed = sequence.pack(documents, 32, row_multiple=2, text_multiple=16)
    shape = (count, config.image_height, config.image_width, config.image_channels)
    pixels = rng.integers(0, 256, shape).astype(np.uint8)
    angle = rng.uniform(0.1, 1.5, count).astype(np.float32)
    return Batch(packed, pixels, rng.normal(size=shape).astype(np.float32), angle)


def objective(model: Transfusion, example: Example, weight: float = 5.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a batch on its own, and the summed losses of text and pictures."""
    logits, prediction = model(example.arrays)
    text = losses.text_loss(logits, example.text_target, example.text_weight)
    image = (losses.image_errors(prediction, example.target) * example.image_weight).sum()
    loss = text / example.text_weight.sum() + weight * image / example.image_weight.sum().clamp(min=1)
    return loss, torch.stack([text, image]).detach()


def train_config(**changes: Any) -> TrainConfig:
    return TrainConfig("", "", DataConfig((SourceConfig(""),)), {}, **changes)


def attention_cases() -> list[tuple[np.ndarray, np.ndarray]]:
    """(document, image) arrays: text alone, a picture alone, padding alone, neighbours, many small documents."""

    def row(*runs: tuple[int, int, int]) -> tuple[list[int], list[int]]:
        document = [d for d, _, n in runs for _ in range(n)]
        image = [i for _, i, n in runs for _ in range(n)]
        return document, image

    def case(*rows: tuple[list[int], list[int]]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([d for d, _ in rows]), np.array([i for _, i in rows])

    return [
        case(row((0, -1, 40))),
        case(row((0, 0, 40))),
        case(row((-1, -1, 40))),
        case(row((0, -1, 3), (0, 0, 16), (0, -1, 2), (1, -1, 1), (1, 1, 16), (1, -1, 1), (-1, -1, 5))),
        case(row((0, 0, 16), (0, 1, 16), (0, -1, 12)), row((0, -1, 20), (1, 2, 16), (-1, -1, 8))),
        case(row(*[(d, -1, 5) for d in range(8)])),
        case(row((0, -1, 100), (0, 0, 64), (0, -1, 30), (1, 1, 64), (1, -1, 20), (-1, -1, 22))),
    ]


def job(
    toml: Path, output: Path, count: int, *changes: str, flags: Sequence[str] = (), before: str = ""
) -> tuple[int, list[str], str]:
    """A run of `count` processes for `start`; before: code that each of them executes first."""
    sets = [word for change in (f"output={output}", *changes) for word in ("--set", change)]
    return count, [str(toml), *flags, *sets], before


def start(*jobs: tuple[int, list[str], str]) -> subprocess.Popen[str]:
    """Start the runs, one after the other, in processes that are forked from one (`torch_together.py`)."""
    return subprocess.Popen(
        [sys.executable, "tests/torch_together.py", json.dumps(jobs)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def started(launched: subprocess.Popen[str]) -> list[int]:
    """The ids of the processes of the run that begins."""
    assert launched.stdout is not None
    return json.loads(launched.stdout.readline())


def finish(launched: subprocess.Popen[str]) -> str:
    """Wait for all runs, which must end well; their messages."""
    told = launched.communicate(timeout=400)[1]
    assert launched.returncode == 0, told
    return told


def run_losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
