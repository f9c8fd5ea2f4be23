"""One optimiser step: forward, losses, gradients, update. Pure functions of the state, compiled once per shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_transfusion import losses, sequence, trigflow
from mlx_transfusion.model_io import save_model
from mlx_transfusion.models.patches import patchify
from mlx_transfusion.models.transfusion import TrainArrays, Transfusion
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.checkpoint import read_model
from mlx_transfusion.training.config import TrainConfig
from mlx_transfusion.training.data import Batch, Pictures
from mlx_transfusion.training.optimizer import ema_update
from mlx_transfusion.training.signals import Signals

Tree = Any


Targets = tuple[mx.array, ...]
"""What the model's predictions are compared with: [M, N, P] of each size."""


def to_arrays(batch: Batch, model: Transfusion) -> tuple[TrainArrays, Targets, mx.array, mx.array]:
    """Noise the pictures (before patchifying, arXiv 2408.11039, 3.2) and turn a batch into mlx arrays.

    Returns the model's input, the targets of its predictions, and text targets and weights [K].
    """
    c, p = model.config, batch.packed
    groups = [_noised(pictures, model) for pictures in batch.groups]
    patches, angle, _ = groups[0]
    arrays = TrainArrays(
        ids=mx.array(p.ids),
        is_image=mx.array((p.modality == sequence.IMAGE)[..., None]),
        patch_row=mx.array(p.patch_row),
        patch_index=mx.array(p.patch_index),
        text_index=mx.array(p.text_index),
        mask=mx.array(sequence.attention_mask(p.document, p.image, c.bidirectional)),
        patches=patches,
        angle=angle,
        more=tuple((x, a) for x, a, _ in groups[1:]),
    )
    targets = tuple(target for *_, target in groups)
    return arrays, targets, mx.array(p.text_target), mx.array(p.text_weight)


def _noised(pictures: Pictures, model: Transfusion) -> tuple[mx.array, mx.array, mx.array]:
    """Noisy patches [M, N, P], angles [M], and what the network is to predict [M, N, P]."""
    x0 = clean_patches(model, pictures.pixels)
    x, angle, z, velocity = noised(x0, pictures, model.config.patch_size)
    return x, angle, z if model.config.prediction == "epsilon" else velocity


def noised(
    x0: mx.array, pictures: Pictures, patch_size: int
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Of clean patches x0 [M, N, P] with their noise and angles: noisy ones, angles [M], noise, TrigFlow velocity."""
    z = patchify(mx.array(pictures.noise), patch_size)
    angle = mx.array(pictures.angle)
    a = angle[:, None, None]
    return trigflow.mix(x0, z, a), angle, z, trigflow.velocity_target(x0, z, a)


def in_precision(batch: TrainArrays, dtype: mx.Dtype) -> TrainArrays:
    """The same with patches in another precision."""
    more = tuple((patches.astype(dtype), angle) for patches, angle in batch.more)
    return batch._replace(patches=batch.patches.astype(dtype), more=more)


def clean_patches(model: Transfusion, pictures: np.ndarray) -> mx.array:
    """Pixels uint8 or latents float32 [M, H, W, C] -> clean patches [M, N, P]."""
    if pictures.dtype == np.uint8:
        return model.encode(mx.array(pictures).astype(mx.float32) / 255)
    return model.latent_patches(mx.array(pictures))


class Step:
    """The compiled gradient and update functions of one run: the diffusion objective."""

    def __init__(self, model: Transfusion, optimizer: optim.Optimizer, config: TrainConfig) -> None:
        self._model, self._optimizer, self._config = model, optimizer, config
        self._dtype = mx.bfloat16 if config.dtype == "bfloat16" else mx.float32
        self.signals: Signals | None = None
        state = [optimizer.state]
        self._gradients: Callable[..., Any] = self._plain_gradients
        self._update: Callable[..., Any] = self._plain_update
        if config.compile:
            self._gradients = mx.compile(self._plain_gradients)
            self._update = mx.compile(self._plain_update, inputs=state, outputs=state)

    @property
    def uses_lanes(self) -> bool:
        """Whether a pass may be cut into rows that run on several cores (lanes.py)."""
        return self._model.uses_lanes

    def initial_weights(self) -> Tree:
        """What is trained, as a tree of arrays."""
        return self._model.parameters()

    def model_weights(self, weights: Tree) -> Tree:
        """The part of the trained weights that is the model."""
        return weights

    def forward(self, batch: TrainArrays) -> tuple[mx.array, list[mx.array]]:
        """The model on packed rows: logits [K, V], and predictions [M, N, P] of each size."""
        return self._model.predict(batch)

    def save(
        self, folder: Path, model: Transfusion, tokenizer: Tokenizer, extra: Mapping[str, Any] | None
    ) -> object:
        """Write the model as it is into a folder that `load` reads. Raises UserError."""
        return save_model(folder, model, tokenizer, extra)

    def read_averaged(self, folder: Path) -> Tree:
        """What `save` wrote, as a tree like that of `model_weights`."""
        return read_model(folder)

    def load(self, data: Any, documents: Sequence[Any]) -> Any:
        """Arrays of one part of a step from a DataSet or a ShardSet (numpy only: it runs in a thread)."""
        return data.batch(documents)

    def count(self, data: Any, document: Any) -> tuple[int, int]:
        """(text-loss tokens, pictures in the loss) of a document: its part of the step's totals."""
        return data.count(document)

    def gradients(
        self, weights: Tree, batch: Any, text_total: int, image_total: int, step: int
    ) -> tuple[Tree, mx.array]:
        """Gradients of this part of the objective at `step` (0-based), and its summed losses.

        The totals are those of the whole optimiser step (all processes and accumulated parts), so that parts
        simply add up, weighted by their tokens. Returns (gradients, [text loss sum, image loss sum]).
        """
        arrays, targets, text_target, text_weight = to_arrays(batch, self._model)
        scale = mx.array([1 / max(1, text_total), self._config.image_loss_weight / max(1, image_total)])
        gradients, sums = self._gradients(weights, tuple(arrays), targets, text_target, text_weight, scale)
        return gradients, sums

    def loss(self, text: float, image: float, text_total: int, image_total: int) -> float:
        """The objective of a whole step, of its mean losses."""
        return text + self._config.image_loss_weight * image

    def update(self, gradients: Tree, weights: Tree, ema: Tree, decay: float) -> tuple[Tree, Tree, mx.array]:
        """Clip, step the optimiser, move the EMA. Returns (weights, ema, norm of the unclipped gradient)."""
        return self._update(gradients, weights, ema, mx.array(decay))

    def validate(self, data: Any, batches: int, size: int) -> dict[str, float]:
        """Mean losses of the model as it is on the first `batches` batches of `size` documents, per modality."""
        total = np.zeros(4)
        for i in range(batches):
            total += evaluate_batch(self._model, data.batch(data.documents(i, size)), self.forward)
        return {
            "valid_text_loss": float(total[0] / max(1, total[1])),
            "valid_image_loss": float(total[2] / max(1, total[3])),
        }

    def paint_grid(self, tokenizer: Tokenizer, file: Path) -> None:
        """Paint the prompts of the config with the model as it is, into one PNG."""
        from mlx_transfusion.training.preview import paint_grid

        paint_grid(self._model, tokenizer, self._config.sample, file)

    def _plain_gradients(
        self,
        weights: Tree,
        arrays: tuple[Any, ...],
        targets: Targets,
        text_target: mx.array,
        text_weight: mx.array,
        scale: mx.array,
    ) -> tuple[Tree, mx.array]:
        def objective(w: Tree) -> tuple[mx.array, mx.array]:
            self._model.update(cast(w, self._dtype))
            batch = TrainArrays(*arrays)
            logits, predictions = self.forward(in_precision(batch, self._dtype))
            text = losses.text_loss(logits.astype(mx.float32), text_target, text_weight)
            image = image_loss([p.astype(mx.float32) for p in predictions], targets, batch)
            sums = mx.stack([text, image])
            return (sums * scale).sum(), sums

        (_, sums), gradients = mx.value_and_grad(objective)(weights)
        self._model.update(weights)  # leave no tracers behind
        return gradients, sums

    def _plain_update(
        self, gradients: Tree, weights: Tree, ema: Tree, decay: mx.array
    ) -> tuple[Tree, Tree, mx.array]:
        # By name: the trees' own order changes with a resume and from process to process, and with it the last
        # bit of the norm.
        gradients = tree_unflatten(sorted(dict(tree_flatten(gradients)).items()))
        limit = self._config.optimizer.clip
        gradients, norm = optim.clip_grad_norm(gradients, limit if limit > 0 else math.inf)
        weights = self._optimizer.apply_gradients(gradients, weights)
        return weights, ema_update(ema, self.model_weights(weights), decay), norm


def image_loss(predictions: Sequence[mx.array], targets: Targets, batch: TrainArrays) -> mx.array:
    """Summed squared error of the pictures [M, N, P] of each size; a clean one, angle 0, is context and not learned.

    Every picture counts the same, however large.
    """
    each = [
        (losses.image_errors(prediction, target) * (angle > 0)).sum()
        for prediction, target, (_, angle) in zip(predictions, targets, batch.groups, strict=True)
    ]
    return sum(each[1:], each[0])


def cast(tree: Tree, dtype: mx.Dtype) -> Tree:
    """A tree of arrays in another floating-point type."""
    return tree_map(lambda w: w.astype(dtype), tree)


def evaluate_batch(
    model: Transfusion,
    batch: Batch,
    forward: Callable[[TrainArrays], tuple[mx.array, list[mx.array]]] | None = None,
) -> np.ndarray:
    """[text loss sum in nats, text tokens, image loss sum, images] of one batch without gradients."""
    arrays, targets, text_target, text_weight = to_arrays(batch, model)
    logits, predictions = (forward or model.predict)(arrays)
    text = losses.text_loss(logits, text_target, text_weight)
    image = image_loss(predictions, targets, arrays)
    pictures = sum((group.angle > 0).sum() for group in batch.groups)
    return np.array([text.item(), batch.text_targets, image.item(), pictures])
