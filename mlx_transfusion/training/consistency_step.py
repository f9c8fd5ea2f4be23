"""One step of consistency training or distillation: sCM's or ECT's loss on pictures, next-token loss on text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_transfusion import consistency, losses
from mlx_transfusion.models.layers import KeysValues
from mlx_transfusion.models.transfusion import TrainArrays, Transfusion
from mlx_transfusion.picture_sizes import Size
from mlx_transfusion.sampling import guided
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.comparison import paint_rows
from mlx_transfusion.training.config import TrainConfig
from mlx_transfusion.training.consistency_config import ConsistencyConfig
from mlx_transfusion.training.data import DataSet, Document
from mlx_transfusion.training.prefix_arrays import (
    PictureArrays,
    TextArrays,
    arrays_of,
    painted,
    without_text,
)
from mlx_transfusion.training.prefix_data import (
    PrefixBatch,
    count,
    guidance_scales,
    of_size,
    prefix_batch,
    prefix_of,
)
from mlx_transfusion.training.signals import Signals
from mlx_transfusion.training.step import Step, Tree, cast, in_precision, to_arrays
from mlx_transfusion.training.tangents import States, method_of, picture_losses
from mlx_transfusion.training.teacher_text import TeacherLogits, divergence

TEACHER_SAMPLER = "dpmpp_2m"
"""How the teacher's pictures are painted that a student is compared with."""
LOSS_WEIGHT = "loss_weight"
"""Where the weighting network stands among the trained weights; it is no part of the model."""


class ConsistencyStep(Step):
    """Gradients of the consistency objective; the optimiser's step is that of diffusion training."""

    def __init__(
        self, model: Transfusion, optimizer: optim.Optimizer, config: TrainConfig, teacher: Transfusion | None
    ) -> None:
        super().__init__(model, optimizer, config)
        assert config.consistency is not None
        self._settings: ConsistencyConfig = config.consistency
        self._teacher = teacher
        # A painter that started from another model than its teacher has prefixes of its own.
        self._read_alike = teacher is not None and _same_weights(teacher, model)
        self._method = method_of(config.consistency, config.steps)
        self._loss_weight = consistency.LossWeight()
        self._valid: tuple[PictureArrays, mx.array] | None = None
        self._watched = self.signals = Signals()
        self._of_size: dict[Size | None, Callable[..., Any]] = {}

    def initial_weights(self) -> Tree:
        """The model's parameters or its painter's, and those of the weighting network when it is used."""
        weights = dict(self._model.parameters())
        if self._text_frozen:
            weights = {"painter": weights["painter"]}
        if self._settings.adaptive_weight:
            weights[LOSS_WEIGHT] = self._loss_weight.parameters()
        return weights

    @property
    def _text_frozen(self) -> bool:
        """Whether a painter is trained: then nothing that reads or writes changes, and text needs no loss."""
        return self._model.config.painter

    @property
    def _edits(self) -> bool:
        """Whether edits are distilled too; a student that is told its scale does not edit (editing.py)."""
        return self._settings.guidance_range is None

    def model_weights(self, weights: Tree) -> Tree:
        """The part of the trained weights that is the model."""
        return {name: tree for name, tree in weights.items() if name != LOSS_WEIGHT}

    def load(self, data: DataSet, documents: Sequence[Document]) -> PrefixBatch:
        """Arrays of one part of a step (numpy only)."""
        if self._text_frozen:
            documents = [d for d in documents if prefix_of(d, self._edits) is not None]
        c = self._model.config
        sizes = c.sizes if len(c.sizes) > 1 else (None,)
        batch = prefix_batch(data, documents, c.pad_token_id, sizes, self._edits)
        if (between := self._settings.guidance_range) is None:
            return batch
        own, *more = (
            replace(
                group,
                guidance=guidance_scales(
                    of_size(documents, group.size), len(group.ids), *between, self._config.seed
                ),
            )
            for group in batch.groups
        )
        return replace(own, more=tuple(more))

    def count(self, data: DataSet, document: Document) -> tuple[int, int]:
        """(text-loss tokens, pictures in the loss) of a document."""
        text, pictures = count(data, document, self._edits)
        return (0 if self._text_frozen else text), pictures

    def gradients(
        self, weights: Tree, batch: Any, text_total: int, image_total: int, step: int
    ) -> tuple[Tree, mx.array]:
        """Gradients of this part of the objective at `step`, and its summed losses [text, image]."""
        scale = mx.array([1 / max(1, text_total), self._config.image_loss_weight / max(1, image_total)])
        pace = mx.array(self._method.pace(step))
        parts = [self._size_gradients(weights, group, scale, pace) for group in batch.groups]
        gradients, sums = parts[0]
        for more, further in parts[1:]:  # the losses are divided by the step's totals: gradients add up
            gradients, sums = tree_map(mx.add, gradients, more), sums + further
        return gradients, sums

    def _size_gradients(
        self, weights: Tree, batch: PrefixBatch, scale: mx.array, pace: mx.array
    ) -> tuple[Tree, mx.array]:
        """As `gradients`, of the pictures of one size and of the rest that stands beside them."""
        pictures, texts = arrays_of(batch, self._model)
        rest = rest_text = None
        if batch.rest is not None:
            arrays, _, target, weight = to_arrays(batch.rest, self._model)
            rest, rest_text = tuple(arrays), tuple(TextArrays(arrays.text_index, target, weight))
        if (
            batch.size not in self._of_size
        ):  # each its own: sizes of equally many patches have the same shapes
            plain = partial(self._plain_consistency_gradients, size=batch.size)
            self._of_size[batch.size] = mx.compile(plain) if self._config.compile else plain
        gradients, sums, seen = self._of_size[batch.size](
            weights, tuple(pictures), tuple(texts), rest, rest_text, scale, pace
        )
        self._watched.add(batch.weight, batch.pictures.angle, seen)
        return gradients, sums

    def validate(self, data: DataSet, batches: int, size: int) -> dict[str, float]:
        """Text loss, and how far pictures of one and of two steps are from the teacher's on the same noise.

        The distance is the mean squared error in units of the data's variance. That of one step falls as long as
        distillation makes progress; two steps draw fresh noise on the way and so paint another picture where the
        prompt leaves a choice. Without a teacher there is the text loss alone.
        """
        out: dict[str, float] = {}
        if not self._text_frozen:
            out["valid_text_loss"] = super().validate(data, batches, size)["valid_text_loss"]
        if self._teacher is None or not self._settings.valid_pictures:
            return out
        if self._valid is None:
            self._valid = self._valid_pictures(data, size)
        p, wanted = self._valid
        for steps in (1, 1 + len(self._settings.angles)):
            made = painted(self._model, p, student_settings(self._settings, steps))
            out[f"valid_teacher_gap_{steps}"] = float(np.array((made - wanted).square().mean()))
        return out

    def paint_grid(self, tokenizer: Tokenizer, file: Path) -> None:
        """The prompts of the config in rows: the teacher's pictures, then two steps, one step, on the same noise."""
        rows = [
            (self._model, student_settings(self._settings, k)) for k in (1 + len(self._settings.angles), 1)
        ]
        if self._teacher is not None:
            rows.insert(0, (self._teacher, teacher_settings(self._settings)))
        paint_rows(rows, tokenizer, self._config.sample, file)

    def _valid_pictures(self, data: DataSet, size: int) -> tuple[PictureArrays, mx.array]:
        """Prefixes, and the teacher's clean patches [M, N, P] for them, both of the model's own size."""
        own, wanted = self._model.config.sizes[0], self._settings.valid_pictures
        found: list[Document] = []
        for i in range(wanted):
            documents = of_size(data.documents(i, size), own)
            found += [d for d in documents if prefix_of(d, self._edits) is not None]
            if len(found) >= wanted:
                break
        batch = prefix_batch(data, found[:wanted], self._model.config.pad_token_id, edits=self._edits)
        p, _ = arrays_of(batch, self._model)
        p = p.first(len(found[:wanted]))
        assert self._teacher is not None
        return p, painted(self._teacher, p, teacher_settings(self._settings))

    def _plain_consistency_gradients(
        self,
        weights: Tree,
        pictures: tuple[Any, ...],
        texts: tuple[mx.array, ...],
        rest: tuple[Any, ...] | None,
        rest_text: tuple[mx.array, ...] | None,
        scale: mx.array,
        pace: mx.array,
        size: Size | None = None,
    ) -> tuple[Tree, mx.array, mx.array]:
        p = PictureArrays(*pictures)
        model = _at(self._model, size)
        constant = model.read_prefix(*p.prefixes)[1] if self._text_frozen else None
        at = self._states(size, p, constant if self._read_alike else None)
        wanted = self._teacher_logits(size, p, TextArrays(*texts), rest)

        def objective(w: Tree) -> tuple[mx.array, tuple[mx.array, mx.array]]:
            self._model.update(self.model_weights(w))
            if constant is not None:
                image, seen = self._image_loss(size, w, p, constant, at, pace)
                return image * scale[1], (mx.stack([mx.zeros_like(image), image]), seen)
            hidden, prefix = model.read_prefix(*p.prefixes)
            image, seen = self._image_loss(size, w, p, prefix, at, pace)
            before = TextArrays(*texts)
            text = _text_loss(_text_logits(self._model, hidden, before), before, wanted.prefix)
            if rest is not None and rest_text is not None:
                self._model.update(cast(self.model_weights(w), self._dtype))
                batch = TrainArrays(*rest)
                logits, _ = self._model(in_precision(batch, self._dtype))
                text = text + _text_loss(logits.astype(mx.float32), TextArrays(*rest_text), wanted.rest)
            sums = mx.stack([text, image])
            return (sums * scale).sum(), (sums, seen)

        (_, (sums, seen)), gradients = mx.value_and_grad(objective)(weights)
        self._model.update(self.model_weights(weights))  # leave no tracers behind
        return gradients, sums, seen

    def _image_loss(
        self,
        size: Size | None,
        w: Tree,
        p: PictureArrays,
        prefix: list[KeysValues],
        at: States,
        pace: mx.array,
    ) -> tuple[mx.array, mx.array]:
        """Summed loss of the pictures, and what is watched of each: [5, M], the names in `Signals`."""
        network = partial(_at(self._model, size).paint, prefix=prefix, lengths=p.lengths, guidance=p.guidance)
        log_weight = mx.zeros_like(p.angle)
        if LOSS_WEIGHT in w:
            self._loss_weight.update(w[LOSS_WEIGHT])
            log_weight = self._loss_weight(p.angle)
        each, seen = picture_losses(self._method, network, at, pace, log_weight)
        return (each * p.weight).sum(), seen

    def _teacher_logits(
        self, size: Size | None, p: PictureArrays, texts: TextArrays, rest: tuple[Any, ...] | None
    ) -> TeacherLogits:
        """What the teacher writes in all places of the text loss; nothing where the next token counts."""
        if self._settings.text != "teacher":
            return TeacherLogits()
        teacher = self._teacher
        assert teacher is not None
        prefix = _text_logits(teacher, _at(teacher, size).read_prefix(*p.prefixes)[0], texts)
        return TeacherLogits(prefix, None if rest is None else teacher(TrainArrays(*rest))[0])

    def _states(self, size: Size | None, p: PictureArrays, prefix: list[KeysValues] | None) -> States:
        """The noisy pictures, where they go, and what else the method wants of the teacher, as constants."""
        cos_velocity = mx.stop_gradient(self._cos_velocity(p, prefix, size))

        def teacher(x: mx.array, angle: mx.array) -> mx.array:
            return self._cos_velocity(p._replace(x=x, angle=angle), prefix, size)

        return self._method.states(p.x, p.angle, cos_velocity, teacher)

    def _cos_velocity(
        self, p: PictureArrays, prefix: list[KeysValues] | None = None, size: Size | None = None
    ) -> mx.array:
        """cos(a) v [M, N, P]: the teacher's, guided, or that of the sample.

        Pictures that have scales of their own are each guided with their own. prefix: keys and values of the
        prefixes, where student and teacher read alike.
        """
        teacher = self._teacher
        scale: Any = self._settings.guidance if p.guidance is None else p.guidance[:, None, None]
        if teacher is None:
            return p.sample_velocity
        teacher = _at(teacher, size)
        if prefix is None:
            _, prefix = teacher.read_prefix(*p.prefixes)
        cond = teacher.cos_velocity(p.x, p.angle, prefix, p.lengths)
        if p.guidance is None and scale == 1:
            return cond
        null, lengths = without_text(teacher, p)
        return guided(cond, teacher.cos_velocity(p.x, p.angle, null, lengths), scale)


def _text_logits(model: Transfusion, hidden: mx.array, text: TextArrays) -> mx.array:
    """Logits [K, V] of the text-loss positions of prefixes whose final hidden states are [M, S, D]."""
    return model.lm_head(hidden.reshape(-1, hidden.shape[-1])[text.position])


def _text_loss(logits: mx.array, text: TextArrays, wanted: mx.array | None) -> mx.array:
    """Summed loss of logits [K, V] against the next tokens, or against a teacher's logits [K, V]."""
    if wanted is None:
        return losses.text_loss(logits, text.target, text.weight)
    return divergence(logits, wanted, text.weight)


def student_settings(config: ConsistencyConfig, steps: int) -> GenerationSettings:
    """How the student paints in one step, or with the config's angles; told the scale, where it is to be."""
    return GenerationSettings(
        sampler="consistency",
        steps=steps,
        angles=None if steps == 1 else config.angles,
        guidance=1.0 if config.guidance_range is None else config.guidance,
    )


def teacher_settings(config: ConsistencyConfig) -> GenerationSettings:
    """How the teacher paints what the student is compared with."""
    return GenerationSettings(sampler=TEACHER_SAMPLER, guidance=config.guidance)


def _at(model: Transfusion, size: Size | None) -> Transfusion:
    """The model for pictures of that size; None: of its own."""
    return model if size is None else model.resized(size)


def _same_weights(part: Transfusion, whole: Transfusion) -> bool:
    """Whether every weight of `part` is found in `whole` under its name, bit for bit."""
    ours = dict(tree_flatten(whole.parameters()))
    return all(
        name in ours and ours[name].shape == value.shape and bool(mx.array_equal(ours[name], value))
        for name, value in dict(tree_flatten(part.parameters())).items()
    )
