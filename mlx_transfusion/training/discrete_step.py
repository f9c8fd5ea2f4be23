"""One optimiser step of a model of discrete pictures: the loss of the next token, whatever it is.

L = mean of -log p over all predicted tokens, text and codes alike, plus z_loss times the mean of log(Z)^2, where Z is
the denominator of the softmax (arXiv 2405.09818, 2.3, after arXiv 2204.02311, 5).
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mlx_transfusion import losses
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import load
from mlx_transfusion.models.discrete import Discrete
from mlx_transfusion.models.discrete_config import DiscreteConfig
from mlx_transfusion.quantization import dequantize
from mlx_transfusion.training.config import TrainConfig
from mlx_transfusion.training.data import DataSet
from mlx_transfusion.training.discrete_data import CodeTargets, targets_of
from mlx_transfusion.training.step import Step, Tree, cast

Arrays = tuple[mx.array, ...]
"""The fields of CodeTargets, in their order."""


class DiscreteStep(Step):
    """Gradients of next-token loss. Sums of pictures are over the mean loss of each picture's codes."""

    _model: Any  # a Discrete, which is no Transfusion

    def __init__(self, model: Discrete, optimizer: optim.Optimizer, config: TrainConfig) -> None:
        super().__init__(model, optimizer, config)  # type: ignore[arg-type]
        plain = self._plain_token_gradients
        self._token_gradients = mx.compile(plain) if config.compile else plain

    def gradients(
        self, weights: Tree, batch: Any, text_total: int, image_total: int, step: int
    ) -> tuple[Tree, mx.array]:
        """Gradients of this part of the objective, and its summed losses [text, codes of a picture], in nats."""
        config = self._model.config
        scale = mx.array(1 / max(1, text_total + image_total * config.patches_per_image))
        return self._token_gradients(weights, to_arrays(targets_of(batch, config)), scale)

    def loss(self, text: float, image: float, text_total: int, image_total: int) -> float:
        """The objective without the denominator's term: the mean over all predicted tokens."""
        codes = image_total * self._model.config.patches_per_image
        return (text * text_total + image * codes) / max(1, text_total + codes)

    def validate(self, data: DataSet, batches: int, size: int) -> dict[str, float]:
        """Mean losses per token of the model as it is, on the first `batches` batches of `size` documents."""
        total = np.zeros(4)
        for i in range(batches):
            batch = data.batch(data.documents(i, size))
            text, image, _ = _sums(self._model, to_arrays(targets_of(batch, self._model.config)))
            total += np.array([text.item(), batch.text_targets, image.item(), (batch.angle > 0).sum()])
        return {
            "valid_text_loss": float(total[0] / max(1, total[1])),
            "valid_image_loss": float(total[2] / max(1, total[3])),
        }

    def _plain_token_gradients(self, weights: Tree, arrays: Arrays, scale: mx.array) -> tuple[Tree, mx.array]:
        def objective(w: Tree) -> tuple[mx.array, mx.array]:
            self._model.update(cast(w, self._dtype))
            text, image, z = _sums(self._model, arrays)
            tokens = text + image * self._model.config.patches_per_image
            return (tokens + self._config.z_loss * z) * scale, mx.stack([text, image])

        (_, sums), gradients = mx.value_and_grad(objective)(weights)
        self._model.update(weights)  # leave no tracers behind
        return gradients, sums


def to_arrays(targets: CodeTargets) -> Arrays:
    """The fields of CodeTargets as mlx arrays."""
    return tuple(mx.array(getattr(targets, f.name)) for f in fields(targets))


def _sums(model: Discrete, arrays: Arrays) -> tuple[mx.array, mx.array, mx.array]:
    """Summed losses: of text, of pictures (each the mean over its codes), and log(Z)^2 of all of them."""
    ids, mask, text_index, text_target, text_weight, code_index, code_target, code_weight = arrays
    hidden = model(ids, mask)
    hidden = hidden.reshape(-1, hidden.shape[-1])[mx.concatenate([text_index, code_index])]
    logits = model.logits(hidden).astype(mx.float32)
    weight = mx.concatenate([text_weight, code_weight])
    nats, log_z = losses.token_losses(logits, mx.concatenate([text_target, code_target]))
    nats, k = nats * weight, len(text_index)
    return nats[:k].sum(), nats[k:].sum() / model.config.patches_per_image, (log_z.square() * weight).sum()


def new_discrete(config: TrainConfig, shape: DiscreteConfig, start: str | None) -> Discrete:
    """Random weights from the seed, or those of the model `start`. Raises UserError when that has another shape."""
    if config.consistency is not None:
        raise UserError(f'[consistency]: a model of type "{shape.model_type}" has no diffusion to distil')
    if config.gradient_checkpointing:
        raise UserError(
            f'training config: a model of type "{shape.model_type}" has no gradient_checkpointing: leave it out'
        )
    mx.random.seed(config.seed)
    model = Discrete(shape)
    if start is not None:
        begin = load(start, dtype=mx.float32)
        dequantize(begin.model, mx.float32)
        theirs, ours = begin.config.to_dict(), shape.to_dict()
        if differs := [key for key in ours if theirs.get(key) != ours[key]]:
            raise UserError(
                f"init {start}: its {differs[0]} is {theirs.get(differs[0])}, [model] of this run says "
                f"{ours[differs[0]]}"
            )
        model.update(begin.model.parameters())
    mx.eval(model.parameters())
    return model
