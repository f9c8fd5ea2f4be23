"""One step of teaching a language model to paint: a diffusion loss on pictures, and when to paint at all.

Only the picture side is trained. The text's passes are constants, read once for each prompt and kept, so a step costs
little more than the image tokens (LMFusion, arXiv 2412.15188, with all text weights frozen). The loss that
takes the text's place is that of one binary question before each answer: a picture, or words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from mlx_transfusion import losses
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import read_safetensors
from mlx_transfusion.model_io import Loaded, load, read_config
from mlx_transfusion.model_path import resolve
from mlx_transfusion.models.layers import KeysValues
from mlx_transfusion.models.llama_painter import LlamaPainter
from mlx_transfusion.models.llama_painter_config import LlamaPainterConfig
from mlx_transfusion.picture_side import PAINTER_FILE, write_folder
from mlx_transfusion.training.config import TrainConfig
from mlx_transfusion.training.data import DataSet, Document
from mlx_transfusion.training.painter_data import PainterBatch, painter_batch, wishes
from mlx_transfusion.training.pixels import BYTES_PER_GIB
from mlx_transfusion.training.prompt_memory import PromptMemory
from mlx_transfusion.training.step import Step, Tree, noised


class PainterArrays(NamedTuple):
    """A PainterBatch as mlx arrays."""

    lengths: mx.array  # int32 [M]
    weight: mx.array  # float32 [M]
    asked: mx.array  # float32 [M]
    x: mx.array  # noisy patches [M, N, P]
    angle: mx.array  # float32 [M]
    target: mx.array  # TrigFlow velocity [M, N, P]
    before: mx.array  # hidden states before the answers that are pictures [M, D]
    turns: mx.array  # and before those that are words [K, D]
    turn_weight: mx.array  # float32 [K]


class PainterStep(Step):
    """Gradients of the picture side of a language model."""

    _model: Any  # a LlamaPainter, which is no Transfusion

    def __init__(self, model: LlamaPainter, optimizer: optim.Optimizer, config: TrainConfig) -> None:
        super().__init__(model, optimizer, config)  # type: ignore[arg-type]
        if config.dtype != "float32" or config.gradient_checkpointing:
            raise UserError(
                "training config: the picture side of a language model trains in float32 without "
                "gradient_checkpointing: leave both keys out"
            )
        self._prompts = PromptMemory(model, int(config.data.cache_gib * BYTES_PER_GIB))
        self._painter_gradients = (
            mx.compile(self._plain_painter_gradients) if config.compile else self._plain_painter_gradients
        )

    def initial_weights(self) -> Tree:
        """The picture side."""
        return {"painter": self._model.parameters()["painter"]}

    def save(self, folder: Path, model: Any, tokenizer: Any, extra: Mapping[str, Any] | None) -> object:
        """Write the picture side beside the text's files of `init`. Raises UserError."""
        return write_folder(folder, resolve(self._config.init), model, extra)

    def read_averaged(self, folder: Path) -> Tree:
        """The picture side that `save` wrote."""
        return tree_unflatten(list(read_safetensors(folder / PAINTER_FILE).items()))

    def load(self, data: DataSet, documents: Sequence[Document]) -> PainterBatch:
        """Arrays of one part of a step (numpy only)."""
        return painter_batch(data, documents, self._model.config)

    def count(self, data: DataSet, document: Document) -> tuple[int, int]:
        """(turns whose answer is a question of words or picture, pictures) of a document."""
        return wishes(document, self._model.config), len(document.images)

    def gradients(
        self, weights: Tree, batch: Any, text_total: int, image_total: int, step: int
    ) -> tuple[Tree, mx.array]:
        """Gradients of this part of the objective, and its summed losses [words or picture, image]."""
        scale = mx.array([1 / max(1, text_total), self._config.image_loss_weight / max(1, image_total)])
        arrays, prefix = self._arrays(batch)
        return self._painter_gradients(weights, tuple(arrays), prefix, scale)

    def validate(self, data: DataSet, batches: int, size: int) -> dict[str, float]:
        """Mean losses of the model as it is on the first `batches` batches of `size` documents."""
        total = np.zeros(4)
        for i in range(batches):
            batch = self.load(data, data.documents(i, size))
            sums = np.array(self._losses(*self._arrays(batch)))
            pictures, turns = batch.painted.weight.sum(), batch.asked.sum() + batch.weight.sum()
            total += [sums[0], turns, sums[1], pictures]
        return {
            "valid_text_loss": float(total[0] / max(1, total[1])),
            "valid_image_loss": float(total[2] / max(1, total[3])),
        }

    def _plain_painter_gradients(
        self, weights: Tree, arrays: tuple[mx.array, ...], prefix: list[KeysValues], scale: mx.array
    ) -> tuple[Tree, mx.array]:
        def objective(w: Tree) -> tuple[mx.array, mx.array]:
            self._model.update(w)
            sums = self._losses(PainterArrays(*arrays), prefix)
            return (sums * scale).sum(), sums

        (_, sums), gradients = mx.value_and_grad(objective)(weights)
        self._model.update(weights)  # leave no tracers behind
        return gradients, sums

    def _losses(self, a: PainterArrays, prefix: list[KeysValues]) -> mx.array:
        """Summed losses [words or picture, image]. prefix: of the layers that pictures look at."""
        at = dict(zip(self._model.config.painter_layers, prefix, strict=True))
        made = self._model.paint(a.x, a.angle, at, a.lengths)
        image = (losses.image_errors(made, a.target) * a.weight).sum()
        wish = (_binary(self._model.wishes(a.before), 1) * a.asked).sum()
        if a.turns.size:
            wish = wish + (_binary(self._model.wishes(a.turns), 0) * a.turn_weight).sum()
        return mx.stack([wish, image])

    def _arrays(self, batch: PainterBatch) -> tuple[PainterArrays, list[KeysValues]]:
        """Noise the pictures, read the prompts, and hand everything to mlx."""
        p = batch.painted
        x0 = self._model.encode(mx.array(p.pictures.pixels).astype(mx.float32) / 255)
        x, angle, _, velocity = noised(x0, p.pictures, self._model.config.patch_size)
        prefix, before = self._prompts.read(p.ids, p.lengths, 1)  # the last token is begin-of-image
        _, turns = self._prompts.read(batch.ids, batch.lengths, 0)
        arrays = PainterArrays(
            mx.array(p.lengths),
            mx.array(p.weight),
            mx.array(batch.asked),
            x,
            angle,
            velocity,
            before,
            turns,
            mx.array(batch.weight),
        )
        mx.eval(arrays, prefix)
        return arrays, prefix


def _binary(log_odds: mx.array, wanted: int) -> mx.array:
    """Cross-entropy in nats of each answer: [B] -> [B]."""
    return nn.losses.binary_cross_entropy(log_odds, mx.full(log_odds.shape, wanted), reduction="none")


def painting_start(config: TrainConfig) -> Loaded | None:
    """The language model with a picture side that a run starts from; None where `init` is no such model."""
    if config.init is None or config.adapter is not None or config.consistency is not None:
        return None
    if config.model is not None and not Path(config.init).is_dir():
        return None  # a run of our own family goes on without the model that it began with
    if not isinstance(read_config(resolve(config.init))[0], LlamaPainterConfig):
        return None
    if config.model is not None:
        raise UserError(
            "[model]: a language model's picture side is chosen with `extend`: leave the table out"
        )
    return load(config.init, dtype=mx.float32)
