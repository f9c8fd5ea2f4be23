"""One step of fine-tuning or distilling a converted model, through the small interface of every family (family.py).

A picture's tokens run behind the frozen keys and values of its prompt. Fine-tuning moves their velocity towards that
of the sample at a random angle; distillation moves the consistency function as `training/tangents.py` says, along a
teacher's guided velocity. The families' own passes take lengths as plain numbers, so no step is compiled.
Shapes: M pictures of N patches of P numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mlx_transfusion import losses, trigflow
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.family import PictureFamily
from mlx_transfusion.painting import padded, paint, prefill
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import TrainConfig
from mlx_transfusion.training.consistency_step import student_settings, teacher_settings
from mlx_transfusion.training.data import DataSet, Document
from mlx_transfusion.training.family_data import FamilyBatch, family_batch
from mlx_transfusion.training.pixels import BYTES_PER_GIB
from mlx_transfusion.training.preview import paint_grid
from mlx_transfusion.training.signals import Signals
from mlx_transfusion.training.step import Step, Tree
from mlx_transfusion.training.tangents import Method, States, method_of, picture_losses


class Run(Protocol):
    """What a step asks about the model in hand."""

    @property
    def text_frozen(self) -> bool:
        """Whether nothing that reads or writes text is trained."""

    def weights(self) -> Tree:
        """What is trained."""

    def teaching(self) -> AbstractContextManager[PictureFamily]:
        """Inside, the model that is distilled."""

    def complete(self) -> AbstractContextManager[None]:
        """Inside, no module of the model is out of memory."""

    def save(self, folder: Path, model: Any, tokenizer: Tokenizer, extra: Mapping[str, Any] | None) -> object:
        """Write a folder that `load` reads. Raises UserError."""

    def read(self, folder: Path) -> Tree:
        """What `save` wrote, as the tree of what is trained."""


class FamilyStep(Step):
    """Gradients of pictures behind prompts, and of texts where those weights are trained."""

    _model: Any  # a PictureFamily

    def __init__(
        self, model: PictureFamily, run: Run, optimizer: optim.Optimizer, config: TrainConfig
    ) -> None:
        super().__init__(model, optimizer, config)  # type: ignore[arg-type]
        if config.gradient_checkpointing:
            raise UserError(
                f"training config: gradient_checkpointing is not there for a {model.config.model_type} model: "
                "leave it out"
            )
        self._run = run
        self._latents: dict[Any, mx.array] = {}
        self._latents_left = int(config.data.cache_gib * BYTES_PER_GIB)
        self._valid: tuple[list[list[int]], list[int], mx.array] | None = None
        self._method: Method | None = None
        if config.consistency is not None:
            self._method = method_of(config.consistency, config.steps)
            self.signals = Signals()

    def initial_weights(self) -> Tree:
        """An adapter's arrays, or those of the model that are not always frozen."""
        return self._run.weights()

    def save(self, folder: Path, model: Any, tokenizer: Any, extra: Mapping[str, Any] | None) -> object:
        """Write an adapter, or the whole model. Raises UserError."""
        return self._run.save(folder, model, tokenizer, extra)

    def read_averaged(self, folder: Path) -> Tree:
        """What `save` wrote, as the tree of what is trained."""
        return self._run.read(folder)

    def load(self, data: DataSet, documents: Sequence[Document]) -> FamilyBatch:
        """Arrays of one part of a step (numpy only)."""
        return family_batch(data, documents)

    def count(self, data: DataSet, document: Document) -> tuple[int, int]:
        """(text-loss tokens, pictures in the loss) of a document."""
        text, pictures = data.count(document)
        return (0 if self._run.text_frozen else text), pictures

    def gradients(
        self, weights: Tree, batch: Any, text_total: int, image_total: int, step: int
    ) -> tuple[Tree, mx.array]:
        """Gradients of this part of the objective at `step`, and its summed losses [text, image]."""
        scale = mx.array([1 / max(1, text_total), self._config.image_loss_weight / max(1, image_total)])
        states, target = self._states(batch)
        cache = self._prompts(self._model, batch) if self._run.text_frozen else None
        seen: list[mx.array] = []

        def objective(w: Tree) -> tuple[mx.array, mx.array]:
            self._model.update(w)
            image, text = mx.zeros(()), mx.zeros(())
            if batch.prefixes:
                behind = cache or self._prompts(self._model, batch)
                image = self._image_loss(states, target, behind, step, seen)
            if batch.texts and not self._run.text_frozen:
                text = self._text_loss(batch.texts)
            sums = mx.stack([text, image])
            return (sums * scale).sum(), sums

        (_, sums), gradients = mx.value_and_grad(objective)(weights)
        self._model.update(weights)  # leave no tracers behind
        if self.signals is not None and batch.prefixes:
            self.signals.add(np.ones(len(batch.prefixes)), batch.pictures.angle, seen[0])
        return gradients, sums

    def validate(self, data: DataSet, batches: int, size: int) -> dict[str, float]:
        """Mean losses of the model as it is; of a student how far its pictures are from its teacher's.

        As `ConsistencyStep.validate`: the mean squared error of one step and of the config's, on the same noise.
        """
        total = np.zeros(4)
        for i in range(batches):
            batch = self.load(data, data.documents(i, size))
            total += self._mean_parts(batch)
        out = {"valid_text_loss": float(total[0] / max(1, total[1]))}
        c = self._config.consistency
        if c is None:
            return out | {"valid_image_loss": float(total[2] / max(1, total[3]))}
        if c.teacher is None or not c.valid_pictures:
            return out
        if self._valid is None:
            self._valid = self._valid_pictures(data, size)
        prefixes, seeds, wanted = self._valid
        for steps in (1, 1 + len(c.angles)):
            made = paint(self._model, prefixes, seeds, student_settings(c, steps))
            out[f"valid_teacher_gap_{steps}"] = float(np.array((made - wanted).square().mean()))
        return out

    def paint_grid(self, tokenizer: Tokenizer, file: Path) -> None:
        """Paint the prompts of the config with the model as it is, into one PNG."""
        c = self._config.consistency
        chosen = () if c is None else (student_settings(c, 1 + len(c.angles)),)
        with self._run.complete():
            paint_grid(self._model, tokenizer, self._config.sample, file, *chosen)

    # ---- losses ---------------------------------------------------------------------------------------------------

    def _image_loss(
        self, at: States, target: mx.array, cache: KVCache, step: int, seen: list[mx.array]
    ) -> mx.array:
        """Summed loss of the pictures; what consistency training is watched by goes into `seen`."""

        def network(x: mx.array, angle: mx.array) -> mx.array:
            return self._model.velocity(x, angle, cache).astype(mx.float32)

        if self._method is None:
            return self._errors(network(at.x, at.angle), target, at.angle).sum()
        pace = mx.array(self._method.pace(step))
        each, watched = picture_losses(self._method, network, at, pace, mx.zeros_like(at.angle))
        seen.append(watched)
        return each.sum()

    def _errors(self, made: mx.array, target: mx.array, angle: mx.array) -> mx.array:
        """Squared error of each velocity [M]; of a network that predicts noise that of the noise, cos(a) times it."""
        errors = losses.image_errors(made, target)
        return errors * mx.cos(angle).square() if self._model.predicts_noise else errors

    def _text_loss(self, texts: Sequence[Sequence[int]]) -> mx.array:
        """Summed next-token loss of whole texts."""
        ids, lengths = padded(texts, 0)
        logits = self._model.text_logits(mx.array(ids))[:, :-1].astype(mx.float32)
        weight = np.arange(ids.shape[1] - 1) < lengths[:, None] - 1
        flat = logits.reshape(-1, logits.shape[-1])
        return losses.text_loss(flat, mx.array(ids[:, 1:].reshape(-1)), mx.array(weight.reshape(-1)))

    def _mean_parts(self, batch: FamilyBatch) -> np.ndarray:
        """[text loss sum in nats, text tokens, image loss sum, images] of one batch without gradients."""
        text = self._text_loss(batch.texts).item() if batch.texts else 0.0
        image = 0.0
        if batch.prefixes and self._method is None:
            at, target = self._states(batch)
            made = self._model.velocity(at.x, at.angle, self._prompts(self._model, batch))
            image = float(self._errors(made.astype(mx.float32), target, at.angle).sum().item())  # type: ignore[arg-type]
        return np.array([text, sum(len(t) - 1 for t in batch.texts), image, len(batch.prefixes)])

    # ---- what the losses compare ----------------------------------------------------------------------------------

    def _states(self, batch: FamilyBatch) -> tuple[States, mx.array]:
        """Noisy pictures, cos(a) times the way they go, and the velocity of the samples themselves [M, N, P]."""
        angle = batch.pictures.angle
        if self._model.predicts_noise:
            angle = np.minimum(angle, np.float32(trigflow.MAX_EPS_ANGLE))
        a = mx.array(angle)[:, None, None]
        x0, z = self._clean(batch), mx.array(batch.pictures.noise)
        target = trigflow.velocity_target(x0, z, a)
        x, at_angle = trigflow.mix(x0, z, a), mx.array(angle)
        if self._method is None or not batch.prefixes:
            at = States(x, at_angle, mx.cos(a) * target)
        else:

            def way(x: mx.array, angle: mx.array) -> mx.array:
                v = self._teachers_velocity(batch, x, angle) if self._distils else target
                return mx.cos(angle)[:, None, None] * v

            at = self._method.states(x, at_angle, way(x, at_angle), way)
        mx.eval(at, target)
        return at, target

    def _clean(self, batch: FamilyBatch) -> mx.array:
        """Encoded pictures [M, N, P]: each is encoded once, as long as there is room for it."""
        if batch.pictures.pixels.dtype != np.uint8:  # encoded before the first step
            return mx.array(batch.pictures.pixels)
        out = []
        for name, pixels in zip(batch.names, batch.pictures.pixels, strict=True):
            known = self._latents.get(name)
            if known is None:
                known = encoded(self._model, pixels[None])
                mx.eval(known)
                if known.nbytes <= self._latents_left:
                    self._latents_left -= known.nbytes
                    self._latents[name] = known
            out.append(known)
        return mx.concatenate(out) if out else mx.zeros((0, *self._model.latent_shape))

    def _prompts(self, model: PictureFamily, batch: FamilyBatch) -> KVCache:
        """Keys and values before each picture: of its prompt, or of what guidance has in its place."""
        rows = list(range(len(batch.prefixes)))
        prompted = [i for i in rows if batch.prompted[i]]
        dropped = [i for i in rows if not batch.prompted[i]]
        parts = []
        if prompted:
            parts.append(prefill(model, [batch.prefixes[i] for i in prompted]))
        if dropped:
            parts.append(guides(model, [batch.prefixes[i] for i in dropped]))
        cache = parts[0] if len(parts) == 1 else parts[0].stack(parts[1])
        order = [*prompted, *dropped]
        return cache if order == rows else cache.select([order.index(i) for i in rows])

    @property
    def _distils(self) -> bool:
        return self._config.consistency is not None and self._config.consistency.teacher is not None

    def _teachers_velocity(self, batch: FamilyBatch, x: mx.array, angle: mx.array) -> mx.array:
        """The teacher's (guided) velocity [M, N, P] of pictures x [M, N, P] at angles [M]."""
        c = self._config.consistency
        assert c is not None
        m = len(batch.prefixes)
        with self._run.teaching() as teacher:
            cache = self._prompts(teacher, batch)
            if c.guidance == 1:
                return teacher.velocity(x, angle, cache).astype(mx.float32)
            both = cache.stack(guides(teacher, batch.prefixes))
            v = teacher.velocity(mx.concatenate([x, x]), mx.concatenate([angle, angle]), both)
            v = v.astype(mx.float32)
            rows = [slice(i, i + 1) for i in range(m)]
            angles = np.array(angle).tolist()  # families guide pictures at one angle
            return mx.concatenate(
                [
                    teacher.guided(v[:m][r], v[m:][r], c.guidance, x[r], a)
                    for r, a in zip(rows, angles, strict=True)
                ]
            )

    def _valid_pictures(self, data: DataSet, size: int) -> tuple[list[list[int]], list[int], mx.array]:
        """Prompts, seeds, and the teacher's clean patches [M, N, P] for them."""
        c = self._config.consistency
        assert c is not None
        prefixes: list[list[int]] = []
        for i in range(c.valid_pictures):
            batch = [d for d in data.documents(i, size) if d.images]
            prefixes += family_batch(data, batch).prefixes
            if len(prefixes) >= c.valid_pictures:
                break
        prefixes = prefixes[: c.valid_pictures]
        seeds = list(range(len(prefixes)))
        with self._run.teaching() as teacher:
            return prefixes, seeds, paint(teacher, prefixes, seeds, teacher_settings(c))


def encoded(model: PictureFamily, pixels: np.ndarray) -> mx.array:
    """Latents float32 [M, N, P] of pixels uint8 [M, H, W, 3]."""
    return model.encode(mx.array(pixels).astype(mx.float32) / 255).astype(mx.float32)


def guides(model: PictureFamily, prefixes: Sequence[Sequence[int]]) -> KVCache:
    """What guidance leads away from, one row for each prefix."""
    cache = model.guide(prefixes)
    return cache if cache.batch == len(prefixes) else cache.select([0] * len(prefixes))
