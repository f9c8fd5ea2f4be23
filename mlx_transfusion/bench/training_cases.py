"""Steps of training: the loop's own, on made-up captions and pictures of the model's size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_transfusion.bench.measure import Case
from mlx_transfusion.images import save_png
from mlx_transfusion.lanes import lanes
from mlx_transfusion.model_io import Loaded
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.training.checkpoint import TrainState
from mlx_transfusion.training.config import DataConfig, SourceConfig, TrainConfig
from mlx_transfusion.training.consistency_config import ConsistencyConfig
from mlx_transfusion.training.trainer import Trainer

DOCUMENTS = 16
CAPTION = "a made-up caption of several words"


def training_cases(loaded: Loaded, folder: Path) -> dict[str, Case]:
    """A diffusion step and a step of sCM distillation from the model itself; {} for what cannot be trained here.

    Trained are pixel models of our own family that were trained by diffusion. folder: for the data; stays small.
    """
    model = loaded.model
    if not isinstance(model, Transfusion) or model.picture_channels != 3 or "objective" in loaded.extra:
        return {}
    config = _config(loaded, folder)
    painter = ConsistencyConfig(
        teacher=str(loaded.path), student="painter", tangent_warmup=0, valid_pictures=0
    )
    return {
        f"training step, {DOCUMENTS} pictures": _case(Trainer(config)),
        f"sCM step, {DOCUMENTS} pictures": _case(
            Trainer(dataclasses.replace(config, init=None, consistency=painter))
        ),
    }


def _config(loaded: Loaded, folder: Path) -> TrainConfig:
    height, width = loaded.pictures.picture_size
    rng = np.random.default_rng(0)
    rows = folder / "rows.jsonl"
    with rows.open("w") as file:
        for i in range(DOCUMENTS):
            save_png(folder / f"{i}.png", rng.integers(0, 256, (height, width, 3), np.uint8))
            file.write(json.dumps({"image": f"{i}.png", "text": CAPTION}) + "\n")
    data = DataConfig(train=(SourceConfig(str(rows)),), caption_first=1.0, caption_drop=0.0)
    return TrainConfig(
        output=str(folder / "run"),
        tokenizer=str(loaded.tokenizer.save(folder)),
        data=data,
        init=str(loaded.path),
        batch_size=DOCUMENTS,
        sequence_length=max(64, 4 * loaded.config.layout.picture_tokens),
    )


def _case(trainer: Trainer) -> Case:
    """One optimiser step as the loop takes it, on documents that are loaded once."""
    step, data = trainer.step, trainer.train_data
    documents = data.documents(0, DOCUMENTS)
    batch = step.load(data, documents)
    counts = [step.count(data, d) for d in documents]
    text, pictures = sum(t for t, _ in counts), sum(p for _, p in counts)

    def call() -> None:
        state = trainer.state
        with lanes(DOCUMENTS):
            gradients, sums = step.gradients(state.weights, batch, text, pictures, state.step)
            mx.eval(gradients, sums)
            weights, ema, norm = step.update(gradients, state.weights, state.ema, trainer.config.ema)
            mx.eval(weights, ema, trainer.optimizer.state, norm)
        trainer.state = TrainState(state.step + 1, weights, ema)
        trainer.model.update(step.model_weights(weights))

    return Case(call)
