"""Worker: measures mlx-transfusion in this process and prints one JSON object. `compare.py` starts it."""

from __future__ import annotations

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import json
import sys
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from workload import PICTURE, STEP, Workload, timed

from mlx_transfusion import __version__, noise, sequence
from mlx_transfusion.blas import blas_in_use
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.flops import Work, forward_flops, step_flops, work_of
from mlx_transfusion.lanes import lanes
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.painting import paint
from mlx_transfusion.quantization import parameter_count
from mlx_transfusion.sampling import SAMPLERS
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.text_to_image import to_uint8
from mlx_transfusion.training.config import DataConfig, OptimizerConfig, SourceConfig, TrainConfig
from mlx_transfusion.training.data import Batch
from mlx_transfusion.training.optimizer import make_optimizer
from mlx_transfusion.training.step import Step

FIRST_TEXT_ID = 6
SAMPLER = "midpoint"


def measure(workload: Workload) -> dict[str, Any]:
    """Seconds of every timed call, and what was measured."""
    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    model = Transfusion(model_config(workload))
    mx.eval(model.parameters())
    trainer = Training(model, workload)
    seconds = {STEP: timed(trainer.step, workload.warm_up, workload.repeats)}
    model.eval()
    seconds[PICTURE] = timed(lambda: picture(model, workload), 1, workload.repeats)
    return {
        "parameters": parameter_count(model),
        "seconds": seconds,
        "positions": list(trainer.batch().packed.ids.shape),
        # With and without the caption, at each evaluation and once before.
        "flops": flops(model.config, trainer.batch(), workload),
        "passes": {PICTURE: 2 + 2 * SAMPLERS[SAMPLER].evaluations(workload.steps)},
        "versions": {
            "mlx-transfusion": __version__,
            "mlx": version("mlx"),
            "BLAS": blas_in_use().split(":")[0],
        },
    }


def model_config(workload: Workload) -> ModelConfig:
    """The paper's decoder with a linear patch encoder."""
    w = workload
    return ModelConfig(
        vocab_size=w.vocabulary, hidden_size=w.width, num_hidden_layers=w.layers,
        num_attention_heads=w.heads, intermediate_size=w.feed_forward, hidden_act=w.gate, image_height=w.image_size,
        image_width=w.image_size, image_channels=w.channels, patch_size=w.patch_size,
    )  # fmt: skip


class Training:
    """Training steps as `training/trainer.py` takes them, on captions and pictures that stay the same."""

    def __init__(self, model: Transfusion, workload: Workload) -> None:
        self._model, self._workload = model, workload
        config = TrainConfig(
            output="",
            tokenizer="",
            data=DataConfig(train=(SourceConfig(""),)),
            model={},
            optimizer=OptimizerConfig(clip=0),
        )
        self._optimizer = make_optimizer(config.optimizer)
        self._weights = self._average = model.parameters()
        self._optimizer.init(self._weights)
        self._step = Step(model, self._optimizer, config)
        self._steps = 0

    def batch(self) -> Batch:
        """Pack the documents and draw their noise and angles."""
        return training_batch(self._model.config, self._workload, self._steps)

    def step(self) -> None:
        """Forward, backward and AdamW (and the moving average, which belongs to our step)."""
        batch = self.batch()
        count = self._workload.batch
        with lanes(count):
            gradients, sums = self._step.gradients(self._weights, batch, batch.text_targets, count, 0)
            mx.eval(gradients, sums)
            self._weights, self._average, norm = self._step.update(
                gradients, self._weights, self._average, 0.999
            )
            mx.eval(self._weights, self._average, self._optimizer.state, norm)
        self._model.update(self._weights)
        self._steps += 1


def training_batch(config: ModelConfig, workload: Workload, step: int) -> Batch:
    """Captions and pictures, the same at every step, with the noise and the angles of this one."""
    count, size = workload.batch, workload.image_size
    documents = [
        sequence.document(
            [sequence.Text(captions(workload, i)), sequence.Image(i, config.patches_per_image)], config
        )
        for i in range(count)
    ]
    packed = sequence.pack(documents, workload.positions)
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, workload.channels), np.uint8)
    draws = [noise.normal(0, (step, i), pixels.shape[1:], "noise") for i in range(count)]
    angle = noise.uniform(0, step, (count,), "angle") * np.pi / 2
    return Batch(packed, pixels, np.stack(draws), angle.astype(np.float32))


def captions(workload: Workload, seed: int) -> tuple[int, ...]:
    """Random text token ids."""
    random = np.random.default_rng(seed)
    return tuple(random.integers(FIRST_TEXT_ID, workload.vocabulary, workload.text_tokens).tolist())


def flops(config: ModelConfig, batch: Batch, workload: Workload) -> dict[str, float]:
    """Operations of the products of a step, and of the evaluations of a picture (without its prefix)."""
    n = config.patches_per_image
    prefix = workload.text_tokens + 2
    of_picture = Work(positions=n, pairs=n * (n + prefix), text_targets=0, pictures=1)
    evaluations = 2 * SAMPLERS[SAMPLER].evaluations(workload.steps)
    return {
        STEP: step_flops(config, work_of(batch.packed)),
        PICTURE: evaluations * forward_flops(config, of_picture),
    }


def picture(model: Transfusion, workload: Workload) -> np.ndarray:
    """One picture from one caption: uint8 [H, W, C]."""
    c = model.config
    prefix = [c.bos_token_id, *captions(workload, 0), c.boi_token_id]
    settings = GenerationSettings(sampler=SAMPLER, steps=workload.steps, guidance=workload.guidance)
    return to_uint8(model.decode(paint(model, [prefix], [0], settings)))[0]


if __name__ == "__main__":
    print(json.dumps(measure(Workload.from_json(sys.argv[1]))))
