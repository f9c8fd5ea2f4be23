"""Peak memory of a few training steps, measured in a process of its own (Linux): prints bytes beside the model's.

python tests/torch_peak.py '{"hidden_size": 256, ...}' ROWS ROW_LENGTH RECOMPUTE
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlx_transfusion import sequence
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.sequence import Image, Text
from mlx_transfusion.torch import losses
from mlx_transfusion.torch.batch import to_example
from mlx_transfusion.torch.initial import initialise
from mlx_transfusion.torch.memory import Part, memory
from mlx_transfusion.torch.optimizer import Average, clip, make_optimizer
from mlx_transfusion.torch.parallel import build_sharded, make_mesh, processes
from mlx_transfusion.training.config import OptimizerConfig
from mlx_transfusion.training.data import Batch

BASE = {"vocab_size": 4096, "num_attention_heads": 4, "image_height": 32, "image_width": 32, "patch_size": 4}


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(key))
    return int(line.split()[1]) * 1024


def batch_of(config: ModelConfig, rows: int, length: int) -> Batch:
    """Rows of half text, half captioned pictures."""
    rng, n, documents, count = np.random.default_rng(0), config.patches_per_image, [], 0

    def text(k: int) -> Text:
        return Text(tuple(int(i) for i in rng.integers(6, config.vocab_size, k)))

    for _ in range(rows):
        left = length
        while left >= length // 2 and left >= n + 20:
            documents.append(sequence.document([text(16), Image(count, n)], config))
            count, left = count + 1, left - n - 20
        documents.append(sequence.document([text(left - 2)], config))
    packed = sequence.pack(documents, length)
    shape = (count, config.image_height, config.image_width, 3)
    return Batch(
        packed,
        rng.integers(0, 256, shape).astype(np.uint8),
        rng.normal(size=shape).astype(np.float32),
        np.ones(count, np.float32),
    )


def step(model: Any, optimizer: Any, average: Average, batch: Batch) -> None:
    example = to_example(batch, model.config, torch.device("cpu"))
    logits, prediction = model(example.arrays)
    loss = losses.text_loss(logits, example.text_target, example.text_weight) / 1000
    loss = loss + losses.image_errors(prediction, example.target).sum()
    del logits, prediction
    loss.backward()
    clip(model.parameters(), 1.0)
    optimizer.step()
    average.update(model, 0.9)
    optimizer.zero_grad()


def run(config: ModelConfig, world: Any, rows: int, length: int, recompute: bool) -> int:
    model = build_sharded(config, make_mesh(world), "float32", world.device)
    initialise(model, config, 0)
    model.checkpointing = int(recompute)
    optimizer = make_optimizer(OptimizerConfig(), model.parameters())
    average, batch = Average(model), batch_of(config, rows, length)
    for _ in range(2):
        step(model, optimizer, average, batch)
    return resident("VmHWM")


def main() -> None:
    changes, rows, length, recompute = json.loads(sys.argv[1]), *map(int, sys.argv[2:5])
    config = ModelConfig(**(BASE | changes))
    small = dataclasses.replace(
        config, hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64
    )
    with processes() as world:
        run(small, world, 1, 256, True)  # libraries and threads are there before anything is measured
        Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark afresh
        before = resident("VmRSS")
        measured = run(config, world, rows, length, bool(recompute)) - before
        packed = batch_of(config, rows, length)
        part = Part(packed.packed.ids.size, len(packed.packed.text_index), len(packed.angle), length)
        model = memory(config, part, 1, 4, bool(recompute), fused=False)
    print(json.dumps({"measured": measured, **model.to_dict()}))


if __name__ == "__main__":
    main()
