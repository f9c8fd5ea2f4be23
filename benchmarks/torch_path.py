"""Worker: a training step of our PyTorch path, eager or with torch.compile; prints one JSON object.

The same batches, model and optimiser as `ours.py`, on the CPU.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from ours import model_config, training_batch
from workload import STEP, Workload, timed

from mlx_transfusion.torch.model import Transfusion
from mlx_transfusion.torch.optimizer import Average, make_optimizer
from mlx_transfusion.torch.parallel import World, compile_blocks
from mlx_transfusion.torch.step import Step
from mlx_transfusion.training.config import DataConfig, OptimizerConfig, SourceConfig, TrainConfig


def measure(workload: Workload, threads: int, compiled: bool) -> dict[str, Any]:
    """Seconds of every timed step."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = TrainConfig(
        output="", tokenizer="", data=DataConfig(train=(SourceConfig(""),)), model={},
        optimizer=OptimizerConfig(clip=0),
    )  # fmt: skip
    model = Transfusion(model_config(workload))
    if compiled:
        compile_blocks(model)
    optimizer, average = make_optimizer(config.optimizer, model.parameters()), Average(model)
    step = Step(model, config, World(0, 1, torch.device("cpu")), flex=False)
    steps = iter(range(1_000_000))

    def call() -> None:
        batch = training_batch(model.config, workload, next(steps))
        optimizer.zero_grad(set_to_none=True)
        step.backward(batch, batch.text_targets, workload.batch, 0)
        optimizer.step()
        average.update(model, 0.999)

    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": {STEP: timed(call, workload.warm_up, workload.repeats)},
        "versions": {"torch": torch.__version__},
    }


if __name__ == "__main__":
    print(json.dumps(measure(Workload.from_json(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "compiled")))
